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
from functools import partial

from torch import Tensor

from fisherfn.base import Method
from fisherfn.linalg.kron import DIAGONAL_ABOVE, Pair
from fisherfn.linalg.vanloan import leading, recompressed
from fisherfn.methods.kronecker import DampingForm, Fit, checked_steps, iterated, one_term

ITERATIONS = 4


def kpsvd(
    damping_form: DampingForm | str = "factored", iterations: int = ITERATIONS, diagonal_above: int = DIAGONAL_ABOVE
) -> Method:
    """Build KPSVD: the best Kronecker approximation of each block.

    Args:
        damping_form: see `kfac`; the two methods compare at matched damping.
        iterations: Golub–Kahan steps, each one application of Z and one of its transpose.
        diagonal_above: a factor wider than this is diagonal; the product is the best one of this form.

    Raises:
        UnknownNameError: an unknown damping form.
        HyperparameterError: no iteration, or a negative width.
    """
    fit = Fit(partial(leading, steps=checked_steps(iterations, least=1)), start, blend)
    return one_term("kpsvd", iterated(fit), damping_form, diagonal_above)


def start(previous: Pair) -> tuple[Pair]:
    """Start from the previous product."""
    return (previous,)


def blend(old: Sequence[Pair], new: Sequence[Pair], rho: Tensor) -> list[Pair]:
    """Return the best product for `ρ old + (1 − ρ) new` of each block."""
    return [pair for (pair,) in recompressed(list(zip(old, new, strict=True)), [rho, 1 - rho], rank=1)]
