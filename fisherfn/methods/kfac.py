r"""K-FAC: the Fisher block of a layer as one Kronecker product, $F \approx G \otimes A$.

$$A = \frac1N \sum_{n,t} a_{nt} a_{nt}^\top, \qquad G = \frac1{NT} \sum_{n,s,t} g_{snt} g_{snt}^\top$$

The approximation is exact if $aa^\top$ and $gg^\top$ are independent and, for shared positions with "expand", if
positions are independent and identically distributed. Scale: $G \otimes A$ is in the units of the Fisher of the mean
negative log-likelihood; the number of positions T is in A. In a sum of terms, NT is the number of all g: terms may
differ in T, and examples of a term without the layer have no g.

Martens & Grosse 2015, *Optimizing neural networks with Kronecker-factored approximate curvature*, sections 3 and 6.3;
Grosse & Martens 2016 for shared positions; running average as in section 5 of the first.

k group, s sample, n example, t position, i input, o output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fisherfn.errors import unknown
from fisherfn.linalg.kron import DIAGONAL_ABOVE, Pair
from fisherfn.methods.kronecker import DampingForm, OneTerm
from fisherfn.taps import AnyTap

Sharing = Literal["expand", "reduce"]
SHARINGS = ("expand", "reduce")


@dataclass(frozen=True)
class KFAC(OneTerm):
    """K-FAC: one Kronecker product of second moments per block. Built by `ff.kfac`, which has the arguments."""

    name = "kfac"
    fit_passes = 1
    sharing: Sharing | str = "expand"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sharing not in SHARINGS:
            raise unknown("sharing", self.sharing, SHARINGS)

    def estimate(self, tap: AnyTap, previous: Pair) -> Pair:
        """Return A and G of one batch."""
        del previous
        if self.sharing == "reduce":
            return reduced(tap, self.diagonal_above)
        return moments(tap, self.diagonal_above)


def kfac(
    damping_form: DampingForm | str = "factored",
    sharing: Sharing | str = "expand",
    diagonal_above: int = DIAGONAL_ABOVE,
) -> KFAC:
    """Build K-FAC: one Kronecker product of second moments per block.

    Args:
        damping_form: "factored" damps each factor, with π distributing λ between them. It adds
            `π√λ G⊗I + √λ/π I⊗A + λI`, more than λI, and costs one Cholesky factorisation per factor. "eigen" adds
            exactly λI and costs one eigendecomposition per factor, 3 to 4 times as much.
        sharing: the assumption about positions that share a weight (sequence, pixels). "expand" treats every position
            as independent. "reduce" uses only the mean input and the sum of output-gradients (cheaper; exact if
            output-gradients are equal at all positions, as below a mean over them).
        diagonal_above: a factor wider than this is kept as its diagonal, such as that of a vocabulary. The input
            factor of an embedding is diagonal at any width: exactly with "expand", as an approximation with "reduce".

    Raises:
        UnknownNameError: an unknown damping form or sharing.
        HyperparameterError: a negative width.
    """
    return KFAC(damping_form, diagonal_above, sharing)


def moments(tap: AnyTap, limit: int = DIAGONAL_ABOVE) -> Pair:
    """Return A and G with every position independent: `F ≈ Σ_t E[aaᵀ] ⊗ mean_t E[ggᵀ]`."""
    return Pair(tap.input_moment(limit) / tap.sizes.n, tap.output_moment(limit) / tap.output_rows())


def reduced(tap: AnyTap, limit: int = DIAGONAL_ABOVE) -> Pair:
    """Return the second moments of the mean input and of the sum of output-gradients over positions."""
    A = tap.input_moment(limit, summed=True) / tap.sizes.n
    G = tap.output_moment(limit, summed=True) / tap.output_rows(summed=True)
    return Pair(A, G)
