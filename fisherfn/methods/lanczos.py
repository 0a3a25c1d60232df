r"""Lanczos: the best sum of two Kronecker products, $\min \|F - G_1 \otimes A_1 - G_2 \otimes A_2\|_F$.

The method computes the two leading singular triplets of the rearranged block Z(F) in one run of Golub–Kahan
bidiagonalisation with full reorthogonalisation. The first pair is PSD; as $\langle A_1, A_2 \rangle = 0$, the second
is not, and the sum may have negative eigenvalues; `fisherfn.linalg.damped` inverts it.

Scale: both factors of a term have Frobenius norm √σ. Running average: the best two terms for the average of the
operators.

Koroko et al. 2022, section 3.2, which runs two steps and restarts. Two steps find the second triplet only by chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherfn.linalg.damped import FLOOR
from fisherfn.linalg.golub_kahan import LinearMap, Triplet, leading
from fisherfn.linalg.kron import DIAGONAL_ABOVE, Sum
from fisherfn.linalg.recompression import recompressed
from fisherfn.methods.kronecker import DampingForm, Iterated, TwoTerms

ITERATIONS = 8


@dataclass(frozen=True)
class Lanczos(Iterated, TwoTerms):
    """Lanczos: the best sum of two Kronecker products. Built by `ff.lanczos`, which has the arguments."""

    name = "lanczos"
    least = 2
    iterations: int = ITERATIONS

    def find(self, Z: LinearMap) -> tuple[Triplet, ...]:
        """Return the two leading triplets."""
        return leading(Z, self.iterations, rank=2)

    def start(self, previous: Sum) -> Sum:
        """Start from both previous terms; the first alone would not lead to the second."""
        return previous

    def blend_together(self, old: Sequence[Sum], new: Sequence[Sum], rho: Sequence[Tensor]) -> list[Sum]:
        """Return the best two terms for `ρ old + (1 − ρ) new` of each block."""
        sums = [(*before, *now) for before, now in zip(old, new, strict=True)]
        ρ = torch.stack(list(rho))
        return [Sum(*terms) for terms in recompressed(sums, [ρ, ρ, 1 - ρ, 1 - ρ], rank=2)]


def lanczos(
    damping_form: DampingForm | str = "factored",
    iterations: int = ITERATIONS,
    floor: float = FLOOR,
    diagonal_above: int = DIAGONAL_ABOVE,
) -> Lanczos:
    """Build Lanczos: the best sum of two Kronecker products for each block.

    Args:
        damping_form: "factored" damps the leading term as K-FAC does. "eigen" adds λI in the eigenvectors of the
            leading term, and replaces the second term by its diagonal there.
        iterations: Golub–Kahan steps, each one application of Z and one of its transpose.
        floor: smallest denominator `1 + w_G w_Aᵀ` of the inverse, where w_G and w_A are the second term's eigenvalues
            relative to the first (`fisherfn.linalg.damped`); info.diagnostics["clipped"] counts those that were raised.
        diagonal_above: a factor wider than this is diagonal; the sum is the best one of this form.

    Raises:
        UnknownNameError: an unknown damping form.
        HyperparameterError: fewer than two iterations, a floor outside (0, 1], a negative width.
    """
    return Lanczos(damping_form, diagonal_above, floor=floor, iterations=iterations)
