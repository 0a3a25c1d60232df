"""Statistics of a model and a likelihood: one forward pass, and one backward pass to activations per kind of label."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import masked, tree
from fisherfn.errors import StructureError, expect, expect_count
from fisherfn.likelihoods import as_likelihood, draw
from fisherfn.randomness import sampling
from fisherfn.stats.batch import (
    Batch,
    Checked,
    check_fisher,
    check_noise,
    check_samples,
    checked,
    checked_context,
    count_examples,
    pair,
)
from fisherfn.stats.border import border
from fisherfn.stats.build import build
from fisherfn.stats.chunks import in_chunks
from fisherfn.stats.functional import run
from fisherfn.stats.implicit import ImplicitFisher
from fisherfn.stats.layout import Layout
from fisherfn.stats.passes import example_losses, fisher_cotangents, loss_cotangent, pull_all, require, tapped_run
from fisherfn.stats.singles import example_gradients
from fisherfn.stats.statistics import LayerStats, Stats
from fisherfn.types import Model, PyTree, Tree, at_least_single
from fisherfn.which import Which, chosen, includes

FisherKind: TypeAlias = Literal["mc", "type2", "empirical"] | str

C = TypeVar("C", bound="Collector")


@dataclass(frozen=True)
class Collector:
    """A model with its likelihood: pure functions of parameters and a batch that return statistics.

    Attributes:
        model: the pure function that was traced.
        layout: the blocks of the model, and the shapes of the trace.
        likelihood: the likelihood of the outputs.
        fisher_kind: the Fisher that `stats` samples by default.
        samples: the number of sampled labels per example by default.
    """

    model: Model
    layout: Layout
    likelihood: Any
    fisher_kind: str
    samples: int

    def for_shape(self: C, params: Tree, x: PyTree, *, context: PyTree = None) -> C:
        """Return the natural gradient for inputs of another example shape (longer sequences), with the same state.

        Both can use the same states and preconditioned gradients. If a state holds statistics of a batch (`exact`,
        two-level), they are those of the last update, whatever its shape. The call costs a build, so keep the result.

        Raises:
            StructureError: the parameters form other blocks on these inputs.
        """
        self.layout.validate(params)
        unused = "ignore" if self.layout.unused else "raise"
        uncovered = "gradient" if self.layout.uncovered else "fallback"
        context = checked_context(self.layout, context)
        layout = build(self.model, params, tree.plain(x), context, unused=unused, uncovered=uncovered)
        mine, its = ({b.names: (b.key, b.kind, b.shape) for b in each.blocks} for each in (self.layout, layout))
        left, its_left = ((each.unused, dict(each.uncovered).keys()) for each in (self.layout, layout))
        if mine != its or left != its_left:
            names = sorted({", ".join(names) for names, _ in mine.items() ^ its.items()})[:4]
            raise StructureError(
                f"on inputs of this shape (or in this mode of the net) {'; '.join(names) or 'other parameters'} form "
                "other blocks, so the state cannot be shared: build another natural_gradient, with its own state."
            )
        return replace(self, layout=layout)

    def noise(self, batch: Batch, generator: torch.Generator, *, samples: int | None = None) -> Tensor:
        """Return the noise that `generator=` would use, `[N, S, …]`; a chunk or rank takes its slice of examples."""
        x, y = pair(batch)
        expect(generator, torch.Generator, "generator", "pass a torch.Generator, from which the labels are sampled")
        return self._drawn(Checked(x, y, (), count_examples(self.layout, x)), generator, samples)

    def stats(
        self,
        params: Tree,
        batch: Batch,
        *,
        fisher: FisherKind | None = None,
        samples: int | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        context: PyTree = None,
        chunk_size: int | None = None,
        curvature: bool | Collection[str] = True,
    ) -> Stats:
        """Return loss, gradient and curvature statistics of one batch.

        Args:
            params: the parameters, with the names and shapes of the build.
            batch: inputs and targets, with the examples along the first axis.
            fisher: "mc", "type2" or "empirical"; default: the build's.
            samples: number S of sampled labels per example for "mc"; default: the build's.
            generator: random generator for the labels of "mc"; alternatively pass `noise`.
            noise: `[N, S, …]` from `ng.noise`.
            context: for models with a context.
            chunk_size: examples per forward and backward pass, to limit memory; the result is that of the whole batch.
            curvature: False samples no labels; such statistics only serve `grads` and `precondition`. The keys of some
                blocks give statistics that update only these.

        Raises:
            ShapeError: shapes or types that differ from the build; no examples (`EmptyBatchError`).
            StructureError: names or a context that differ from the build; keys of no block.
            NoiseError: "mc" with neither `generator` nor `noise`, or with a generator inside `torch.vmap`.
            LikelihoodError: the likelihood lacks a method that this Fisher needs, or couples examples across chunks.
            TargetError: targets of the wrong type.
        """
        self.layout.validate(params)
        given = checked(self.layout, batch, context)
        kind = self.fisher_kind if fisher is None else fisher
        check_fisher(kind)
        which = chosen(curvature, self.layout.block_shapes)
        if which and kind == "mc":
            noise = self._noise_of(given, generator, noise, samples)
        part = partial(self._collect, params, kind if which else None, which)
        if chunk_size is not None:
            expect_count("chunk_size", chunk_size)
        if chunk_size is None or chunk_size >= given.examples:
            return part(given.x, given.y, noise, given.context)
        return in_chunks(part, self.layout, given.x, given.y, noise, given.context, chunk_size, self.likelihood)

    def loss(self, params: Tree, batch: Batch, *, context: PyTree = None) -> Float[Tensor, ""]:
        """Return the mean negative log-likelihood of a batch, for a line search or an evaluation.

        Raises:
            ShapeError: shapes or types that differ from the build, or a likelihood without one number per example.
            StructureError: names or a context that differ from the build.
        """
        self.layout.validate(params)
        given = checked(self.layout, batch, context)
        outputs, _ = run(self.model, params, given.x, given.context)
        return example_losses(self.likelihood, outputs, given.y).mean()

    def implicit_fisher(
        self, params: Tree, x: PyTree, targets: PyTree = None, *, context: PyTree = None
    ) -> ImplicitFisher:
        """Return the type-2 Fisher of a batch by products through the model, for networks with many outputs.

        Args:
            params: the parameters at which it is evaluated.
            x: the inputs of the batch.
            targets: its targets, of which only the weights of observations count: ignored positions, weights of
                classes and of examples. None: all observations count the same.
            context: for models with a context.

        Raises:
            ShapeError: shapes or types that differ from the build; no examples (`EmptyBatchError`).
            StructureError: names or a context that differ from the build.
            LikelihoodError: a likelihood without `fisher_sqrt`, or one with weights and no targets.
        """
        self.layout.validate(params)
        given = checked(self.layout, (x, () if targets is None else targets), context)
        return ImplicitFisher(self.model, self.likelihood, params, given.x, given.context, targets)

    # ---------------------------------------------------------------------------------------------------------

    def _noise_of(
        self, given: Checked, generator: torch.Generator | None, noise: Tensor | None, samples: int | None
    ) -> Tensor | None:
        """Return the noise for "mc": the given one, or new noise from the generator."""
        require(self.likelihood, "sample", "mc")
        if noise is None and generator is not None:
            expect(generator, torch.Generator, "generator", "pass a torch.Generator, from which the labels are sampled")
            return self._drawn(given, generator, samples)
        if noise is not None:
            # vmap refuses to sample, even in order to learn a shape
            entries = self._noise_entries if masked.is_concrete(noise) else None
            check_noise(noise, given.examples, samples, entries)
        return noise

    @cached_property
    def _noise_entries(self) -> torch.Size:
        """The shape of the noise of one sample: where one number served several outputs, their labels would agree."""
        one = torch.Size((1, 1, *self.layout.output_shape))
        return draw(self.likelihood, one, torch.Generator(), torch.float32).shape[2:]

    def _drawn(self, given: Checked, generator: torch.Generator, samples: int | None) -> Tensor:
        samples = self.samples if samples is None else samples
        check_samples(samples)
        shape = torch.Size((given.examples, samples, *self.layout.output_shape))
        dtype = at_least_single(self.layout.output_dtype)
        with sampling("sample before the call, and pass noise=ng.noise(batch, generator)"):
            return draw(self.likelihood, shape, generator, dtype).to(tree.leaves(given.x)[0].device)

    @border()
    def _collect(
        self, params: Tree, kind: str | None, which: Which, x: PyTree, y: PyTree, noise: Tensor | None, context: PyTree
    ) -> Stats:
        """Return the statistics of a checked batch or chunk; `kind` is None for statistics without curvature."""
        layout = self.layout
        outputs, pull, inputs, new_context = tapped_run(self.model, layout, params, x, context)
        loss_cot, nll = loss_cotangent(self.likelihood, outputs, y)
        if kind is None or kind == "empirical":
            cots = loss_cot.new_empty((0, *loss_cot.shape))
        else:
            cots = fisher_cotangents(self.likelihood, outputs, y, kind, noise)
        loss_grads, grads = pull(loss_cot), pull_all(pull, cots)
        plain = {name: loss_grads.pop(name)[0] / outputs.shape[0] for name, _ in layout.uncovered}
        if layout.fallbacks:
            names, rows = [block.weight for block in layout.fallbacks], torch.cat([loss_cot.unsqueeze(0), cots])
            singles = example_gradients(self.model, layout, params, names, x, context, rows)
            inputs |= dict.fromkeys(names, (outputs.new_ones(outputs.shape[0]),))
            singles = {b.weight: singles[b.weight].to(b.uses[0].dtype) for b in layout.fallbacks}
            loss_grads |= {name: (g[0],) for name, g in singles.items()}
            grads |= {name: (g[1:],) for name, g in singles.items()}
        if kind == "empirical":  # labels are the data's targets: the backward pass of the loss is reused
            grads = {name: tuple(g.unsqueeze(0) for g in uses) for name, uses in loss_grads.items()}
        layers = {
            b.key: LayerStats(inputs[b.weight], grads[b.weight] if includes(which, b.key) else (), loss_grads[b.weight])
            for b in layout.blocks
        }
        loss = nll.mean()
        numbers = [leaf for leaf in tree.leaves(x) if leaf.is_floating_point()]
        finite = tree.finite_inputs([loss.new_zeros(()), *numbers])
        checks = {"inputs": finite, "targets": self._valid(outputs, y), "loss": torch.isfinite(loss)}
        if plain:
            checks["gradient"] = tree.finite(plain)
        weights = getattr(self.likelihood, "column_weights", None) if kind == "type2" else None
        residuals = () if weights is None else weights(loss_cot)
        return Stats(loss, outputs, new_context, layers, checks, layout, plain, nll, kind == "empirical", residuals)

    def _valid(self, outputs: Tensor, y: PyTree) -> Tensor:
        valid: Callable[[Tensor, Any], Tensor] | None = getattr(self.likelihood, "valid", None)
        if valid is not None:
            return valid(outputs, y)
        numbers = (leaf for leaf in tree.leaves(y) if torch.is_tensor(leaf) and leaf.is_floating_point())
        return tree.finite([outputs.new_zeros(()), *numbers])


def known_likelihood(likelihood: Any, fisher: str, samples: int) -> Any:
    """Return a likelihood with the methods that this Fisher needs; a plain callable serves the empirical Fisher.

    Raises:
        UnknownNameError: no Fisher has this name.
        HyperparameterError: fewer than one sample.
        LikelihoodError: no likelihood, or one that lacks a method that this Fisher needs.
    """
    check_fisher(fisher)
    check_samples(samples)
    likelihood = as_likelihood(likelihood)
    if fisher != "empirical":
        require(likelihood, {"mc": "sample", "type2": "fisher_sqrt"}[fisher], fisher)
    return likelihood
