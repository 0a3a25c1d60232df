r"""Lanczos: the nearest sum of two Kronecker products, $\min \|F - G_1 \otimes A_1 - G_2 \otimes A_2\|_F$, at once.

The two leading singular triplets of the rearranged block Z(F), from one run of Golub–Kahan bidiagonalisation with full
reorthogonalisation. The first pair is PSD; as $\langle A_1, A_2 \rangle = 0$, the second is not, and the sum may have
negative eigenvalues: `fisherfn.linalg.damped` says how it is solved.

Scale: a term's factors both have Frobenius norm √σ. Running average: the best two terms for the average of the
operators.

Koroko et al. 2022, section 3.2, which runs two steps and restarts; two steps find the second triplet only by chance.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from fisherfn.base import Diagnostics, Method, whole_mean
from fisherfn.linalg import kron
from fisherfn.linalg.damped import FLOOR
from fisherfn.linalg.kron import DIAGONAL_ABOVE, Sum
from fisherfn.linalg.rearranged import rearranged
from fisherfn.linalg.vanloan import as_pair, leading, recompressed
from fisherfn.methods.kronecker import DampingForm, checked_steps, two_terms
from fisherfn.taps import AnyTap, Mean

ITERATIONS = 8


def lanczos(
    damping_form: DampingForm | str = "factored",
    iterations: int = ITERATIONS,
    floor: float = FLOOR,
    diagonal_above: int = DIAGONAL_ABOVE,
) -> Method:
    """Lanczos.

    Args:
        damping_form: "factored" damps the leading term as K-FAC is damped; "eigen" adds λI in the leading term's
            eigenvectors, where the second term is its diagonal.
        iterations: Golub–Kahan steps, each one application of Z and one of its transpose.
        floor: of the denominators 1 + w wᵀ; info.diagnostics["clipped"] counts those below.
        diagonal_above: a factor wider than this is a diagonal, and the sum the nearest among such.

    Raises:
        UnknownNameError: another damping form.
        HyperparameterError: fewer than two iterations, a floor outside (0, 1], a negative width.
    """
    steps = checked_steps(iterations, least=2)
    return two_terms("lanczos", partial(estimate, iterations=steps), blend, damping_form, floor, diagonal_above)


def estimate(
    tap: AnyTap, previous: Sum, mean: Mean = whole_mean, iterations: int = ITERATIONS
) -> tuple[Sum, Diagnostics]:
    """The two leading triplets of one batch; started from the sum of the previous ones, as one alone would not do."""
    guess = previous.first.G + previous.second.G
    Z = rearranged(tap, kron.forms_of(previous.first), guess, mean, mean is whole_mean)
    first, second = leading(Z, iterations, rank=2)
    residuals = {"residual": first.residual, "second_residual": second.residual}
    return Sum(as_pair(Z, first), as_pair(Z, second)), residuals


def blend(old: Sum, new: Sum, rho: Tensor) -> Sum:
    """The best two terms for `ρ old + (1 − ρ) new`."""
    return Sum(*recompressed([*old, *new], [rho, rho, 1 - rho, 1 - rho], rank=2))
