r"""Deflation: the best sum of two Kronecker products, one term after the other.

The first term is KPSVD of F, the second is KPSVD of the residual $F - G_1 \otimes A_1$. In exact arithmetic these are
the two leading singular triplets of the rearranged block, which Lanczos finds in one run. The residual block is never
formed: since $\sigma u = Z v$, it is $Z' = Z (I - v v^\top)$, which equals Z on everything orthogonal to v. The second
iteration starts from the second-best vector of the first one and takes half as many steps.

Scale and running average: see Lanczos.

Koroko et al. 2022, section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

from fisherfn.linalg.damped import FLOOR
from fisherfn.linalg.golub_kahan import LinearMap, Triplet, leading
from fisherfn.linalg.kron import DIAGONAL_ABOVE
from fisherfn.methods.kronecker import DampingForm
from fisherfn.methods.lanczos import Lanczos

ITERATIONS = 5


@dataclass(frozen=True)
class Deflation(Lanczos):
    """Deflation: Lanczos with its two triplets found one after the other. Built by `ff.deflation`."""

    name = "deflation"
    iterations: int = ITERATIONS

    def find(self, Z: LinearMap) -> tuple[Triplet, ...]:
        """Return two leading triplets, the second from the deflated block."""
        first, runner_up = leading(Z, self.iterations, rank=2)
        (second,) = leading(Z, (self.iterations + 1) // 2, after=(first, runner_up))
        return first, second


def deflation(
    damping_form: DampingForm | str = "factored",
    iterations: int = ITERATIONS,
    floor: float = FLOOR,
    diagonal_above: int = DIAGONAL_ABOVE,
) -> Deflation:
    """Build Deflation. See `lanczos` for the arguments; `iterations` are those of the first term."""
    return Deflation(damping_form, diagonal_above, floor=floor, iterations=iterations)
