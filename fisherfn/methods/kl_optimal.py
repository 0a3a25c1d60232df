r"""KL-optimal Kronecker factors: the product with the smallest KL divergence from the Fisher block.

$$\min_{A, G}\; \mathrm{KL}\bigl(\mathcal N(0, F) \,\|\, \mathcal N(0, G \otimes A)\bigr) = \min_{A, G}\;
\tfrac12 \bigl[\mathrm{tr}\, F\,(G \otimes A)^{-1} + d_{out} \log\det A + d_{in} \log\det G\bigr] + \mathrm{const}$$

For a fixed G the minimum over A has a closed form, and the reverse. The two are computed in turns (flip-flop):

$$A \leftarrow \frac1{r_G}\, \frac1N \sum_{sn} W_{sn}^\top (G + \delta_G I)^{-1} W_{sn}, \qquad
G \leftarrow \frac1{r_A}\, \frac1N \sum_{sn} W_{sn} (A + \delta_A I)^{-1} W_{sn}^\top,$$

with δ a multiple of the factor's mean eigenvalue and the effective rank $r_M = \mathrm{tr}\, M (M + \delta_M I)^{-1}$.
Without damping, r is the dimension and each half sweep lowers the divergence. With damping, singular factors (a dead
pixel, fewer examples than inputs) keep their zeros and the scale stays right: a block that is one Kronecker product is
recovered in one sweep, for every δ and rank. A large δ gives the factors of Shampoo, $\sum W^\top W$ and
$\sum W W^\top$. Both factors are PSD.

Scale: $\mathrm{tr}\,A / d_{in} = \mathrm{tr}\,G / d_{out}$. Running average: the KL-optimal product for
$\rho\, G_{old} \otimes A_{old} + (1 - \rho) F_{new}$.

Lin, Lowe, Dangel, Eschenhagen, Xu & Grosse 2025, *Understanding and improving Shampoo and SOAP via Kullback-Leibler
minimization*; the flip-flop is that of Dutilleul 1999, *The MLE algorithm for the matrix normal distribution*.

s sample, n example, k group, i input, o output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn.base import Diagnostics
from fisherfn.errors import expect_count, expect_positive
from fisherfn.linalg import kron
from fisherfn.linalg.damped import damped_inverse
from fisherfn.linalg.kron import DIAGONAL_ABOVE, Factor, Pair
from fisherfn.methods.kronecker import DampingForm, OneTerm
from fisherfn.rearrangement.matrices import matrix_map
from fisherfn.taps import AnyTap

ITERATIONS = 4
RELATIVE_DAMPING = 0.1


@dataclass(frozen=True)
class KLOptimal(OneTerm):
    """The Kronecker product with the smallest KL divergence. Built by `ff.kl_optimal`, which has the arguments."""

    name = "kl_optimal"
    iterations: int = ITERATIONS
    relative_damping: float = RELATIVE_DAMPING

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_count("iterations", self.iterations)
        expect_positive("relative_damping", self.relative_damping)

    def estimate(self, tap: AnyTap, previous: Pair) -> Pair:
        """Return A and G of one batch; `previous` starts the flip-flop."""
        return self._fitted(tap, previous, torch.zeros((), dtype=previous.A.dtype, device=previous.A.device))[0]

    def update_block(self, old: Pair, tap: AnyTap, rho: Tensor, inverting: bool) -> tuple[Pair, Diagnostics]:
        """Fit the average of the old product and the new block."""
        del inverting
        return self._fitted(tap, old, rho)

    def _fitted(self, tap: AnyTap, old: Pair, rho: Float[Tensor, ""]) -> tuple[Pair, Diagnostics]:
        """Return the factors and the relative change of A in the last sweep."""
        Z = matrix_map(tap, kron.forms_of(old), old.G)

        def left(V: Factor) -> Factor:
            return _mixed(old.A, kron.dot(old.G, V), Z.left(V), rho)

        def right(U: Factor) -> Factor:
            return _mixed(old.G, kron.dot(old.A, U), Z.right(U), rho)

        A, G, last = _unit(old.A), old.G, old.A
        for _ in range(self.iterations):
            A, last = _unit(self._half_sweep(left, _unit(G))), A
            G = self._half_sweep(right, A)
        change = ((A - last).flatten(1).norm(dim=1) / A.flatten(1).norm(dim=1)).amax()
        root = kron.diagonal(G).mean(-1).sqrt()  # A has mean eigenvalue 1; both get √(tr G/d_out)
        balanced = Pair(kron.times(A, root), kron.times(G, torch.where(root == 0, 1.0, 1 / root)))
        return balanced, {"residual": change}

    def _half_sweep(self, product: Callable[[Factor], Factor], unit: Factor) -> Factor:
        """Return the best factor of one side for a given one, of mean eigenvalue 1, of the other side."""
        inverse, ok, _, _ = damped_inverse(unit, unit.new_full(unit.shape[:1], self.relative_damping))
        inverse = kron.where(ok, inverse, torch.nan)
        return kron.times(product(inverse), 1 / kron.dot(unit, inverse))


def kl_optimal(
    damping_form: DampingForm | str = "factored",
    iterations: int = ITERATIONS,
    relative_damping: float = RELATIVE_DAMPING,
    diagonal_above: int = DIAGONAL_ABOVE,
) -> KLOptimal:
    """Build the method of KL-optimal Kronecker factors.

    Args:
        damping_form: see `kfac`; the two methods compare at matched damping.
        iterations: sweeps, each one update of A and one of G.
        relative_damping: damping of the factors inside the iteration, relative to their mean eigenvalues. It bounds
            the weight of directions in which no example has a gradient. The damping λ of a step comes in addition.
        diagonal_above: a factor wider than this is diagonal; the product is the best one of this form.

    Raises:
        UnknownNameError: an unknown damping form.
        HyperparameterError: no iteration, a damping that is not positive, or a negative width.
    """
    return KLOptimal(damping_form, diagonal_above, iterations, relative_damping)


def _mixed(old: Factor, weight: Float[Tensor, " k"], new: Factor, rho: Float[Tensor, ""]) -> Factor:
    """Return `ρ weight · old + (1 − ρ) new`."""
    return torch.lerp(new, kron.times(old, weight), rho.to(new.dtype))


def _unit(M: Factor) -> Factor:
    """Divide a factor by its mean eigenvalue; one of zeros or denormal numbers becomes the identity."""
    mean = kron.diagonal(M).mean(-1)
    empty = (mean < torch.finfo(M.dtype).tiny).reshape(-1, *[1] * (M.ndim - 1))
    eye = torch.ones_like(M) if kron.is_diagonal(M) else torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    return torch.where(empty, eye, M / torch.where(empty, 1.0, mean.reshape(empty.shape)))
