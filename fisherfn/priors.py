"""Precisions of a Gaussian prior, one per block and per unused parameter, and the one that maximises the evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn.errors import StructureError, expect_positive, unknown
from fisherfn.linalg import damped
from fisherfn.linalg.solve import psd_eigh
from fisherfn.methods.kronecker import KroneckerMethod, TwoTerms
from fisherfn.stats import Layout
from fisherfn.types import PyTree, Shape

Prior = float | Tensor | Mapping[str, float | Tensor]
"""The precision δ of the prior: one for all parameters, or one per block key and per unused parameter."""


def precisions(layout: Layout, prior: Prior, like: Tensor) -> dict[str, Tensor]:
    """Return a precision for each block and each unused parameter, of the type and on the device of a tensor.

    Raises:
        HyperparameterError: a precision that is not positive.
        UnknownNameError: no block or unused parameter has this key.
        StructureError: a block or an unused parameter without a precision.
    """
    keys = [*(block.key for block in layout.blocks), *layout.unused]
    given = dict(prior) if isinstance(prior, Mapping) else dict.fromkeys(keys, prior)
    for key in given:
        if key not in keys:
            raise unknown("block", key, keys)
    missing = [key for key in keys if key not in given]
    if missing:
        raise StructureError(
            f"no prior precision for {', '.join(map(repr, missing))}: give one per block and per unused parameter."
        )
    for key, δ in given.items():
        expect_positive(f"prior precision of {key!r}", δ)
    return {key: torch.as_tensor(given[key], dtype=like.dtype, device=like.device) for key in keys}


class BlockEigenvalues(NamedTuple):
    """The undamped eigenvalues of a block, in the basis of its inverse.

    Attributes:
        leading: those of the leading product.
        total: all of them, with the diagonal of a second product.
        floor: the total plus λ counts as at least this share of the leading eigenvalue plus λ.
    """

    leading: Float[Tensor, "*d"]
    total: Float[Tensor, "*d"]
    floor: float


def block_eigenvalues(method: KroneckerMethod, factors: PyTree, shape: Shape) -> BlockEigenvalues:
    """Return the eigenvalues to which eigen damping adds λ; a second product adds its diagonal in their basis."""
    if isinstance(method, TwoTerms):
        first, second = factors
        A, G = psd_eigh(first.A), psd_eigh(first.G)
        leading = G.values.unsqueeze(-1) * A.values.unsqueeze(-2)
        return BlockEigenvalues(leading, leading + damped.product_diagonal(A.vectors, G.vectors, second), method.floor)
    values = method.eigenvalues_block(factors, shape)
    return BlockEigenvalues(values, values, 0.0)


def most_probable(
    spectra: Mapping[str, BlockEigenvalues], squares: Mapping[str, Tensor], prior: Mapping[str, Tensor],
    examples: Float[Tensor, ""], iterations: int, per_block: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """Return the precisions that maximise the evidence, one per block or one for all; where none does, the old ones.

    Args:
        spectra: the eigenvalues of each block.
        squares: ‖θ‖² of each block.
        prior: the precisions with which to start.
        examples: their number N.
        iterations: see `fixed_point`.
        per_block: one precision per block, while unused parameters keep theirs; False: one for all.
    """
    found = dict(prior)
    for keys in [[key] for key in spectra] if per_block else [list(spectra)]:
        square = torch.stack([squares[key] for key in keys]).sum()
        δ = fixed_point([spectra[key] for key in keys], square, examples, prior[keys[0]], iterations)
        exists = torch.isfinite(δ) & (δ > 0)
        found |= {key: torch.where(exists, δ, prior[key]) for key in (keys if per_block else prior)}
    return found


def fixed_point(
    spectra: Sequence[BlockEigenvalues],
    square: Float[Tensor, ""],
    examples: Float[Tensor, ""],
    start: Tensor,
    iterations: int,
) -> Float[Tensor, ""]:
    r"""Return the precision δ that maximises the evidence of blocks with one prior; zero, infinite or NaN if none does.

    The evidence has no slope at the fixed point of MacKay's map $f(\delta) = \gamma / \|\theta\|^2$, where
    $\gamma = \sum_i \sigma_i / (\sigma_i + \lambda)$ counts the parameters that the data determine. In log δ, the
    slope of f is

    $$s = -\sum_i \frac{\sigma_i \lambda}{(\sigma_i + \lambda)^2} \Big/ \sum_i \frac{\sigma_i}{\sigma_i + \lambda},
    \qquad -1 < s \le 0 \quad \text{for eigenvalues } \sigma_i \ge 0,$$

    so there is one such point, unless all σ are zero. Small parameters make λ large and s nearly −1: iterates of f then
    alternate around it for thousands of steps. The geometric mean $\sqrt{\delta f(\delta)}$ has the same fixed
    point and the slope (1 + s)/2, which is in (0, ½]: each step at least halves the distance in log δ.
    """
    δ = start
    for _ in range(iterations):
        λ = δ / examples
        # at its floor, a denominator is a multiple of the leading eigenvalue plus λ
        counted = [torch.where(total + λ < floor * (leading + λ), leading, total) for leading, total, floor in spectra]
        γ = torch.stack([(σ / (σ + λ)).sum() for σ in counted]).sum()
        δ = (δ * γ / square).sqrt()
    return δ
