"""Damping and inverses of symmetric matrices, batched over groups and safe under `torch.vmap`.

Nothing raises on values: a failed factorisation is a mask, and `cholesky_ex` serves all members of a vmapped step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fisherfn.linalg.kron import Factor, diagonal, is_diagonal


class Inverted(NamedTuple):
    """An inverse, whether it is one, how much was added to the diagonal beyond the damping, and `condition` of it."""

    inverse: Factor
    ok: Bool[Tensor, ""]
    jitter: Float[Tensor, ""]
    condition: Float[Tensor, "k"]


def damped_inverse(matrix: Factor, damping: Float[Tensor, "k"]) -> Inverted:
    r"""$(M + \delta I)^{-1}$ of symmetric PSD matrices by Cholesky, or of diagonals entry by entry.

    The damping is floored at the working precision of M, $\epsilon\,\mathrm{tr} M$: what is smaller than M's own
    rounding cannot make it positive definite. The floor costs nothing, where a ladder of retries costs a
    factorisation a rung (and cannot stop early under vmap); what it added is reported as jitter.
    """
    shift, jitter = floored(matrix, damping)
    if is_diagonal(matrix):
        inverse = (matrix + shift.unsqueeze(-1)).reciprocal()
        return Inverted(inverse, torch.isfinite(inverse.sum()), jitter, spread(inverse))
    factor, failed = torch.linalg.cholesky_ex(add_diagonal(matrix, shift))
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    pivots += pivots == 0  # of a failed factorisation: torch would raise for all that are inverted together
    inverse = torch.cholesky_inverse(factor)
    return Inverted(inverse, (failed == 0).all() & torch.isfinite(inverse.sum()), jitter, condition(factor))


def floored(matrix: Factor, damping: Float[Tensor, " k"]) -> tuple[Float[Tensor, " k"], Float[Tensor, ""]]:
    """The damping, at least the matrix's working precision; and the most that this added."""
    shift = torch.maximum(damping.to(matrix.dtype), torch.finfo(matrix.dtype).eps * diagonal(matrix).sum(-1))
    return shift, (shift - damping).amax()


def condition(factor: Float[Tensor, "*k d d"]) -> Float[Tensor, "*k"]:
    """A lower bound on the condition number of `LLᵀ`: the spread of L's squared diagonal. It costs nothing."""
    return spread(factor.diagonal(dim1=-2, dim2=-1).square())


def spread(values: Float[Tensor, "*k d"]) -> Float[Tensor, "*k"]:
    """The largest over the smallest: the condition number of a diagonal."""
    return values.amax(-1) / values.amin(-1)


def add_diagonal(matrix: Float[Tensor, "k d d"], shift: Float[Tensor, "k"]) -> Float[Tensor, "k d d"]:
    """`M + shift · I` for each matrix of the batch."""
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return matrix + shift[:, None, None] * eye


class Spectrum(NamedTuple):
    """Eigenvalues (ascending, zero where they are rounding noise) and eigenvectors (columns).

    A diagonal's are its entries in their own order, and the identity as a diagonal.
    """

    values: Float[Tensor, "k d"]
    vectors: Factor
    ok: Bool[Tensor, ""]


def eigh(matrix: Float[Tensor, "k d d"]) -> tuple[Float[Tensor, "k d"], Float[Tensor, "k d d"]]:
    """Eigenvalues (ascending) and eigenvectors of finite symmetric matrices, computed in float64.

    In float32 LAPACK's divide and conquer now and then returns NaN for sound matrices of low rank with rows of zeros,
    which is what dead units make of a layer's factors.
    """
    values, vectors = torch.linalg.eigh(matrix.double())
    return values.to(matrix.dtype), vectors.to(matrix.dtype)


def psd_eigh(matrix: Factor) -> Spectrum:
    r"""Eigendecomposition of PSD matrices; a non-finite one counts as not ok and decomposes the identity instead.

    Eigenvalues below $d\,\epsilon\,\lambda_{max}$ are set to zero: their sign and size are rounding, and an inverse
    would blow them up where the damping does not cover them.
    """
    ok = torch.isfinite(matrix.sum())
    if is_diagonal(matrix):
        return Spectrum(torch.where(ok, matrix, 1.0), torch.ones_like(matrix), ok)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    values, vectors = eigh(torch.where(ok, matrix, eye))
    noise = matrix.shape[-1] * torch.finfo(matrix.dtype).eps * values[..., -1:]
    return Spectrum(torch.where(values > noise, values, 0.0), vectors, ok)
