"""The gradient of a layer, as its matrix or as a loss tap, whichever costs less to precondition.

A gradient is either a matrix `W` or, cheaper for wide layers, a loss tap with `∇ = 1/N Σ g aᵀ`. Then
`L ∇ R = 1/N Σ (L g)(Rᵀ a)ᵀ` computes gradient and products at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import products, rows
from fisherfn.linalg.damped import Inverse, rotated_back
from fisherfn.linalg.kron import Factor, Pair, right
from fisherfn.taps import Sizes, Tap
from fisherfn.types import Matrix, Product

Gradient: TypeAlias = Tensor | Tap


class Own(NamedTuple):
    """A gradient `1/N Σ c_sn W_sn` in the examples that were just inverted, and φ, towards which the step is pulled."""

    coefficients: Float[Tensor, "s n"] | None = None
    near: Mapping[str, Matrix] | None = None


NOTHING = Own()


def as_matrix(gradient: Gradient) -> Float[Tensor, "k o i"]:
    """Return a gradient as its matrix."""
    return gradient.mean_gradient() if isinstance(gradient, Tap) else gradient


def tap_is_cheaper(sizes: Sizes) -> bool:
    """Return True if `G ∇ A` is cheaper from M rows, `M(o² + i² + oi)`, than as a matrix, `Moi + o²i + oi²`."""
    m, o, i = sizes.n * sizes.t, sizes.o, sizes.i
    return m * (o * o + i * i) < o * i * (o + i)


def precondition(inverse: Inverse, tap: Tap, inner: bool) -> Product:
    """Multiply the gradient of a loss tap by an inverse, with ⟨∇, nat⟩ if requested."""
    if isinstance(inverse, Pair):
        return _sandwiched(inverse.G, inverse.A, tap, inner)
    g, a = _flat_rows(tap, inverse.QA.dtype)
    rotated = products.product(right(g, inverse.QG).mT, right(a, inverse.QA), 1 / max(tap.sizes.n, 1))  # QGᵀ ∇ QA
    scaled = rotated * inverse.scale
    return Product(rotated_back(inverse, scaled), (rotated * scaled).sum() if inner else ())


def _sandwiched(G: Factor, A: Factor, tap: Tap, inner: bool) -> Product:
    r"""Return `G ∇ A` for the gradient of a loss tap, with ⟨∇, G ∇ A⟩ if requested; ∇ is never formed.

    The inner product is `1/N² Σ (g Gᵀ gᵀ) ∘ (a A aᵀ)` for few rows, else `1/N Σ (g G∇A) ∘ a`.
    """
    g, a = _flat_rows(tap, A.dtype)
    g_hat, a_hat = right(g, G), right(a, A)
    n = max(tap.sizes.n, 1)  # without examples the sum is empty
    W = products.product(g_hat.mT, a_hat, 1 / n)
    if not inner:
        return Product(W, ())
    m, o, i = a.shape[1], g.shape[2], a.shape[2]
    if m * (o + i) < o * i:
        return Product(W, (products.matmul(g, g_hat.mT) * products.matmul(a, a_hat.mT)).sum() / n**2)
    return Product(W, (products.matmul(g, W) * a).sum() / n)


def _flat_rows(tap: Tap, dtype: torch.dtype) -> tuple[Float[Tensor, "k rows o"], Float[Tensor, "k rows i"]]:
    """Return output-gradients and inputs as rows: the gradient is `1/N gᵀ a`."""
    k, s, n, t, o, i = tap.sizes
    g = tap.g.sum(1) if s > 1 else tap.g.squeeze(1)
    return g.reshape(k, n * t, o).to(dtype), rows.dense(tap.a).reshape(k, n * t, i).to(dtype)
