r"""E-KFAC: the eigenvectors of K-FAC with the best eigenvalues, $F \approx Q\, \mathrm{diag}(s)\, Q^\top$.

$$Q = Q_G \otimes Q_A, \quad A = Q_A \mathrm{diag}(r) Q_A^\top, \quad G = Q_G \mathrm{diag}(q) Q_G^\top, \qquad
s_{oi} = \frac1N \sum_{sn} (Q_G^\top W_{sn} Q_A)_{oi}^2$$

s is the diagonal of the block in this basis. It is the best diagonal there, so the error is never larger than with
K-FAC's $q r^\top$. PSD by construction.

Scale: s is in the units of the Fisher. Running average: A and G as in K-FAC; the basis is that of the averages. The
average of s is transferred to a new basis as the diagonal, there, of the matrix that it represented:
$(P_G \circ P_G)\, s\, (P_A \circ P_A)^\top$ with $P = Q_{new}^\top Q_{old}$. The basis is recomputed in updates that
are followed by an inversion (`ng.step` with `invert`, and `ng.update` alone), the eigenvalues s in every update.

George, Laurent, Bouthillier, Ballas & Vincent 2018, *Fast approximate natural gradient descent in a Kronecker-factored
eigenbasis*, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import rows
from fisherfn.base import Diagnostics, LayerMethod, Method, factorwise, layerwise, one_by_one
from fisherfn.errors import unknown
from fisherfn.linalg import damped, kron
from fisherfn.linalg.kron import DIAGONAL_ABOVE, Factor, Pair
from fisherfn.linalg.solve import psd_eigh, spread
from fisherfn.methods.kfac import expand
from fisherfn.methods.kronecker import DampingForm, checked_width
from fisherfn.taps import AnyTap, Mean, Moment, Tap, squares
from fisherfn.types import Shape


class Factors(NamedTuple):
    """The moments of K-FAC, a basis, and the diagonal of the Fisher in it."""

    A: Factor
    G: Factor
    QA: Factor
    QG: Factor
    scale: Float[Tensor, "k o i"]


def ekfac(damping_form: DampingForm | str = "factored", diagonal_above: int = DIAGONAL_ABOVE) -> Method:
    """Build E-KFAC: the eigenvectors of K-FAC with the best eigenvalues.

    Args:
        damping_form: "eigen" adds λ to the eigenvalues. "factored" adds what K-FAC's factored damping adds to its own,
            `(r + π√λ)(q + √λ/π) − r q`, so that the two methods compare at matched damping.
        diagonal_above: see `kfac`.

    Raises:
        UnknownNameError: an unknown damping form.
        HyperparameterError: a negative width.
    """
    if damping_form not in ADDED:
        raise unknown("damping form", damping_form, ADDED)
    layer = LayerMethod(
        init=partial(init, limit=diagonal_above),
        update=one_by_one(partial(update, moments=partial(expand, limit=checked_width(diagonal_above)))),
        invert=partial(invert, added=ADDED[damping_form]),
        apply=damped.apply,
        apply_tap=damped.apply_tap,
        matvec=matvec,
        overlap=overlap,
        trace=lambda factors: factors.scale.sum(),
        eigenvalues=lambda factors: factors.scale,
        logdet=damped.logdet,
    )
    return layerwise("ekfac", layer)


def init(
    shape: Shape, dtype: torch.dtype, device: torch.device, damping: Tensor, limit: int
) -> tuple[Factors, damped.Rotated]:
    """Return zero moments and eigenvalues in the standard basis, and I/λ."""
    eye = kron.identity(shape, kron.forms(shape, limit), dtype, device)
    inverse = damped.empty_rotated(eye, damping)
    zero = kron.zeros(eye)
    return Factors(zero.A, zero.G, eye.A, eye.G, torch.zeros(shape[:3], dtype=dtype, device=device)), inverse


def update(
    old: Factors, tap: AnyTap, rho: Tensor, mean: Mean, inverting: bool, moments: Moment = expand
) -> tuple[Factors, Diagnostics]:
    """Average the moments, recompute their eigenvectors if `inverting`, and average the eigenvalues."""
    A, G = factorwise(Pair(old.A, old.G), mean(moments, tap), rho)
    QA, QG = (psd_eigh(A).vectors, psd_eigh(G).vectors) if inverting else (old.QA, old.QG)
    new = mean(partial(diagonal, QA=QA, QG=QG), tap)
    scale = torch.lerp(new, moved(old, QA, QG), rho.to(new.dtype))
    return Factors(A, G, QA, QG, scale), {}


def diagonal(tap: AnyTap, QA: Factor, QG: Factor) -> Float[Tensor, "k o i"]:
    """Return `1/N Σ (Q_Gᵀ W Q_A)²`, the diagonal of the sampled block in a basis."""
    parts = []
    for part in tap.windows():
        a, g = part.to(torch.promote_types(part.g.dtype, torch.float32))
        if not kron.is_diagonal(QA):  # a diagonal's eigenvectors are the standard basis
            a = rows.times(a, QA)
        if not kron.is_diagonal(QG):
            g = g @ QG[:, None, None]
        parts.append(squares(Tap(a, g)))
    return torch.stack(parts).sum(0) / tap.sizes.n


def moved(old: Factors, QA: Factor, QG: Factor) -> Float[Tensor, "k o i"]:
    """Return the diagonal, in a new basis, of a matrix that is diagonal in the old one."""
    scale = old.scale
    if not kron.is_diagonal(QG):
        scale = (QG.mT @ old.QG).square() @ scale
    if not kron.is_diagonal(QA):
        scale = scale @ (QA.mT @ old.QA).square().mT
    return scale


def invert(
    factors: Factors, damping: Float[Tensor, ""], added: Callable[[Factors, Tensor], Tensor]
) -> tuple[damped.Rotated, Tensor, Diagnostics]:
    """Return the inverse eigenvalues `1 / (s + added)` in the basis."""
    denominator = factors.scale + added(factors, damping)
    ok = (denominator > 0).all() & torch.isfinite(denominator.sum())
    inverse = damped.Rotated(factors.QA, factors.QG, denominator.reciprocal())
    return inverse, ok, {"jitter": torch.zeros_like(damping), "condition": spread(denominator.flatten(-2)).amax()}


def added_by_factors(factors: Factors, damping: Float[Tensor, ""]) -> Float[Tensor, "k o i"]:
    """Return `(r + π√λ)(q + √λ/π) − r q`."""
    shift_A, shift_G = (shift.unsqueeze(-1) for shift in damped.shares(Pair(factors.A, factors.G), damping))
    r, q = damped.diagonal_in(factors.QA, factors.A), damped.diagonal_in(factors.QG, factors.G)
    return (shift_G * (r + shift_A)).unsqueeze(-2) + q.unsqueeze(-1) * shift_A.unsqueeze(-2)


ADDED = {"factored": added_by_factors, "eigen": lambda factors, damping: damping}


def matvec(factors: Factors, W: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
    """Return `Q_G [(Q_Gᵀ W Q_A) ∘ s] Q_Aᵀ`."""
    return damped.apply(damped.Rotated(factors.QA, factors.QG, factors.scale), W)


def overlap(factors: Factors, tap: AnyTap) -> tuple[Tensor, Tensor]:
    """Return `⟨F, F̂⟩ = ⟨diag(QᵀFQ), s⟩` and `‖s‖²`."""
    return (diagonal(tap, factors.QA, factors.QG) * factors.scale).sum(), factors.scale.square().sum()
