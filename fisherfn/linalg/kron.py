"""Kronecker products and their sums, on matrices: `G ⊗ A` acts as `W ↦ G W A` (A and G symmetric).

A factor is a batch of matrices `[k d d]` or, if it is too wide, their diagonals `[k d]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from fisherfn import products
from fisherfn.types import Shape

Factor: TypeAlias = Tensor
"""`[k d d]`, or a diagonal `[k d]`."""


DIAGONAL_ABOVE = 8192
"""Width at which a factor and its inverse take half a gigabyte in single precision."""


class Pair(NamedTuple):
    """One Kronecker product `G ⊗ A`."""

    A: Factor  # input side, [k i i], or its diagonal [k i] if it is wide
    G: Factor  # output side, likewise


class Sum(NamedTuple):
    """`G₁ ⊗ A₁ + G₂ ⊗ A₂`; the second term is indefinite in general."""

    first: Pair
    second: Pair


class Forms(NamedTuple):
    """Flags for the factors of a block that are kept as diagonals."""

    A: bool
    G: bool


def forms(shape: Shape, limit: int = DIAGONAL_ABOVE) -> Forms:
    """Return diagonal forms for factors wider than the limit, and for the input factor of one-hot rows."""
    return Forms(shape.one_hot or shape.i > limit, shape.o > limit)


def forms_of(pair: Pair) -> Forms:
    """Return the forms in which the factors are kept."""
    return Forms(is_diagonal(pair.A), is_diagonal(pair.G))


def zeros(eye: Pair) -> Pair:
    """Return a pair of zeros of the same shapes."""
    return Pair(torch.zeros_like(eye.A), torch.zeros_like(eye.G))


def identity(shape: Shape, form: Forms, dtype: torch.dtype, device: torch.device) -> Pair:
    """Return `I ⊗ I` for a block."""

    def eye(width: int, diagonal: bool) -> Tensor:
        if diagonal:
            return torch.ones(shape.k, width, dtype=dtype, device=device)
        return torch.eye(width, dtype=dtype, device=device).repeat(shape.k, 1, 1)

    return Pair(eye(shape.i, form.A), eye(shape.o, form.G))


def apply(pairs: Sequence[Pair], W: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
    """Return `Σ_r G_r W A_r`."""
    terms = [matvec(pair.G, pair.A, W) for pair in pairs]
    return terms[0] if len(terms) == 1 else torch.stack(terms).sum(0)


def dot(x: Factor, y: Factor) -> Float[Tensor, " k"]:
    """Return `⟨x, y⟩` of two factors kept in the same form, for any scale of theirs; sums of rows are in float64."""
    a, b = peak(x), peak(y)
    by_row = (unit(x, a) * unit(y, b)).sum(-1).double()
    return a * b * (by_row if is_diagonal(x) else by_row.sum(-1))


def peak(x: Factor) -> Float[Tensor, " k"]:
    """Return the largest absolute entry, in float64; 1 for zeros."""
    if not x.shape[1:].numel():
        return x.new_ones(x.shape[0], dtype=torch.float64)
    high, low = x.amax(-1), x.amin(-1)
    while high.ndim > 1:  # axis by axis, which is faster than all at once
        high, low = high.amax(-1), low.amin(-1)
    largest = torch.maximum(high, -low).double()
    return torch.where(largest == 0, 1.0, largest)


def unit(x: Factor, size: Float[Tensor, " k"]) -> Factor:
    """Divide a factor by its largest absolute entry, so that no product of two entries overflows."""
    return x / size.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def inner(xs: Sequence[Pair], ys: Sequence[Pair]) -> Float[Tensor, " k"]:
    """Return the Frobenius inner product of two sums of products: `Σ_rs ⟨A_r, A_s⟩ ⟨G_r, G_s⟩`."""
    return torch.stack([dot(x.A, y.A) * dot(x.G, y.G) for x in xs for y in ys]).sum(0)


def trace(pairs: Sequence[Pair]) -> Float[Tensor, ""]:
    """Return `Σ_r tr A_r tr G_r`, all groups together."""
    return torch.stack([(diagonal(p.A).sum(-1) * diagonal(p.G).sum(-1)).sum() for p in pairs]).sum()


def times(x: Factor, scalar: Float[Tensor, " k"]) -> Factor:
    """Multiply the factor of each group by its own number."""
    return x * scalar.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def where(mask: Bool[Tensor, " k"], x: Factor, other: Tensor | float) -> Factor:
    """Return the factor of each group if its mask is true, else the other matrix or number."""
    return torch.where(mask.reshape(-1, *[1] * (x.ndim - 1)), x, other)


def finite(x: Shaped[Tensor, "k *d"]) -> Bool[Tensor, " k"]:
    """Return for each group whether all its numbers are finite, by their sum."""
    return torch.isfinite(x.sum(tuple(range(1, x.ndim))))


def matvec(G: Factor, A: Factor, W: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
    """Return `(G ⊗ A) W = G W A`."""
    return right(left(G, W), A)


def left(G: Factor, W: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
    """Return `G W`."""
    return G.unsqueeze(-1) * W if is_diagonal(G) else products.matmul(G, W)


def right(W: Float[Tensor, "k o i"], A: Factor) -> Float[Tensor, "k o i"]:
    """Return `W A`."""
    return W * A.unsqueeze(-2) if is_diagonal(A) else products.matmul(W, A)


def transpose(F: Factor) -> Factor:
    """Return `Fᵀ`."""
    return F if is_diagonal(F) else F.mT


def is_diagonal(F: Factor) -> bool:
    """Return True if only the diagonal is kept."""
    return F.ndim == 2


def diagonal(F: Factor) -> Float[Tensor, "k d"]:
    """Return the diagonal of a factor in either form."""
    return F if is_diagonal(F) else F.diagonal(dim1=-2, dim2=-1)
