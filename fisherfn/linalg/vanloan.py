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
from fisherfn.linalg.kron import Factor, Pair
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
    K_A, K_G = (_gram([getattr(pair, side) for pair in pairs]) for side in ("A", "G"))
    M = torch.stack([w.to(K_A.dtype).expand(K_A.shape[0]) for w in weights], -1)
    root = psd_eigh(K_G)
    H = (root.vectors * root.values.sqrt().unsqueeze(-2)) @ root.vectors.mT
    MH = M.unsqueeze(-1) * H
    squares = psd_eigh(MH.mT @ K_A @ MH)
    sound = torch.where(root.ok & squares.ok, 1.0, torch.nan)
    found = []
    for r in range(1, rank + 1):
        sigma, y = squares.values[:, -r].sqrt(), squares.vectors[..., -r]
        inverse = torch.where(sigma > 0, 1 / sigma, 0.0)
        c = (MH @ y.unsqueeze(-1)).squeeze(-1) * inverse.unsqueeze(-1)
        d = M * (K_A @ c.unsqueeze(-1)).squeeze(-1) * inverse.unsqueeze(-1)
        half = (sigma.sqrt() * sound).unsqueeze(-1)
        found.append(oriented(Pair(_mixed([p.A for p in pairs], c * half), _mixed([p.G for p in pairs], d * half))))
    return tuple(found)


def _gram(factors: Sequence[Factor]) -> Float[Tensor, "k r q"]:
    dots = {(r, q): kron.dot(factors[r], factors[q]) for r in range(len(factors)) for q in range(r + 1)}
    rows = [[dots[max(r, q), min(r, q)] for q in range(len(factors))] for r in range(len(factors))]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def _mixed(factors: Sequence[Factor], c: Float[Tensor, "k r"]) -> Factor:
    return torch.stack([kron.times(factor, c[:, r]) for r, factor in enumerate(factors)]).sum(0)


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
