r"""Base classes of methods: `Method` on all blocks of a net, `LayerMethod` for methods that treat blocks separately.

A method is a frozen dataclass whose fields are its hyperparameters. It holds no state: factors and inverses are pytrees
that its functions take and return.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import equal_shapes, tree
from fisherfn.gradients import Gradient, Own, as_matrix
from fisherfn.operators import Kind, check_size, log_determinant
from fisherfn.per_example import example_matrices, matrix_windows
from fisherfn.taps import AnyTap, Tap, added
from fisherfn.types import Matrix, Product, PyTree, Shape
from fisherfn.which import Which, includes

Diagnostics = dict[str, Tensor]
"""Measurements by name. The names are fixed for a method, so that the structure of `info` is fixed."""

Updated: TypeAlias = Iterator[tuple[str, PyTree, Diagnostics]]
"""Finished blocks in any order: key, new factors, diagnostics."""

Rho: TypeAlias = Tensor | Mapping[str, Tensor]
"""The weight of the old factors in the running average: one number, or one per block."""


class Estimated(NamedTuple):
    """New factors (or inverses), masks that are true if they are valid, and diagnostics."""

    factors: PyTree
    ok: dict[str, Tensor]
    diagnostics: dict[str, Diagnostics]


class Preconditioned(NamedTuple):
    """Preconditioned gradients, one matrix per block, and ⟨∇, nat⟩ if requested."""

    matrices: dict[str, Tensor]
    inner: Any


class Method(ABC):
    """A method on all blocks of a net; every argument and result is a dict by block key."""

    name: ClassVar[str]
    """The name in `ff.METHODS`."""

    fit_passes: ClassVar[int] = 0
    """Passes over a data set after which averages over its batches are the factors of all examples; 0: never."""

    couples: ClassVar[bool] = True
    """Blocks cannot be inverted without the others."""

    inverts_updated: ClassVar[bool] = False
    """Inverting serves a purpose only in steps that update, because a part of the work is done there."""

    @property
    def inverse_kind(self) -> Kind:
        """Return how `precondition` depends on the gradient: "symmetric", "general" (linear only) or "nonlinear"."""
        return "symmetric"

    @abstractmethod
    def init(
        self, shapes: Mapping[str, Shape], dtype: torch.dtype, device: torch.device, damping: Tensor
    ) -> tuple[PyTree, PyTree]:
        """Return empty factors and inverses; preconditioning with these gives grad/λ."""

    @abstractmethod
    def update(self, factors: PyTree, taps: Mapping[str, AnyTap], rho: Rho, inverting: Which = True) -> Estimated:
        """Return factors of these statistics, blended with weight ρ on the old ones.

        `inverting` names the blocks that `invert` follows for; methods may skip work needed only for inversion.
        """

    @abstractmethod
    def invert(self, factors: PyTree, damping: Float[Tensor, ""]) -> Estimated:
        """Return the damped inverses."""

    @abstractmethod
    def precondition(self, inverses: PyTree, gradients: Mapping[str, Gradient], inner: bool) -> Preconditioned:
        """Return the preconditioned gradients; a gradient is a matrix or a dense loss tap."""

    def precondition_own(
        self, inverses: PyTree, own: Own, shapes: Mapping[str, Shape], inner: bool
    ) -> Preconditioned | None:
        """Return the preconditioned gradient given in the examples that were inverted; None: no better way."""
        del inverses, own, shapes, inner
        return None

    @abstractmethod
    def matvec(self, factors: PyTree, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Multiply matrices by the undamped approximate Fisher F̂."""

    @abstractmethod
    def overlap(self, factors: PyTree, taps: Mapping[str, AnyTap]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return (⟨F, F̂⟩, ‖F̂‖²) of every block, with F the sampled Fisher of the taps."""

    def between_passes(self, factors: PyTree) -> PyTree:
        """Return the factors with which another pass over the same data starts."""
        return factors

    def trace(self, factors: PyTree, shapes: Mapping[str, Shape]) -> Float[Tensor, ""] | None:
        """Return the trace of F̂; None: only its dense matrix gives it."""
        del factors, shapes
        return None

    def rank(self, factors: PyTree, outputs: int) -> int | None:
        """Return the largest rank that F̂'s examples allow, each with so many outputs; None: F̂ keeps no examples."""
        del factors, outputs
        return None

    def eigenvalues(self, factors: PyTree, shapes: Mapping[str, Shape]) -> Float[Tensor, " p"] | None:
        """Return all eigenvalues of F̂ in any order; None: only its dense matrix gives them."""
        del factors, shapes
        return None

    def logdet(self, inverses: PyTree, shapes: Mapping[str, Shape]) -> Float[Tensor, ""] | None:
        """Return the log-determinant of the matrix that `precondition` multiplies by; None: see `trace`."""
        del inverses, shapes
        return None


@dataclass(frozen=True)
class LayerMethod(Method):
    """A method that treats each block separately: a subclass writes five functions on one block.

    To write: `init_block`, `estimate`, `invert_block`, `apply`, `matvec_block`. The others have defaults that are right
    for every method; a method overrides them where it knows a cheaper way or another running average.
    """

    couples = False
    joined_up_to: ClassVar[int] = equal_shapes.WIDEST
    """Blocks of equal shapes up to this width are inverted together."""

    # to write --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def init_block(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, damping: Tensor
    ) -> tuple[PyTree, PyTree]:
        """Return empty factors and the inverse I/λ."""

    @abstractmethod
    def estimate(self, tap: AnyTap, previous: PyTree) -> PyTree:
        """Return the factors of one batch, in the method's canonical scale; `previous` may start an iteration."""

    @abstractmethod
    def invert_block(self, factors: PyTree, damping: Float[Tensor, ""]) -> tuple[PyTree, Tensor, Diagnostics]:
        """Return the damped inverse, and for each of its groups a mask that is true if it is valid, and diagnostics."""

    @abstractmethod
    def apply(self, inverse: PyTree, W: Matrix) -> Matrix:
        """Multiply a gradient by the inverse."""

    @abstractmethod
    def matvec_block(self, factors: PyTree, W: Matrix) -> Matrix:
        """Multiply a matrix by the undamped F̂."""

    # with defaults ---------------------------------------------------------------------------------------------------

    def blend(self, old: PyTree, new: PyTree, rho: Float[Tensor, ""]) -> PyTree:
        """Return the running average `ρ old + (1 − ρ) new`: here factor by factor."""
        return factorwise(old, new, rho)

    def update_block(self, old: PyTree, tap: AnyTap, rho: Tensor, inverting: bool) -> tuple[PyTree, Diagnostics]:
        """Estimate the factors of one batch, and blend them into the running average."""
        del inverting
        return self.blend(old, self.estimate(tap, old), rho), {}

    def update_blocks(
        self, old: PyTree, taps: Mapping[str, AnyTap], rho: Mapping[str, Tensor], inverting: Which
    ) -> Updated:
        """Update the blocks of these taps; a method overrides this if many blocks at once cost less."""
        for key, tap in taps.items():
            yield key, *self.update_block(old[key], tap, rho[key], includes(inverting, key))

    def apply_tap(self, inverse: PyTree, tap: Tap, inner: bool) -> Product:
        """Multiply the gradient of a loss tap by the inverse, with ⟨∇, nat⟩ if requested."""
        return self._applied(inverse, as_matrix(tap), inner)

    def overlap_block(self, factors: PyTree, tap: AnyTap) -> tuple[Tensor, Tensor]:
        """Return `⟨F, F̂⟩ = 1/N Σ ⟨W, F̂ W⟩`, and `‖F̂‖²` from the dense block."""
        k, _, n, _, o, i = tap.sizes
        dense = self._dense(partial(self.matvec_block, factors), Shape(k, o, i), factors)
        parts = (example_matrices(part).flatten(0, 1) for part in matrix_windows(tap))
        cross = added((W * torch.vmap(partial(self.matvec_block, factors))(W)).sum() for W in parts)
        return cross / n, dense.square().sum()

    def trace_block(self, factors: PyTree, shape: Shape) -> Float[Tensor, ""]:
        """Return the trace of F̂."""
        return self._dense(partial(self.matvec_block, factors), shape, factors).diagonal(dim1=-2, dim2=-1).sum()

    def eigenvalues_block(self, factors: PyTree, shape: Shape) -> Float[Tensor, "*p"]:
        """Return all eigenvalues of F̂ in any order."""
        dense = self._dense(partial(self.matvec_block, factors), shape, factors)
        return torch.linalg.eigvalsh(dense)  # type: ignore[no-any-return]

    def logdet_block(self, inverse: PyTree, shape: Shape) -> Float[Tensor, ""]:
        """Return the log-determinant of the inverse."""
        return log_determinant(self._dense(partial(self.apply, inverse), shape, inverse)).sum()

    def cross_block(self, inverse: PyTree, tap: AnyTap) -> tuple[Tensor, Tensor]:
        """Return `tr(P F) = 1/N Σ ⟨W, P W⟩` and `tr P` of a damped inverse P."""
        k, _, n, _, o, i = tap.sizes
        act = partial(self.apply, inverse)
        parts = (example_matrices(part).flatten(0, 1) for part in matrix_windows(tap))
        cross = added((W * torch.vmap(act)(W)).sum() for W in parts)
        return cross / n, self._dense(act, Shape(k, o, i), inverse).diagonal(dim1=-2, dim2=-1).sum()

    # on all blocks ---------------------------------------------------------------------------------------------------

    def init(
        self, shapes: Mapping[str, Shape], dtype: torch.dtype, device: torch.device, damping: Tensor
    ) -> tuple[PyTree, PyTree]:
        """Return empty factors and inverses of all blocks."""
        pairs = {key: self.init_block(shape, dtype, device, damping) for key, shape in shapes.items()}
        return {key: pair[0] for key, pair in pairs.items()}, {key: pair[1] for key, pair in pairs.items()}

    def update(self, factors: PyTree, taps: Mapping[str, AnyTap], rho: Rho, inverting: Which = True) -> Estimated:
        """Update the blocks of these taps; a block is valid if its factors are finite."""
        rho = dict.fromkeys(taps, rho) if isinstance(rho, Tensor) else rho
        new, ok, diagnostics = {}, {}, {}
        for key, blended, measured in self.update_blocks(factors, taps, rho, inverting):
            new[key], ok[key], diagnostics[key] = blended, tree.finite(blended), measured
        return Estimated({key: new[key] for key in taps}, {key: ok[key] for key in taps}, _by_name(diagnostics))

    def invert(self, factors: PyTree, damping: Float[Tensor, ""]) -> Estimated:
        """Invert all blocks that are given, those of equal shapes together."""
        invert = partial(self.invert_block, damping=damping)
        inverses, ok, measured = equal_shapes.together(invert, factors, self.joined_up_to)
        return Estimated(inverses, ok, _by_name(measured))

    def precondition(self, inverses: PyTree, gradients: Mapping[str, Gradient], inner: bool) -> Preconditioned:
        """Precondition all blocks."""
        products = {
            key: self.apply_tap(inverses[key], gradient, inner)
            if isinstance(gradient, Tap)
            else self._applied(inverses[key], gradient, inner)
            for key, gradient in gradients.items()
        }
        total = torch.stack([p.inner for p in products.values()]).sum() if inner else ()  # type: ignore[misc]
        return Preconditioned({key: p.matrix for key, p in products.items()}, total)

    def matvec(self, factors: PyTree, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Multiply all blocks."""
        return {key: self.matvec_block(factors[key], matrix) for key, matrix in matrices.items()}

    def overlap(self, factors: PyTree, taps: Mapping[str, AnyTap]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the overlap of each block."""
        return {key: self.overlap_block(factors[key], tap) for key, tap in taps.items()}

    def trace(self, factors: PyTree, shapes: Mapping[str, Shape]) -> Float[Tensor, ""]:
        """Return the sum of the blocks' traces."""
        return torch.stack([self.trace_block(factors[key], shape) for key, shape in shapes.items()]).sum()

    def eigenvalues(self, factors: PyTree, shapes: Mapping[str, Shape]) -> Float[Tensor, " p"]:
        """Return the eigenvalues of all blocks."""
        return torch.cat([self.eigenvalues_block(factors[key], shape).flatten() for key, shape in shapes.items()])

    def logdet(self, inverses: PyTree, shapes: Mapping[str, Shape]) -> Float[Tensor, ""]:
        """Return the sum of the blocks' log-determinants."""
        return torch.stack([self.logdet_block(inverses[key], shape) for key, shape in shapes.items()]).sum()

    def _applied(self, inverse: PyTree, gradient: Matrix, inner: bool) -> Product:
        nat = self.apply(inverse, gradient)
        return Product(nat, (gradient * nat).sum() if inner else ())

    def _dense(self, product: Any, shape: Shape, like: PyTree) -> Float[Tensor, "k d d"]:
        """Return the matrix of a linear map on a block, one per group, from products with unit matrices."""
        k, o, i, _ = shape
        check_size(o * i, f"a layer's block ({o}×{i}), whose factors do not give this quantity,")
        leaf = next(leaf for leaf in tree.leaves(like) if leaf.is_floating_point())
        units = torch.eye(o * i, dtype=leaf.dtype, device=leaf.device).reshape(o * i, 1, o, i).expand(-1, k, -1, -1)
        dense: Tensor = torch.vmap(product)(units)
        return dense.flatten(2).movedim(0, -1)


def factorwise(old: PyTree, new: PyTree, rho: Float[Tensor, ""]) -> PyTree:
    """Return `ρ old + (1 − ρ) new`, factor by factor."""
    return tree.map(lambda o, n: torch.lerp(n, o, rho.to(n.dtype)), old, new)


def _by_name(diagnostics: Mapping[str, Diagnostics]) -> dict[str, Diagnostics]:
    names = {name for measured in diagnostics.values() for name in measured}
    return {
        name: {key: measured[name] for key, measured in diagnostics.items() if name in measured}
        for name in sorted(names)
    }
