r"""KPSVD: the best Kronecker approximation of the Fisher block, $\min_{A, G} \|F - G \otimes A\|_F$.

Unlike K-FAC, it does not assume independence: F is rearranged to $Z(F)$, whose leading singular triplet $\sigma, u, v$
gives $A = \sqrt\sigma\, \mathrm{mat}(u)$ and $G = \sqrt\sigma\, \mathrm{mat}(v)$. Both are PSD (Z maps the PSD cone
into itself), with the sign fixed by $\mathrm{tr}\, G > 0$. The per-example gradients already contain all sums over
shared positions, so no factor T appears.

Scale: both factors have Frobenius norm √σ. Running average: the best single product for the average of the operators.

Koroko, Anciaux-Sedrakian, Ben Gharbia, Garès, Haddou & Tran 2022, *Efficient approximations of the Fisher matrix in
neural networks using Kronecker product singular value decomposition*, section 3.1 (which uses power iteration; the
Golub–Kahan steps used here span the same space).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherfn.linalg.golub_kahan import LinearMap, Triplet, leading
from fisherfn.linalg.kron import DIAGONAL_ABOVE, Pair
from fisherfn.linalg.recompression import recompressed
from fisherfn.methods.kronecker import DampingForm, Iterated, OneTerm

ITERATIONS = 4


@dataclass(frozen=True)
class KPSVD(Iterated, OneTerm):
    """KPSVD: the best Kronecker approximation of each block. Built by `ff.kpsvd`, which has the arguments."""

    name = "kpsvd"
    iterations: int = ITERATIONS

    def find(self, Z: LinearMap) -> tuple[Triplet, ...]:
        """Return the leading triplet."""
        return leading(Z, self.iterations)

    def start(self, previous: Pair) -> tuple[Pair]:
        """Start from the previous product."""
        return (previous,)

    def blend_together(self, old: Sequence[Pair], new: Sequence[Pair], rho: Sequence[Tensor]) -> list[Pair]:
        """Return the best product for `ρ old + (1 − ρ) new` of each block."""
        ρ = torch.stack(list(rho))
        return [pair for (pair,) in recompressed(list(zip(old, new, strict=True)), [ρ, 1 - ρ], rank=1)]


def kpsvd(
    damping_form: DampingForm | str = "factored", iterations: int = ITERATIONS, diagonal_above: int = DIAGONAL_ABOVE
) -> KPSVD:
    """Build KPSVD: the best Kronecker approximation of each block.

    Args:
        damping_form: see `kfac`; the two methods compare at matched damping.
        iterations: Golub–Kahan steps, each one application of Z and one of its transpose.
        diagonal_above: a factor wider than this is diagonal; the product is the best one of this form.

    Raises:
        UnknownNameError: an unknown damping form.
        HyperparameterError: no iteration, or a negative width.
    """
    return KPSVD(damping_form, diagonal_above, iterations=iterations)
