r"""K-FAC: the Fisher block of a layer as one Kronecker product, $F \approx G \otimes A$.

$$A = \frac1N \sum_{n,t} a_{nt} a_{nt}^\top, \qquad G = \frac1{NT} \sum_{n,s,t} g_{snt} g_{snt}^\top$$

The approximation is exact if $aa^\top$ and $gg^\top$ are independent and, for shared positions with "expand", if
positions are independent and identically distributed. Scale: $G \otimes A$ is in the units of the Fisher of the mean
negative log-likelihood; the number of positions T is in A.

Martens & Grosse 2015, *Optimizing neural networks with Kronecker-factored approximate curvature*, sections 3 and 6.3;
Grosse & Martens 2016 for shared positions; running average as in section 5 of the first.

k group, s sample, n example, t position, i input, o output.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import Tensor

from fisherfn import rows, tree
from fisherfn.base import Diagnostics, Method, estimate_then_blend, factorwise, one_by_one, whole_mean
from fisherfn.errors import EmptyBatchError, unknown
from fisherfn.linalg import kron
from fisherfn.linalg.kron import DIAGONAL_ABOVE, Pair
from fisherfn.methods.kronecker import DampingForm, one_term
from fisherfn.taps import AnyTap, Mean, Moment, Tap

T = TypeVar("T")

Sharing = Literal["expand", "reduce"]
SHARINGS = ("expand", "reduce")


def kfac(
    damping_form: DampingForm | str = "factored",
    sharing: Sharing | str = "expand",
    diagonal_above: int = DIAGONAL_ABOVE,
) -> Method:
    """Build K-FAC: one Kronecker product of second moments per block.

    Args:
        damping_form: "factored" damps each factor, with π distributing λ between them. It adds
            `π√λ G⊗I + √λ/π I⊗A + λI`, more than λI, and costs one Cholesky factorisation per factor. "eigen" adds
            exactly λI and costs one eigendecomposition per factor, 3 to 4 times as much.
        sharing: the assumption about positions that share a weight (sequence, pixels). "expand" treats every position
            as independent. "reduce" uses only the mean input and the sum of output-gradients (cheaper; exact if
            output-gradients are equal at all positions, as below a mean over them).
        diagonal_above: a factor wider than this is kept as its diagonal, such as that of a vocabulary. The input
            factor of an embedding is diagonal at any width, without approximation.

    Raises:
        UnknownNameError: an unknown damping form or sharing.
        HyperparameterError: a negative width.
    """
    if sharing not in SHARINGS:
        raise unknown("sharing", sharing, SHARINGS)
    moments = partial(estimate, moments=partial(MOMENTS[sharing], limit=diagonal_above))
    return one_term("kfac", one_by_one(estimate_then_blend(moments, factorwise)), damping_form, diagonal_above)


# factors ---------------------------------------------------------------------------------------------------------


def estimate(
    tap: AnyTap, previous: Pair | None = None, mean: Mean = whole_mean, moments: Moment | None = None
) -> tuple[Pair, Diagnostics]:
    """Estimate A and G from one batch, at least in float32."""
    return mean(moments or expand, tap), {}


def expand(tap: AnyTap, limit: int = DIAGONAL_ABOVE) -> Pair:
    """Compute the second moments over examples and positions: `F ≈ Σ_t E[aaᵀ] ⊗ mean_t E[ggᵀ]`."""
    n, t = tap.sizes.n, tap.sizes.t
    g = _precise(tap.outputs().flatten(1, 2))  # samples are additional rows
    A = tap.second_moment() if tap.sizes.i <= limit else None
    if A is None:
        A = _summed(lambda part: _moment(rows.cast(part.a, g.dtype), limit), tap)
    return Pair(A / n, _moment(g, limit) / (n * t))


def reduce(tap: AnyTap, limit: int = DIAGONAL_ABOVE) -> Pair:
    """Compute the second moments over examples, of the mean input and of the summed output-gradient."""
    n, t = tap.sizes.n, tap.sizes.t

    def of(part: Tap) -> Pair:
        part = part.to(torch.promote_types(part.g.dtype, torch.float32))
        g = part.g.sum(3, keepdim=True).flatten(1, 2)
        if isinstance(part.a, rows.OneHot):  # summed rows are not one-hot: here the diagonal is an approximation
            return Pair(rows.total_diagonal(part.a) / t**2, _moment(g, limit))
        return Pair(_moment((rows.total(part.a) / t).unsqueeze(2), limit), _moment(g, limit))

    pair = _summed(of, tap)
    return Pair(pair.A / n, pair.G / n)


MOMENTS = {"expand": expand, "reduce": reduce}


def _moment(a: rows.Rows, limit: int) -> kron.Factor:
    diagonal = isinstance(a, rows.OneHot) or rows.sizes(a)[3] > limit
    return rows.diagonal_moment(a) if diagonal else rows.second_moment(a)


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _summed(of: Callable[[Tap], T], tap: AnyTap) -> T:
    """Sum window by window, so that unfolded convolutions are never in memory as a whole."""
    total = None
    for part in tap.windows():
        moments = of(part)
        total = moments if total is None else tree.add(total, moments)
    if total is None:
        raise EmptyBatchError("the tap has no examples: its mean does not exist.")
    return total
