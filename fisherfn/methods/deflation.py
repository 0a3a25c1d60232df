r"""Deflation: the best sum of two Kronecker products, one term after the other.

The first term is KPSVD of F, the second is KPSVD of the residual $F - G_1 \otimes A_1$. In exact arithmetic these are
the two leading singular triplets of the rearranged block, which Lanczos finds in one run. The residual block is never
formed: since $\sigma u = Z v$, it is $Z' = Z (I - v v^\top)$, which equals Z on everything orthogonal to v. The second
iteration starts from the second-best vector of the first one and takes half as many steps.

Scale and running average: see Lanczos.

Koroko et al. 2022, section 3.2.
"""

from __future__ import annotations

from functools import partial

from fisherfn.base import Method
from fisherfn.linalg.damped import FLOOR
from fisherfn.linalg.kron import DIAGONAL_ABOVE
from fisherfn.linalg.rearranged import Rearranged
from fisherfn.linalg.vanloan import Triplet, leading
from fisherfn.methods.kronecker import DampingForm, Fit, checked_steps, iterated, two_terms
from fisherfn.methods.lanczos import blend, start

ITERATIONS = 5


def deflation(
    damping_form: DampingForm | str = "factored",
    iterations: int = ITERATIONS,
    floor: float = FLOOR,
    diagonal_above: int = DIAGONAL_ABOVE,
) -> Method:
    """Build Deflation. See `lanczos` for the arguments; `iterations` are those of the first term."""
    fit = Fit(partial(triplets, iterations=checked_steps(iterations, least=2)), start, blend)
    return two_terms("deflation", iterated(fit), damping_form, floor, diagonal_above)


def triplets(Z: Rearranged, iterations: int = ITERATIONS) -> tuple[Triplet, ...]:
    """Compute two leading triplets, the second from the deflated block."""
    first, runner_up = leading(Z, iterations, rank=2)
    (second,) = leading(Z, (iterations + 1) // 2, after=(first, runner_up))
    return first, second
