r"""Deflation: the nearest sum of two Kronecker products, one after the other.

KPSVD of F gives the first term; KPSVD of what is left, $F - G_1 \otimes A_1$, the second. In exact arithmetic these
are the two leading singular triplets of the rearranged block, the same as Lanczos finds at once. The residual block is
never formed: as $\sigma u = Z v$, it is $Z' = Z (I - v v^\top)$, which is Z among all that is orthogonal to v. The
second iteration starts from the first one's runner-up and takes half as many steps.

Scale and running average: as Lanczos.

Koroko et al. 2022, section 3.2.
"""

from __future__ import annotations

from functools import partial

from fisherfn.base import Diagnostics, Method, whole_mean
from fisherfn.linalg import kron
from fisherfn.linalg.damped import FLOOR
from fisherfn.linalg.kron import DIAGONAL_ABOVE, Sum
from fisherfn.linalg.rearranged import rearranged
from fisherfn.linalg.vanloan import as_pair, leading
from fisherfn.methods.kronecker import DampingForm, checked_steps, two_terms
from fisherfn.methods.lanczos import blend
from fisherfn.taps import AnyTap, Mean

ITERATIONS = 5


def deflation(
    damping_form: DampingForm | str = "factored",
    iterations: int = ITERATIONS,
    floor: float = FLOOR,
    diagonal_above: int = DIAGONAL_ABOVE,
) -> Method:
    """Deflation; the arguments are those of `lanczos`, `iterations` those of the first term."""
    steps = checked_steps(iterations, least=2)
    return two_terms("deflation", partial(estimate, iterations=steps), blend, damping_form, floor, diagonal_above)


def estimate(
    tap: AnyTap, previous: Sum, mean: Mean = whole_mean, iterations: int = ITERATIONS
) -> tuple[Sum, Diagnostics]:
    """Two leading triplets, the second of the deflated block."""
    guess = previous.first.G + previous.second.G
    Z = rearranged(tap, kron.forms_of(previous.first), guess, mean, mean is whole_mean)
    first, runner_up = leading(Z, iterations, rank=2)
    (second,) = leading(Z, (iterations + 1) // 2, after=(first, runner_up))
    residuals = {"residual": first.residual, "second_residual": second.residual}
    return Sum(as_pair(Z, first), as_pair(Z, second)), residuals
