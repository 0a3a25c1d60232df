r"""Nearest Kronecker products and sums, in the Frobenius norm: leading singular triplets of the rearranged block.

Golub & Kahan 1965: from a start v the bidiagonalisation $Z q_j = \beta_{j-1} p_{j-1} + \alpha_j p_j$,
$Z^\top p_j = \alpha_j q_j + \beta_j q_{j+1}$ spans the same space as power iteration and uses all of it. Without
reorthogonalisation converged triplets come back as copies; it is done in full on the q, where orthogonality of the p
follows (Simon & Zha 2000), and only the q are kept. Steps are a fixed number, as nothing may depend on values; a space
that is exhausted before goes on as zeros.

k group, r term.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn.linalg import kron
from fisherfn.linalg.kron import Pair
from fisherfn.linalg.rearranged import Element, Rearranged
from fisherfn.linalg.solve import psd_eigh


class Triplet(NamedTuple):
    """A singular triplet as `u vᵀ` with `u = Z v`, v of length 1; how far it is from one, relative to σ."""

    u: Element
    v: Element
    residual: Float[Tensor, ""]


def leading(Z: Rearranged, steps: int, rank: int = 1) -> tuple[Triplet, ...]:
    """The `rank` leading triplets by so many steps of Golub–Kahan, at least as many as triplets."""
    alphas, betas, Q = _bidiagonal(Z, steps)
    B = torch.diag_embed(torch.stack(alphas, -1)) + torch.diag_embed(torch.stack(betas[:-1], -1), 1)
    sound = torch.isfinite(B).all()
    P_B, sigma, Q_Bt = torch.linalg.svd(torch.where(sound, B, torch.eye(steps, dtype=B.dtype, device=B.device)))
    triplets = []
    for r in range(rank):
        v = _combined(Q, Q_Bt[:, r])
        residual = betas[-1] * P_B[:, -1, r].abs() * _inverse(sigma[:, r], sigma[:, 0])
        triplets.append(Triplet(torch.where(sound, Z.left(v), torch.nan), v, residual.amax()))
    return tuple(triplets)


def as_pair(Z: Rearranged, triplet: Triplet) -> Pair:
    """`u vᵀ` as a Kronecker product in canonical scale: both factors of norm √σ, their sign such that tr G ≥ 0."""
    sigma = _norm(triplet.u, Z.left_metric)
    share = torch.where(sigma > 0, sigma.rsqrt(), 0.0)
    return oriented(Z.pair(kron.times(triplet.u, share), kron.times(triplet.v, share * sigma)))


def oriented(pair: Pair) -> Pair:
    """The sign that makes a leading pair PSD: neither factor alone has one."""
    sign = torch.where(kron.diagonal(pair.G).sum(-1) < 0, -1.0, 1.0)
    return Pair(kron.times(pair.A, sign), kron.times(pair.G, sign))


def recompressed(pairs: Sequence[Pair], weights: Sequence[Tensor], rank: int) -> tuple[Pair, ...]:
    r"""The best sum of `rank` Kronecker products for $\sum_r w_r\, G_r \otimes A_r$: an average of operators, exactly.

    With the Gram matrices of the A and of the G, as many rows as there are terms, $H = K_G^{1/2}$ and
    $M = \mathrm{diag}(w)$: eigenpairs (σ², y) of $H M K_A M H$ give the coefficients $c = M H y / \sigma$ of the A and
    $d = M K_A c / \sigma$ of the G. Averaging factor by factor is not this, and a free sign of the second pair would
    cancel it.
    """
    A, G = (torch.stack([getattr(pair, side) for pair in pairs], 1) for side in ("A", "G"))
    K_A, K_G = _gram(A), _gram(G)
    M = torch.stack([w.to(K_A.dtype).expand(K_A.shape[0]) for w in weights], -1)
    root = psd_eigh(K_G)
    H = (root.vectors * root.values.sqrt().unsqueeze(-2)) @ root.vectors.mT
    MH = M.unsqueeze(-1) * H
    squares = psd_eigh(MH.mT @ K_A @ MH)
    sound = torch.where(root.ok & squares.ok, 1.0, torch.nan)
    sigma, y = squares.values[:, -rank:].sqrt(), squares.vectors[..., -rank:]
    inverse = torch.where(sigma > 0, 1 / sigma, 0.0).unsqueeze(-2)
    c = (MH @ y) * inverse
    d = M.unsqueeze(-1) * (K_A @ c) * inverse
    half = (sigma.sqrt() * sound).unsqueeze(-2)
    mixed_A, mixed_G = _mixed(A, c * half), _mixed(G, d * half)
    return tuple(oriented(Pair(mixed_A[:, -r], mixed_G[:, -r])) for r in range(1, rank + 1))


def _gram(factors: Float[Tensor, "k r *d"]) -> Float[Tensor, "k r r"]:
    """`⟨F_r, F_q⟩`, the sums of rows in float64."""
    if factors.ndim == 3:
        return factors.double() @ factors.double().mT
    by_row = factors.transpose(1, 2)
    return (by_row @ by_row.mT).double().sum(1)


def _mixed(factors: Float[Tensor, "k r *d"], c: Float[Tensor, "k r q"]) -> Float[Tensor, "k q *d"]:
    """`Σ_r c_rq F_r`."""
    flat = c.mT.to(factors.dtype) @ factors.flatten(2)
    return flat.reshape(*flat.shape[:2], *factors.shape[2:])


def _bidiagonal(Z: Rearranged, steps: int) -> tuple[list[Tensor], list[Tensor], list[Element]]:
    """α, β and the q of so many steps; α and β in float64."""
    length = _norm(Z.start, Z.right_metric)
    q = kron.times(Z.start, _inverse(length, length))  # zero for zero statistics
    Q, alphas, betas = [q], [], []
    p = largest = None
    for _ in range(steps):
        p = Z.left(q) if p is None else Z.left(q) - kron.times(p, betas[-1])
        alpha = _norm(p, Z.left_metric)
        largest = alpha if largest is None else torch.maximum(largest, alpha)
        p = kron.times(p, _inverse(alpha, largest))
        r = Z.right(p)
        basis = torch.stack(Q)
        for _ in range(2):  # against all q, the last one among them; twice is enough
            parts = (basis * Z.right_metric(r)).double().flatten(2).sum(-1).to(basis.dtype)
            r = r - (basis * parts.reshape(*parts.shape, *[1] * (r.ndim - 1))).sum(0)
        beta = _norm(r, Z.right_metric)
        q = kron.times(r, _inverse(beta, largest))
        alphas.append(alpha)
        betas.append(beta)
        Q.append(q)
    return alphas, betas, Q[:-1]


def _norm(x: Element, metric: Callable[[Element], Element]) -> Float[Tensor, " k"]:
    return kron.dot(x, metric(x)).clamp(min=0).sqrt()


def _inverse(x: Tensor, largest: Tensor) -> Tensor:
    """1/x, and 0 where x is rounding beside the largest: there the space is exhausted."""
    return torch.where(x > 1e-6 * largest, 1 / x, 0.0)


def _combined(Q: Sequence[Element], y: Float[Tensor, "k j"]) -> Element:
    return torch.stack([kron.times(q, y[:, j]) for j, q in enumerate(Q)]).sum(0)
