r"""KPSVD: the nearest Kronecker product to the Fisher block itself, $\min_{A, G} \|F - G \otimes A\|_F$.

K-FAC's independence is not assumed: F is rearranged to $Z(F)$, whose leading singular triplet $\sigma, u, v$ gives
$A = \sqrt\sigma\, \mathrm{mat}(u)$ and $G = \sqrt\sigma\, \mathrm{mat}(v)$. Both are PSD (Z maps the PSD cone into
itself), with the sign fixed by $\mathrm{tr}\, G > 0$. The per-example gradients carry all sums over shared positions
already, so no factor T appears.

Scale: both factors have Frobenius norm √σ. Running average: the best single product for the average of the operators.

Koroko, Anciaux-Sedrakian, Ben Gharbia, Garès, Haddou & Tran 2022, *Efficient approximations of the Fisher matrix in
neural networks using Kronecker product singular value decomposition*, section 3.1 (there by power iteration; here by
the Golub–Kahan steps that walk through the same space).
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
    """KPSVD.

    Args:
        damping_form: as K-FAC's, so that the two compare at matched damping.
        iterations: Golub–Kahan steps, each one application of Z and one of its transpose.
        diagonal_above: a factor wider than this is a diagonal, and the product the nearest among such.

    Raises:
        UnknownNameError: another damping form.
        HyperparameterError: no iteration, or a negative width.
    """
    fit = Fit(partial(leading, steps=checked_steps(iterations, least=1)), start, blend)
    return one_term("kpsvd", iterated(fit), damping_form, diagonal_above)


def start(previous: Pair) -> tuple[Pair]:
    """From the previous product."""
    return (previous,)


def blend(old: Sequence[Pair], new: Sequence[Pair], rho: Tensor) -> list[Pair]:
    """The best product for `ρ old + (1 − ρ) new` of each block."""
    return [pair for (pair,) in recompressed(list(zip(old, new, strict=True)), [rho, 1 - rho], rank=1)]
