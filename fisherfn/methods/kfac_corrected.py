r"""K-FAC corrected: K-FAC plus the best Kronecker approximation of its residual, $F \approx G \otimes A + D \otimes C$.

A and G are K-FAC's moments; $D \otimes C = \operatorname{argmin} \|F - G \otimes A - D \otimes C\|_F$ is the
leading triplet of the deflated rearrangement $Z'V = ZV - \langle G, V \rangle A$, with the A and G of
the same batch. The sum is indefinite in general.

Scale: A and G as in K-FAC, C and D with Frobenius norm √σ. Running average: A and G factor by factor, as in K-FAC. The
correction is the best single product for the average of the operators minus $\bar G \otimes \bar A$, in which

$$\rho\, G_o \otimes A_o + (1-\rho)\, G_n \otimes A_n - \bar G \otimes \bar A = \rho (1 - \rho)\, (G_o - G_n) \otimes
(A_o - A_n) .$$

Koroko et al. 2022, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherfn.base import factorwise
from fisherfn.linalg.damped import FLOOR
from fisherfn.linalg.golub_kahan import LinearMap, Triplet, leading
from fisherfn.linalg.kron import DIAGONAL_ABOVE, Pair, Sum
from fisherfn.linalg.recompression import recompressed
from fisherfn.methods.kfac import moments
from fisherfn.methods.kronecker import DampingForm, Iterated, TwoTerms
from fisherfn.taps import AnyTap

ITERATIONS = 6


@dataclass(frozen=True)
class KFACCorrected(Iterated, TwoTerms):
    """K-FAC corrected: K-FAC plus one product for its residual. Built by `ff.kfac_corrected`."""

    name = "kfac_cor"
    iterations: int = ITERATIONS

    def known(self, tap: AnyTap) -> Pair:
        """Return the pair of K-FAC."""
        return moments(tap, self.diagonal_above)

    def find(self, Z: LinearMap) -> tuple[Triplet, ...]:
        """Return the leading triplet of the residual."""
        return leading(Z, self.iterations)

    def start(self, previous: Sum) -> tuple[Pair]:
        """Start from the previous correction."""
        return (previous.second,)

    def blend_together(self, old: Sequence[Sum], new: Sequence[Sum], rho: Sequence[Tensor]) -> list[Sum]:
        """Average the pair of K-FAC; return it with the best product for the rest of the averaged operator."""
        pairs = list(zip(old, new, strict=True))
        shifts = [Pair(before.first.A - now.first.A, before.first.G - now.first.G) for before, now in pairs]
        sums = [(before.second, now.second, shift) for (before, now), shift in zip(pairs, shifts, strict=True)]
        ρ = torch.stack(list(rho))
        seconds = recompressed(sums, [ρ, 1 - ρ, ρ * (1 - ρ)], rank=1)
        return [
            Sum(factorwise(before.first, now.first, r), second)
            for (before, now), (second,), r in zip(pairs, seconds, rho, strict=True)
        ]


def kfac_corrected(
    damping_form: DampingForm | str = "factored",
    iterations: int = ITERATIONS,
    floor: float = FLOOR,
    diagonal_above: int = DIAGONAL_ABOVE,
) -> KFACCorrected:
    """Build K-FAC corrected: K-FAC plus one product for its residual. See `lanczos` for the arguments."""
    return KFACCorrected(damping_form, diagonal_above, floor=floor, iterations=iterations)
