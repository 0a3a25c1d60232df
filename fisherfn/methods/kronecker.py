"""Common parts of the methods with one or two Kronecker products, which differ in estimation and averaging.

`KroneckerMethod` says how such a method is damped and applied; `OneTerm` and `TwoTerms` have a `Pair` or a `Sum` of two
as factors; `Iterated` finds the terms by iterating on the rearranged block Z.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import gradients, rearrangement, rows
from fisherfn.base import Diagnostics, LayerMethod, Updated
from fisherfn.errors import expect_count, expect_number, unknown
from fisherfn.linalg import damped, kron
from fisherfn.linalg.damped import DAMPING_FORMS, FLOOR
from fisherfn.linalg.golub_kahan import Deflated, LinearMap, Triplet, by_block
from fisherfn.linalg.kron import DIAGONAL_ABOVE, Factor, Pair, Sum
from fisherfn.per_example import squares
from fisherfn.rearrangement.examples import ExampleBlock
from fisherfn.taps import AnyTap, Tap
from fisherfn.types import Matrix, Product, PyTree, Shape
from fisherfn.which import Which

DampingForm = Literal["factored", "eigen"]

RESIDUALS = ("residual", "second_residual")
"""Diagnostics: ‖Zᵀu − σv‖/σ of the computed triplets."""


@dataclass(frozen=True)
class KroneckerMethod(LayerMethod):
    """A method whose inverse is a Kronecker product, or diagonal in a Kronecker-factored basis.

    Attributes:
        damping_form: "factored" or "eigen", see `fisherfn.linalg.damped`.
        diagonal_above: a factor wider than this is kept as its diagonal.

    Raises:
        UnknownNameError: an unknown damping form.
        HyperparameterError: a negative width.
    """

    damping_form: DampingForm | str = "factored"
    diagonal_above: int = DIAGONAL_ABOVE

    def __post_init__(self) -> None:
        if self.damping_form not in DAMPING_FORMS:
            raise unknown("damping form", self.damping_form, DAMPING_FORMS)
        expect_count("diagonal_above", self.diagonal_above, 0)

    def identity(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Pair:
        """Return `I ⊗ I` of a block, in the forms in which its factors are kept."""
        return kron.identity(shape, kron.forms(shape, self.diagonal_above), dtype, device)

    def apply(self, inverse: damped.Inverse, W: Matrix) -> Matrix:
        """Multiply a gradient by the inverse."""
        return damped.apply(inverse, W)

    def apply_tap(self, inverse: damped.Inverse, tap: Tap, inner: bool) -> Product:
        """Multiply the gradient of a loss tap by the inverse, from its rows."""
        return gradients.precondition(inverse, tap, inner)

    def logdet_block(self, inverse: damped.Inverse, shape: Shape) -> Float[Tensor, ""]:
        """Return the log-determinant of the inverse, from its factors."""
        del shape
        return damped.logdet(inverse)

    def cross_block(self, inverse: damped.Inverse, tap: AnyTap) -> tuple[Tensor, Tensor]:
        """Return `tr(P F)` and `tr P` of a damped inverse P, without forming either."""
        if isinstance(inverse, Pair):
            return rearrangement.overlap([inverse], tap)[0], kron.trace([inverse])
        return (diagonal(tap, inverse.QA, inverse.QG) * inverse.scale).sum(), damped.trace(inverse)


def diagonal(tap: AnyTap, QA: Factor, QG: Factor) -> Float[Tensor, "k o i"]:
    """Return `1/N Σ (Q_Gᵀ W Q_A)²`, the diagonal of the sampled block in a basis."""
    parts = []
    for part in tap.windows():
        a, g = part.precise()
        if not kron.is_diagonal(QA):
            a = rows.times(a, QA)
        if not kron.is_diagonal(QG):
            g = rows.times_each(g, QG)
        parts.append(squares(Tap(a, g)))
    total = torch.stack(parts).sum(0) / tap.sizes.n
    # the basis of a diagonal is a diagonal: that of `eigh` is the identity, that of a pencil is not
    total = total * QA.square().unsqueeze(-2) if kron.is_diagonal(QA) else total
    return total * QG.square().unsqueeze(-1) if kron.is_diagonal(QG) else total


class KroneckerSum(KroneckerMethod):
    """A method whose factors are a few Kronecker products."""

    @abstractmethod
    def terms(self, factors: PyTree) -> Sequence[Pair]:
        """Return the products whose sum approximates the block."""

    def matvec_block(self, factors: PyTree, W: Matrix) -> Matrix:
        """Return `Σ_r G_r W A_r`."""
        return kron.apply(self.terms(factors), W)

    def overlap_block(self, factors: PyTree, tap: AnyTap) -> tuple[Tensor, Tensor]:
        """Return `⟨F, F̂⟩` and `‖F̂‖²`, without forming either."""
        return rearrangement.overlap(self.terms(factors), tap)

    def trace_block(self, factors: PyTree, shape: Shape) -> Float[Tensor, ""]:
        """Return `Σ_r tr A_r tr G_r`."""
        del shape
        return kron.trace(self.terms(factors))


class OneTerm(KroneckerSum):
    """A method whose factors are a `Pair`."""

    def terms(self, factors: Pair) -> tuple[Pair]:
        """Return the only product."""
        return (factors,)

    def init_block(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, damping: Tensor
    ) -> tuple[Pair, damped.Inverse]:
        """Return zeros, and I/λ."""
        eye = self.identity(shape, dtype, device)
        empty = damped.empty_pair if self.damping_form == "factored" else damped.empty_rotated
        return kron.zeros(eye), empty(eye, damping)

    def invert_block(self, factors: Pair, damping: Float[Tensor, ""]) -> damped.Inverted:
        """Return the damped inverse of the product."""
        return (damped.factored if self.damping_form == "factored" else damped.eigen)(factors, damping)

    def eigenvalues_block(self, factors: Pair, shape: Shape) -> Float[Tensor, "k o i"]:
        """Return the products of the factors' eigenvalues."""
        del shape
        return damped.eigenvalues(factors)


@dataclass(frozen=True)
class TwoTerms(KroneckerSum):
    """A method whose factors are a `Sum` with a PSD first term.

    Attributes:
        floor: smallest denominator, see `fisherfn.linalg.damped`.

    Raises:
        HyperparameterError: a floor outside (0, 1].
    """

    floor: float = FLOOR

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_number("floor", self.floor, lambda v: 0 < v <= 1, "must lie in (0, 1]")

    def terms(self, factors: Sum) -> Sum:
        """Return both products."""
        return factors

    def init_block(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, damping: Tensor
    ) -> tuple[Sum, damped.Inverse]:
        """Return zeros, and I/λ."""
        eye = self.identity(shape, dtype, device)
        return Sum(kron.zeros(eye), kron.zeros(eye)), damped.empty_rotated(eye, damping)

    def invert_block(self, factors: Sum, damping: Float[Tensor, ""]) -> damped.Inverted:
        """Return the damped inverse of the sum."""
        invert = damped.factored_sum if self.damping_form == "factored" else damped.eigen_sum
        return invert(factors.first, factors.second, damping, self.floor)


@dataclass(frozen=True)
class Iterated(KroneckerSum):
    """A method that finds its terms by iterating on Z; blocks with the same batch size are iterated on together.

    Attributes:
        iterations: Golub–Kahan steps, each one application of Z and one of its transpose.

    Raises:
        HyperparameterError: fewer iterations than the terms need.
    """

    iterations: int = 4
    least: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_count("iterations", self.iterations, self.least)

    @abstractmethod
    def find(self, Z: LinearMap) -> tuple[Triplet, ...]:
        """Return the leading triplets of Z."""

    @abstractmethod
    def start(self, previous: PyTree) -> Sequence[Pair]:
        """Return the products whose sum is the start of the iteration."""

    @abstractmethod
    def blend_together(self, old: Sequence[PyTree], new: Sequence[PyTree], rho: Sequence[Tensor]) -> Sequence[PyTree]:
        """Return the running average of each block; ρ is a number per block."""

    def known(self, tap: AnyTap) -> Pair | None:
        """Return a first term that needs no iteration; the triplets are then those of the residual."""
        del tap
        return None

    def estimate(self, tap: AnyTap, previous: PyTree) -> PyTree:
        """Return the factors of one batch."""
        return self._estimate([tap], [previous])[0][0]

    def blend(self, old: PyTree, new: PyTree, rho: Tensor) -> PyTree:
        """Return the running average of one block."""
        return self.blend_together([old], [new], [rho])[0]

    def update_blocks(
        self, old: PyTree, taps: Mapping[str, AnyTap], rho: Mapping[str, Tensor], inverting: Which
    ) -> Updated:
        """Update group by group."""
        del inverting
        for keys in rearrangement.group_by_batch_size(taps):
            before = [old[key] for key in keys]
            new, measured = self._estimate([taps[key] for key in keys], before)
            blended = self.blend_together(before, new, [rho[key] for key in keys])
            yield from zip(keys, blended, measured, strict=True)

    def _estimate(self, taps: Sequence[AnyTap], previous: Sequence[PyTree]) -> tuple[list[PyTree], list[Diagnostics]]:
        blocks = [rearrangement.rearranged(tap, self.start(old)) for tap, old in zip(taps, previous, strict=True)]
        firsts = [self.known(tap) for tap in taps]
        Z = rearrangement.stack_blocks(blocks)
        known = [_vectors(block, first, tap) for block, first, tap in zip(blocks, firsts, taps, strict=True) if first]
        if known:
            Z = Deflated(Z, *(torch.cat(side) for side in zip(*known, strict=True)))
        found = by_block(self.find(Z), [tap.sizes.k for tap in taps])
        new = []
        for block, first, triplets in zip(blocks, firsts, found, strict=True):
            terms = [*([first] if first else []), *(block.pair(*triplet.balanced()) for triplet in triplets)]
            new.append(terms[0] if len(terms) == 1 else Sum(*terms))
        residuals = [(triplet.residual.amax() for triplet in triplets) for triplets in found]
        return new, [dict(zip(RESIDUALS, each, strict=False)) for each in residuals]


def _vectors(block: rearrangement.Block, pair: Pair, tap: AnyTap) -> tuple[Tensor, Tensor]:
    """Return K-FAC's A and G as vectors of a block; in coefficients of examples, G is their sum over all examples."""
    A, G = block.vectors(pair)
    if isinstance(block, ExampleBlock):
        G = G * (tap.sizes.n / tap.output_rows())
    return A, G
