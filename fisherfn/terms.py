r"""The natural gradient of a loss that is a sum of terms, each with its own model, batch and number of examples.

$$L(\theta) = \sum_i w_i \frac1{N_i} \sum_{n} -\log p_i(y_{in} \mid f_i(\theta, x_{in})), \qquad F = \sum_i w_i F_i$$

A physics-informed net has one term for the residuals inside the domain and one for the values on its boundary. All
terms are functions of the same parameters, and F is the Fisher of them together: with "full", `exact` stacks the
per-example gradients of all terms.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor

from fisherfn.base import Method
from fisherfn.errors import FisherfnError, HyperparameterError, StructureError, expect, expect_number
from fisherfn.merged import SumStats, blocks_of, merged
from fisherfn.methods import named
from fisherfn.natgrad import NaturalGradient, natural_gradient
from fisherfn.stats import FisherKind
from fisherfn.types import Model, PyTree, Tree
from fisherfn.which import chosen

T = TypeVar("T")


class Term(NamedTuple):
    """One term of a loss.

    Attributes:
        model: a pure function `model(params, x) -> outputs`, as for `natural_gradient`.
        x: example inputs `[N, …]`; later batches may have another N.
        likelihood: the likelihood of its outputs.
        weight: factor of its mean negative log-likelihood in the loss, >= 0.
        fisher: "mc", "type2" or "empirical".
        samples: number of sampled labels per example for "mc".
    """

    model: Model
    x: PyTree
    likelihood: Any
    weight: float = 1.0
    fisher: FisherKind = "type2"
    samples: int = 1


@dataclass(frozen=True)
class TermSum(NaturalGradient):
    """A natural gradient for a sum of terms. Made by `sum_of_terms`; used as any other, with one batch per term.

    Attributes:
        terms: the natural gradient of each term alone.
        weights: the weight of each term.
    """

    terms: Mapping[str, NaturalGradient]
    weights: Mapping[str, float]

    def stats(
        self,
        params: Tree,
        batch: Any,
        *,
        context: PyTree = None,
        noise: Any = None,
        curvature: bool | Collection[str] = True,
        **options: Any,
    ) -> SumStats:
        """Return loss, gradient and curvature statistics of one batch per term.

        Args:
            params: the parameters.
            batch: a dict with inputs and targets of each term.
            context: None; terms have no context.
            noise: a dict with the noise of each term that samples labels, from `ng.noise`.
            curvature: as for a single term; keys are those of the common blocks.
            options: as for a single term; a generator serves the terms in order.

        Raises:
            StructureError: a term without batch, a batch without term, noise of no term, a context, keys of no block.
            EmptyBatchError: a term without examples; see `NaturalGradient.stats` for the others.
        """
        self.check_terms(batch, noise, context)
        which = chosen(curvature, self.layout.block_shapes)
        collected = {}
        for name, term in self.terms.items():
            mine: dict[str, Any] = {"noise": (noise or {}).get(name)}
            mine["curvature"] = blocks_of(term.layout, self.layout, which)
            collected[name] = _in_term(name, partial(term.stats, params, batch[name], **mine, **options))
        return SumStats.of(collected, dict(self.weights), self.layout, which)

    def loss(self, params: Tree, batch: Any, *, context: PyTree = None) -> Tensor:
        """Return the weighted sum of the terms' mean negative log-likelihoods."""
        self.check_terms(batch, context=context)
        return torch.stack(
            [self.weights[name] * term.loss(params, batch[name]) for name, term in self.terms.items()]
        ).sum()

    def noise(self, batch: Any, generator: torch.Generator, *, samples: int | None = None) -> Any:
        """Return the noise that `generator=` would use, for each term that samples labels."""
        self.check_terms(batch)
        sampled = {name: term for name, term in self.terms.items() if term.fisher_kind == "mc"}
        return {name: term.noise(batch[name], generator, samples=samples) for name, term in sampled.items()}

    def fit(self, params: Tree, loader: Any, **options: Any) -> NoReturn:
        """Raise `StructureError`: batches of a sum of terms need not have its proportions of examples."""
        raise StructureError(
            "a sum of terms is fitted to one batch per term: pass ng.stats(params, batch) to ng.update."
        )

    def for_shape(self, params: Tree, x: PyTree, *, context: PyTree = None) -> NoReturn:
        """Raise `StructureError`: the examples of a term keep their shape."""
        raise StructureError("a sum of terms keeps the shapes of its examples: build another one with sum_of_terms.")

    def implicit_fisher(self, params: Tree, x: PyTree, targets: PyTree = None, *, context: PyTree = None) -> NoReturn:
        """Raise `StructureError`: take the implicit Fisher of each of `ng.terms`."""
        raise StructureError("add the products of ng.terms[name].implicit_fisher(params, x, y) over the terms.")

    def check_terms(self, batch: Any, noise: Any = None, context: PyTree = None) -> None:
        """Raise `StructureError` unless the batch has exactly the terms, noise is theirs, and there is no context."""
        unknown = sorted((noise or {}).keys() - self.terms.keys())
        if unknown or context not in (None, (), {}):
            what = f"there is noise for {unknown}, which are no terms" if unknown else "terms have no context"
            raise StructureError(f"{what}: pass noise from ng.noise(batch, generator), and no context.")
        expect(batch, Mapping, "a batch of a sum of terms", "pass {name: (inputs, targets)} with every term")
        missing, unexpected = sorted(self.terms.keys() - batch.keys()), sorted(batch.keys() - self.terms.keys())
        if missing or unexpected:
            raise StructureError(f"the batch has no entry for terms {missing}, and unknown entries {unexpected}.")


def sum_of_terms(
    terms: Mapping[str, Term], params: Tree, *, method: Method | str = "kfac", unused: str = "raise"
) -> TermSum:
    """Build the natural gradient of a sum of terms.

    Args:
        terms: the terms by name. A term need not depend on every parameter.
        params: `{name: tensor}`.
        method: `ff.exact()`, `ff.kfac()` or another; Kronecker methods take the examples of all terms as one batch.
        unused: treatment of parameters on which no term depends: "raise" the error, or "ignore" them.

    Raises:
        StructureError: no term, or an entry that is no `Term`.
        HyperparameterError: a weight that is negative, or weights that sum to zero.
        EmptyBatchError: a term without examples; see `natural_gradient` for the others.
    """
    expect(terms, Mapping, "terms", "pass {name: ff.Term(model, x, likelihood)}")
    if not terms:
        raise StructureError("a sum of terms needs a term: pass {name: ff.Term(model, x, likelihood)}.")
    for name, term in terms.items():
        expect(term, Term, f"term {name!r}", "pass ff.Term(model, x, likelihood)")
        expect_number(f"the weight of term {name!r}", term.weight, lambda v: v >= 0, "must be >= 0")
    if not sum(term.weight for term in terms.values()) > 0:
        raise HyperparameterError("the weights of all terms are zero: the loss would be constant.")
    method = named(method)
    built = {name: _in_term(name, partial(_alone, term, params, method)) for name, term in terms.items()}
    layout = merged({name: ng.layout for name, ng in built.items()}, params, unused)
    first = next(iter(built.values()))
    weights = {name: float(term.weight) for name, term in terms.items()}
    return TermSum(_no_model, layout, first.likelihood, first.fisher_kind, first.samples, method, built, weights)


def _alone(term: Term, params: Tree, method: Method) -> NaturalGradient:
    return natural_gradient(
        term.model, params, term.x, likelihood=term.likelihood, method=method, fisher=term.fisher,
        samples=term.samples, unused="ignore",
    )  # fmt: skip


def _in_term(name: str, call: Callable[[], T]) -> T:
    """Return the result of a call; an error names the term."""
    try:
        return call()
    except FisherfnError as error:
        raise type(error)(f"term {name!r}: {error}") from error


def _no_model(params: Tree, x: PyTree) -> NoReturn:
    raise StructureError("a sum of terms has no single model: each of ng.terms has its own.")
