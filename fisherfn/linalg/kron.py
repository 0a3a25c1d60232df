"""Kronecker products on matrices: `G ⊗ A` acts as `W ↦ G W A` (A and G symmetric).

A gradient is either a matrix `W` or, cheaper for wide layers, the loss tap whose mean it is:
`∇ = 1/N Σ g aᵀ`, so `L ∇ R = 1/N Σ (L g)(Rᵀ a)ᵀ` gives gradient and products in one go.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn.types import Product, Tap


def matvec(G: Float[Tensor, "k o o"], A: Float[Tensor, "k i i"], W: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
    """`(G ⊗ A) W = G W A`."""
    return G @ W @ A


def pi(A: Float[Tensor, "k i i"], G: Float[Tensor, "k o o"]) -> Float[Tensor, " k"]:
    r"""How the damping is shared out: $\pi = \sqrt{(\mathrm{tr} A / d_{in}) / (\mathrm{tr} G / d_{out})}$.

    It balances the two factors' scales (Martens & Grosse 2015, section 6.3); 1 where a factor is zero.
    """
    a = A.diagonal(dim1=-2, dim2=-1).mean(-1)
    g = G.diagonal(dim1=-2, dim2=-1).mean(-1)
    return torch.where((a > 0) & (g > 0), (a / g).sqrt(), 1.0)


def precondition_tap(G: Float[Tensor, "k o o"], A: Float[Tensor, "k i i"], tap: Tap, inner: bool) -> Product:
    r"""`G ∇ A` for the gradient of a loss tap, by the cheaper route, with ⟨∇, G ∇ A⟩ when asked for.

    Factored, the inner product is the sum of the product of two Gram matrices of rows, so ∇ is never formed.
    """
    g, a = _rows(tap, A.dtype)
    if not _factored_is_cheaper(g, a):
        gradient = g.mT @ a
        matrix = matvec(G, A, gradient)
        return Product(matrix, (gradient * matrix).sum() if inner else ())
    g_hat, a_hat = g @ G, a @ A
    return Product(g_hat.mT @ a_hat, ((g @ g_hat.mT) * (a @ a_hat.mT)).sum() if inner else ())


def rotate_tap(L: Float[Tensor, "k o o"], R: Float[Tensor, "k i i"], tap: Tap) -> Float[Tensor, "k o i"]:
    """`Lᵀ ∇ R` for the gradient of a loss tap, by the cheaper route."""
    g, a = _rows(tap, R.dtype)
    return (g @ L).mT @ (a @ R) if _factored_is_cheaper(g, a) else L.mT @ (g.mT @ a) @ R


def _rows(tap: Tap, dtype: torch.dtype) -> tuple[Float[Tensor, "k rows o"], Float[Tensor, "k rows i"]]:
    """Output-gradients over N and inputs as rows: the gradient is `gᵀ a`."""
    k, s, n, t, o = tap.g.shape
    g = tap.g.sum(1) if s > 1 else tap.g.squeeze(1)
    return g.reshape(k, n * t, o).to(dtype) / n, tap.a.reshape(k, n * t, -1).to(dtype)


def _factored_is_cheaper(g: Tensor, a: Tensor) -> bool:
    """Multiply-adds with M rows: `M(o² + i² + oi)` factored, `Moi + o²i + oi²` as a matrix."""
    rows, o, i = g.shape[1], g.shape[2], a.shape[2]
    return rows * (o * o + i * i) < o * i * (o + i)
