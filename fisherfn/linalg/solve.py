"""The floor of a damping and the spectra of symmetric matrices, batched over groups and safe under `torch.vmap`.

Invalid values do not raise: they set a mask, which works for all members of a vmapped step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fisherfn import masked
from fisherfn.linalg import kron
from fisherfn.linalg.kron import Factor, diagonal, is_diagonal


def floored(
    matrix: Factor, damping: Float[Tensor, " k"], precision: torch.dtype | None = None
) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """Return the damping, at least the working precision of the matrix (its type's, or another), and the increase."""
    eps = torch.finfo(precision or matrix.dtype).eps
    shift = torch.maximum(damping.to(matrix.dtype), eps * diagonal(matrix).sum(-1))
    return shift, shift - damping


def condition(factor: Float[Tensor, "*k d d"]) -> Float[Tensor, "*k"]:
    """Return a free lower bound on the condition number of `LLᵀ`: the spread of the squared diagonal of L."""
    return spread(factor.diagonal(dim1=-2, dim2=-1).square())


def spread(values: Float[Tensor, "*k d"]) -> Float[Tensor, "*k"]:
    """Return the ratio of the largest to the smallest value: the condition number of a diagonal."""
    return values.amax(-1) / values.amin(-1)


def add_diagonal(matrix: Float[Tensor, "k d d"], shift: Float[Tensor, "k"]) -> Float[Tensor, "k d d"]:
    """Return `M + shift · I` for each matrix of the batch."""
    diagonal_of = matrix.diagonal(dim1=-2, dim2=-1)
    return matrix.diagonal_scatter(diagonal_of + shift[:, None], dim1=-2, dim2=-1)


class Spectrum(NamedTuple):
    """Eigenvalues (ascending, numerical noise set to zero) and eigenvectors (columns).

    For a diagonal they are its entries in their own order, and the identity as a diagonal.
    """

    values: Float[Tensor, "k d"]
    vectors: Factor
    ok: Bool[Tensor, " k"]


def eigh(matrix: Float[Tensor, "k d d"]) -> tuple[Float[Tensor, "k d"], Float[Tensor, "k d d"]]:
    r"""Compute eigenvalues (ascending) and eigenvectors of finite symmetric matrices, in their own precision.

    In float32, LAPACK's divide and conquer fails, with an error or with NaN, for many valid matrices of low rank with
    rows of zeros, such as the factors of layers with dead units. So it gets the matrix $HMH$, with the reflection
    $H = I - 2 v v^\top$ along a generic v. This matrix has the same eigenvalues, no row of zeros, and the eigenvectors
    $HQ$; a product with H takes O(d²). If LAPACK fails all the same, the decomposition is repeated in float64, which
    takes twice as long. A compiled step cannot repeat it; its masks refuse NaN.
    """
    if matrix.dtype == torch.float64:
        return torch.linalg.eigh(matrix)  # type: ignore[no-any-return]
    try:
        values, vectors = _reflected_eigh(matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return _eigh64(matrix)
    failed = masked.readable(vectors) and not torch.isfinite(vectors.sum())
    return _eigh64(matrix) if failed else (values, vectors)


def _reflected_eigh(matrix: Float[Tensor, "k d d"]) -> tuple[Float[Tensor, "k d"], Float[Tensor, "k d d"]]:
    """Decompose `HMH = M − 2 v uᵀ − 2 u vᵀ` with `u = Mv − (vᵀMv) v`, and reflect its eigenvectors."""
    ramp = torch.arange(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    v = 1.1 + torch.cos(ramp * ramp)
    v = (v / v.norm()).unsqueeze(-1)
    u = matrix @ v
    u = u - v * (v.mT @ u)
    twice = 2 * v
    values, vectors = torch.linalg.eigh(matrix - twice @ u.mT - u @ twice.mT)
    return values, vectors - twice @ (v.mT @ vectors)


def _eigh64(matrix: Float[Tensor, "k d d"]) -> tuple[Float[Tensor, "k d"], Float[Tensor, "k d d"]]:
    values, vectors = torch.linalg.eigh(matrix.double())
    return values.to(matrix.dtype), vectors.to(matrix.dtype)


NOISE = 2.0
"""Rounding errors of a second moment, in units of its precision and its largest eigenvalue: measured 0.5 at most."""


def denoised(matrix: Factor) -> Factor:
    """Return a PSD matrix in float64 without the rounding errors of its own type: such eigenvalues are zero.

    In float64 alone they would look like curvature that a small damping amplifies. Matrices that are not finite stay.
    """
    ok = kron.finite(matrix)
    if matrix.dtype == torch.float64 or is_diagonal(matrix):
        return matrix.double()
    eye = torch.eye(matrix.shape[-1], dtype=torch.float64, device=matrix.device)
    values, vectors = torch.linalg.eigh(kron.where(ok, matrix.double(), eye))
    noise = NOISE * torch.finfo(matrix.dtype).eps * values[..., -1:]
    clean = (vectors * torch.where(values > noise, values, 0.0).unsqueeze(-2)) @ vectors.mT
    return kron.where(ok, clean, matrix.double())


def psd_eigh(matrix: Factor) -> Spectrum:
    r"""Decompose PSD matrices; for a non-finite one, set the mask and decompose the identity instead.

    Eigenvalues below $d\,\epsilon\,\lambda_{max}$ are set to zero: their sign and size are numerical noise, which an
    inverse would amplify if the damping is small.
    """
    ok = kron.finite(matrix)
    if is_diagonal(matrix):
        return Spectrum(kron.where(ok, matrix, 1.0), torch.ones_like(matrix), ok)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    values, vectors = eigh(kron.where(ok, matrix, eye))
    noise = matrix.shape[-1] * torch.finfo(matrix.dtype).eps * values[..., -1:]
    return Spectrum(torch.where(values > noise, values, 0.0), vectors, ok)
