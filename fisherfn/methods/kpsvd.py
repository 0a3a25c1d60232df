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

from functools import partial

from torch import Tensor

from fisherfn.base import Diagnostics, Method, whole_mean
from fisherfn.linalg import kron
from fisherfn.linalg.kron import DIAGONAL_ABOVE, Pair
from fisherfn.linalg.rearranged import rearranged
from fisherfn.linalg.vanloan import as_pair, leading, recompressed
from fisherfn.methods.kronecker import DampingForm, checked_steps, one_term
from fisherfn.taps import AnyTap, Mean

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
    steps = checked_steps(iterations, least=1)
    return one_term("kpsvd", partial(estimate, iterations=steps), blend, damping_form, diagonal_above)


def estimate(
    tap: AnyTap, previous: Pair, mean: Mean = whole_mean, iterations: int = ITERATIONS
) -> tuple[Pair, Diagnostics]:
    """The leading triplet of one batch, started from the previous one; `residual` is ‖Zᵀu − σv‖/σ."""
    Z = rearranged(tap, kron.forms_of(previous), previous.G, mean, mean is whole_mean)
    (triplet,) = leading(Z, iterations)
    return as_pair(Z, triplet), {"residual": triplet.residual}


def blend(old: Pair, new: Pair, rho: Tensor) -> Pair:
    """The best product for `ρ old + (1 − ρ) new`."""
    (pair,) = recompressed([old, new], [rho, 1 - rho], rank=1)
    return pair
