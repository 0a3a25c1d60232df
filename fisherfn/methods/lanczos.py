r"""Lanczos: the nearest sum of two Kronecker products, $\min \|F - G_1 \otimes A_1 - G_2 \otimes A_2\|_F$, at once.

The two leading singular triplets of the rearranged block Z(F), from one run of Golub–Kahan bidiagonalisation with full
reorthogonalisation. The first pair is PSD; as $\langle A_1, A_2 \rangle = 0$, the second is not, and the sum may have
negative eigenvalues: `fisherfn.linalg.damped` says how it is solved.

Scale: a term's factors both have Frobenius norm √σ. Running average: the best two terms for the average of the
operators.

Koroko et al. 2022, section 3.2, which runs two steps and restarts; two steps find the second triplet only by chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from fisherfn.base import Method
from fisherfn.linalg.damped import FLOOR
from fisherfn.linalg.kron import DIAGONAL_ABOVE, Sum
from fisherfn.linalg.vanloan import leading, recompressed
from fisherfn.methods.kronecker import DampingForm, Fit, checked_steps, iterated, two_terms

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
    fit = Fit(partial(leading, steps=checked_steps(iterations, least=2), rank=2), start, blend)
    return two_terms("lanczos", iterated(fit), damping_form, floor, diagonal_above)


def start(previous: Sum) -> Sum:
    """From both previous terms, as one alone would not lead to the second."""
    return previous


def blend(old: Sequence[Sum], new: Sequence[Sum], rho: Tensor) -> list[Sum]:
    """The best two terms for `ρ old + (1 − ρ) new` of each block."""
    sums = [(*before, *now) for before, now in zip(old, new, strict=True)]
    return [Sum(*terms) for terms in recompressed(sums, [rho, rho, 1 - rho, 1 - rho], rank=2)]
