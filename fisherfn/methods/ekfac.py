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

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import products
from fisherfn.base import Diagnostics, Updated, factorwise
from fisherfn.equal_shapes import each
from fisherfn.linalg import damped, kron
from fisherfn.linalg.kron import DIAGONAL_ABOVE, Factor, Pair
from fisherfn.linalg.solve import floored, psd_eigh, spread
from fisherfn.methods.kfac import moments
from fisherfn.methods.kronecker import DampingForm, KroneckerMethod, diagonal
from fisherfn.taps import AnyTap
from fisherfn.types import Matrix, PyTree, Shape
from fisherfn.which import Which, includes


class Factors(NamedTuple):
    """The moments of K-FAC, a basis, and the diagonal of the Fisher in it."""

    A: Factor
    G: Factor
    QA: Factor
    QG: Factor
    scale: Float[Tensor, "k o i"]


@dataclass(frozen=True)
class EKFAC(KroneckerMethod):
    """E-KFAC: the eigenvectors of K-FAC with the best eigenvalues. Built by `ff.ekfac`, which has the arguments."""

    name = "ekfac"
    fit_passes = 2
    inverts_updated = True
    joined_up_to = 0  # an inverse shares its basis with the factors, and takes no factorisation

    def init_block(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, damping: Tensor
    ) -> tuple[Factors, damped.Rotated]:
        """Return zero moments and eigenvalues in the standard basis, and I/λ."""
        eye = self.identity(shape, dtype, device)
        zero, scale = kron.zeros(eye), torch.zeros(shape[:3], dtype=dtype, device=device)
        return Factors(zero.A, zero.G, eye.A, eye.G, scale), damped.empty_rotated(eye, damping)

    def estimate(self, tap: AnyTap, previous: Factors) -> Factors:
        """Return moments, basis and eigenvalues of one batch."""
        del previous
        A, G = moments(tap, self.diagonal_above)
        QA, QG = basis(Pair(A, G))
        return Factors(A, G, QA, QG, tap.mean(partial(diagonal, QA=QA, QG=QG)))

    def update_blocks(
        self, old: PyTree, taps: Mapping[str, AnyTap], rho: Mapping[str, Tensor], inverting: Which
    ) -> Updated:
        """Average the moments, recompute their eigenvectors if `inverting`, and average the eigenvalues."""
        news = {key: moments(tap, self.diagonal_above) for key, tap in taps.items()}
        averages = {key: factorwise(Pair(old[key].A, old[key].G), new, rho[key]) for key, new in news.items()}
        changed = {key: pair for key, pair in averages.items() if includes(inverting, key)}
        bases = {key: Pair(old[key].QA, old[key].QG) for key in taps} | each(basis, changed)
        measures = {key: partial(diagonal, QA=Q.A, QG=Q.G) for key, Q in bases.items()}
        scales = next(iter(taps.values())).mean_of_all(taps, measures) if taps else {}
        for key, new in scales.items():
            before = scale_in_new_basis(old[key], *bases[key]) if key in changed else old[key].scale
            scale = torch.lerp(new, before, rho[key].to(new.dtype))
            yield key, Factors(averages[key].A, averages[key].G, bases[key].A, bases[key].G, scale), {}

    def between_passes(self, factors: dict[str, Factors]) -> dict[str, Factors]:
        """Replace the basis by that of the moments; the second pass measures the eigenvalues in it."""
        bases = each(basis, {key: Pair(block.A, block.G) for key, block in factors.items()})
        return {key: block._replace(QA=bases[key].A, QG=bases[key].G) for key, block in factors.items()}

    def invert_block(self, factors: Factors, damping: Float[Tensor, ""]) -> tuple[damped.Rotated, Tensor, Diagnostics]:
        """Return the inverse eigenvalues `1 / (s + added)` in the basis.

        The damping is at least the working precision of what it is added to: eigenvalues that should be zero are
        numerical noise, by which a gradient's own noise would be divided. The increase is reported as jitter.
        """
        added, jitter = (added_by_factors if self.damping_form == "factored" else added_to_scale)(factors, damping)
        denominator = factors.scale + added
        lowest = denominator.amin((1, 2))
        ok = (lowest > 0) & kron.finite(denominator) & (damping >= 0)
        inverse = damped.Rotated(factors.QA, factors.QG, denominator.reciprocal())
        return inverse, ok, {"jitter": jitter, "condition": spread(denominator.flatten(1))}

    def matvec_block(self, factors: Factors, W: Matrix) -> Matrix:
        """Return `Q_G [(Q_Gᵀ W Q_A) ∘ s] Q_Aᵀ`."""
        return damped.apply(damped.Rotated(factors.QA, factors.QG, factors.scale), W)

    def overlap_block(self, factors: Factors, tap: AnyTap) -> tuple[Tensor, Tensor]:
        """Return `⟨F, F̂⟩ = ⟨diag(QᵀFQ), s⟩` and `‖s‖²`."""
        return (diagonal(tap, factors.QA, factors.QG) * factors.scale).sum(), factors.scale.square().sum()

    def trace_block(self, factors: Factors, shape: Shape) -> Float[Tensor, ""]:
        """Return `Σ s`."""
        del shape
        return factors.scale.sum()

    def eigenvalues_block(self, factors: Factors, shape: Shape) -> Float[Tensor, "k o i"]:
        """Return s."""
        del shape
        return factors.scale


def ekfac(damping_form: DampingForm | str = "factored", diagonal_above: int = DIAGONAL_ABOVE) -> EKFAC:
    """Build E-KFAC: the eigenvectors of K-FAC with the best eigenvalues.

    Args:
        damping_form: "eigen" adds λ to the eigenvalues. "factored" adds what K-FAC's factored damping adds to its own,
            `(r + π√λ)(q + √λ/π) − r q`, so that the two methods compare at matched damping.
        diagonal_above: see `kfac`.

    Raises:
        UnknownNameError: an unknown damping form.
        HyperparameterError: a negative width.
    """
    return EKFAC(damping_form, diagonal_above)


def basis(pair: Pair) -> Pair:
    """Return the eigenvectors of both moments."""
    return Pair(psd_eigh(pair.A).vectors, psd_eigh(pair.G).vectors)


def scale_in_new_basis(old: Factors, QA: Factor, QG: Factor) -> Float[Tensor, "k o i"]:
    """Return the diagonal, in a new basis, of a matrix that is diagonal in the old one."""
    scale = _above_noise(old.scale)
    if not kron.is_diagonal(QG):
        scale = _above_noise(_squared_cosines(QG, old.QG) @ scale)
    if not kron.is_diagonal(QA):
        scale = scale @ _squared_cosines(QA, old.QA).mT
    return scale


def _squared_cosines(new: Factor, old: Factor) -> Float[Tensor, "k d d"]:
    """Return the squared cosines between the vectors of two bases; cosines below the working precision are zero."""
    cosines = products.matmul(new.mT, old)
    return torch.where(cosines.abs() > torch.finfo(new.dtype).eps, cosines, 0.0).square()


def _above_noise(scale: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
    """Set mean squares to zero whose roots are numerical noise relative to the largest.

    Otherwise products of noise fall below the smallest normal number, with which processors are many times slower.
    """
    least = torch.finfo(scale.dtype).eps ** 2 * scale.amax((-2, -1), keepdim=True)
    return torch.where(scale > least, scale, 0.0)


Added: TypeAlias = tuple[Float[Tensor, "k *oi"], Float[Tensor, " k"]]
"""The addition of the damping to the eigenvalues, and the jitter in it."""


def added_to_scale(factors: Factors, damping: Float[Tensor, ""]) -> Added:
    """Return λ, at least the working precision of `Σ s`."""
    λ = damping.expand(len(factors.scale))
    shift, jitter = floored(factors.scale.flatten(1), λ)
    return shift.reshape(-1, 1, 1), jitter


def added_by_factors(factors: Factors, damping: Float[Tensor, ""]) -> Added:
    """Return `(r + π√λ)(q + √λ/π) − r q`; each share of λ has the floor that it has in K-FAC."""
    shares = damped.shares(Pair(factors.A, factors.G), damping)
    (shift_A, jitter_A), (shift_G, jitter_G) = map(floored, (factors.A, factors.G), shares)
    r, q = damped.diagonal_in(factors.QA, factors.A), damped.diagonal_in(factors.QG, factors.G)
    shift_A, shift_G = shift_A.unsqueeze(-1), shift_G.unsqueeze(-1)
    added = (shift_G * (r + shift_A)).unsqueeze(-2) + q.unsqueeze(-1) * shift_A.unsqueeze(-2)
    return added, torch.maximum(jitter_A, jitter_G)
