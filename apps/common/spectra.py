r"""How alike two Fisher blocks are beyond their distance: their leading eigenvalues, and where they send a gradient.

An approximation is known by its action on matrices, $W \mapsto \hat F W$ with W `[k o i]`; its matrix is formed only
where it is small. k group, o output, i input.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

Action = Callable[[Tensor], Tensor]
"""A symmetric linear map of matrices `[k o i]`."""

FORMED = 512
"""Unknowns up to which the matrix itself is formed."""

CYCLES = 30
"""Restarts of the Lanczos iteration, of which few blocks need more than three."""


def leading(act: Action, like: Tensor, count: int, scale: float) -> Tensor:
    r"""The algebraically largest eigenvalues of $\hat F$, falling; as many as `count` or as there are.

    NaN where the iteration does not converge.

    Args:
        act: $W \mapsto \hat F W$.
        like: a matrix `[k o i]`, for its shape and precision.
        count: how many.
        scale: the size of the largest, roughly.
    """
    count = min(count, like.numel())
    if like.numel() <= FORMED:
        return torch.linalg.eigvalsh(_formed(act, like)).flip(0)[:count]
    return _lanczos(act, like, count, scale)


def leading_of_gram(gram: Tensor, unknowns: int, count: int) -> Tensor:
    """The same of `F = UUᵀ` on so many unknowns, from the small `UᵀU`: beside its eigenvalues there are only zeros."""
    found = torch.linalg.eigvalsh(gram.double()).clamp(min=0).flip(0)[:unknowns]
    return torch.cat([found, found.new_zeros(max(0, unknowns - len(found)))[:count]])[:count]


def relative_distance(found: Tensor, true: Tensor) -> float:
    """`‖found − true‖ / ‖true‖`; NaN where there is nothing to compare with."""
    return float((found - true).norm() / true.norm())


def angle(x: Tensor, y: Tensor) -> float:
    """Degrees between two tensors taken as vectors, exact for small ones; NaN where one of them is zero."""
    x, y = (v.double().flatten() / v.double().norm() for v in (x, y))
    return math.degrees(2 * math.atan2(float((x - y).norm()), float((x + y).norm())))


# ------------------------------------------------------------------------------------------------------------ parts


def _formed(act: Action, like: Tensor) -> Tensor:
    """The matrix `[d d]`, in double precision."""
    units = torch.eye(like.numel(), dtype=like.dtype).reshape(-1, *like.shape)
    matrix = torch.stack([act(unit).flatten() for unit in units]).double()
    return (matrix + matrix.mT) / 2


def _lanczos(act: Action, like: Tensor, count: int, scale: float) -> Tensor:
    """By implicitly restarted Lanczos, from a fixed start.

    `I + F̂/scale` instead of F̂: an iteration asked for relative accuracy would otherwise never be done with
    eigenvalues next to zero, and this is exact to the same share of the largest for all.
    """
    size, dtype = like.numel(), like.new_empty(0).numpy().dtype

    def shifted(v: np.ndarray) -> np.ndarray:
        W = torch.from_numpy(np.ascontiguousarray(v, dtype=dtype)).reshape(like.shape)
        return v + act(W).flatten().numpy() / dtype.type(scale)

    start = np.random.default_rng(0).standard_normal(size).astype(dtype)
    operator = LinearOperator((size, size), matvec=shifted, dtype=dtype)
    try:
        found = eigsh(operator, count, which="LA", v0=start, tol=1e-4, maxiter=CYCLES, return_eigenvectors=False)
    except ArpackNoConvergence:
        return torch.full((count,), math.nan, dtype=torch.float64)
    return (torch.from_numpy(found.astype(np.float64)) - 1) * scale
