"""A weight per example for any likelihood: importance weights, or probabilities of the examples in the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fisherfn.errors import StructureError, expect
from fisherfn.likelihoods.base import as_likelihood, check_shape
from fisherfn.types import PyTree, at_least_single

PASSED_ON = ("sample", "noise", "fisher_sqrt")
"""Methods that do not see the targets."""


@dataclass(frozen=True)
class Weighted:
    r"""A likelihood with a weight w ≥ 0 for each example; targets are the pair `(targets, weights)`, weights `[N]`.

    The loss is $\frac1N \sum_n w_n \ell_n$, with all N examples in the denominator, and the Fisher of "mc" and "type2"
    is $\frac1N \sum_n w_n F_n$: a weight of 2 counts as an example seen twice. Weights with a mean of 1 give weighted
    means: for probabilities p, pass N p. Batches of `ng.fit` need no common sum of weights.

    Weights that are negative or not finite, or whose sum over a batch (or chunk) is zero, fail the check of the
    targets.

    Args:
        likelihood: `ff.Gaussian()` or another; a plain callable `(outputs, targets) -> [N]` serves the
            empirical Fisher.

    Raises:
        LikelihoodError: a class, or neither a likelihood nor a function.

    >>> from fisherfn.likelihoods import Gaussian
    >>> Weighted(Gaussian()).nll(torch.zeros(2, 1), (torch.ones(2, 1), torch.tensor([1.0, 3.0])))
    tensor([0.5000, 1.5000])
    """

    likelihood: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "likelihood", as_likelihood(self.likelihood))

    def __getattr__(self, name: str) -> Any:
        """Return a method of the likelihood that does not see the targets, if it has this one."""
        if name not in PASSED_ON:
            raise AttributeError(name)
        return getattr(self.likelihood, name)

    def nll(self, outputs: Float[Tensor, "n *d"], targets: PyTree) -> Float[Tensor, " n"]:
        """Return `w_n` times the negative log-likelihood of each example."""
        y, weights = _split(outputs, targets)
        return weights * self.likelihood.nll(outputs, y)  # type: ignore[no-any-return]

    def observed(self, outputs: Float[Tensor, "n *d"], targets: PyTree) -> tuple[Any, Tensor | None]:
        """Return the likelihood that scores sampled labels, and the weight of each example or position."""
        own = getattr(self.likelihood, "observed", None)
        if targets is None:
            return (self.likelihood, None) if own is None else own(outputs, None)
        y, weights = _split(outputs, targets)
        if own is None:
            return self.likelihood, weights
        scoring, inner = own(outputs, y)
        if inner is None:
            return scoring, weights
        return scoring, weights.reshape(-1, *(1,) * (inner.ndim - 1)) * inner

    def valid(self, outputs: Tensor, targets: PyTree) -> Bool[Tensor, ""]:
        """Return True if the weights are valid, and the targets for the likelihood."""
        y, weights = _split(outputs, targets)
        sound = ((weights >= 0) & torch.isfinite(weights)).all() & (weights.sum() > 0)
        own = getattr(self.likelihood, "valid", None)
        return sound if own is None else sound & own(outputs, y)


def _split(outputs: Tensor, targets: PyTree) -> tuple[PyTree, Float[Tensor, " n"]]:
    """Return targets, and weights in at least float32; raise unless there is one weight per example."""
    if not isinstance(targets, (tuple, list)) or len(targets) != 2:
        raise StructureError(f"Weighted targets are a pair (targets, weights), got {type(targets).__name__}.")
    y, weights = targets
    expect(weights, Tensor, "weights", "pass a tensor with a weight for each example")
    check_shape(weights, outputs.shape[:1], "Weighted: weights as", "a weight for each example")
    return y, weights.to(at_least_single(outputs.dtype))
