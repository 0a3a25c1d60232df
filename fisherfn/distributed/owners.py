"""Inversions that are shared out: each block is inverted by its owner, and one message gives the inverses to all ranks.

Owners follow from the shapes alone, by the costs of `fisherfn.shares`.

Pauloski et al. 2021, *KAISA: an adaptive second-order optimizer framework for deep neural networks*, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import tree
from fisherfn.base import Estimated, Method, Preconditioned, Rho
from fisherfn.distributed.ranks import Ranks, from_bytes
from fisherfn.distributed.triangles import filled, triangle
from fisherfn.gradients import Gradient
from fisherfn.linalg.kron import Pair
from fisherfn.operators import Kind
from fisherfn.shares import costs, owners
from fisherfn.taps import AnyTap
from fisherfn.types import PyTree, Shape
from fisherfn.which import Which


@dataclass(frozen=True)
class Owned(Method):
    """A method for single layers whose inversions are shared out over ranks; everything else is the method's own.

    Attributes:
        inner: the method.
        shapes: the shapes of all blocks.
        ranks: the ranks that share the work.
    """

    inner: Method
    shapes: Mapping[str, Shape]
    ranks: Ranks

    @property
    def name(self) -> str:  # type: ignore[override]
        """Return the name of the method."""
        return self.inner.name

    @property
    def couples(self) -> bool:  # type: ignore[override]
        """Return that of the method."""
        return self.inner.couples

    @property
    def inverts_updated(self) -> bool:  # type: ignore[override]
        """Return that of the method."""
        return self.inner.inverts_updated

    @property
    def inverse_kind(self) -> Kind:
        """Return that of the method."""
        return self.inner.inverse_kind

    @property
    def owner(self) -> dict[str, int]:
        """Return the rank that inverts each block."""
        return owners(costs(self.shapes, getattr(self.inner, "diagonal_above", 0)), self.ranks.size)

    def init(
        self, shapes: Mapping[str, Shape], dtype: torch.dtype, device: torch.device, damping: Tensor
    ) -> tuple[PyTree, PyTree]:
        """Return the empty state of the method."""
        return self.inner.init(shapes, dtype, device, damping)

    def update(self, factors: PyTree, taps: Mapping[str, AnyTap], rho: Rho, inverting: Which = True) -> Estimated:
        """Update the factors of all blocks, which every rank needs for its part of later messages."""
        return self.inner.update(factors, taps, rho, inverting)

    def invert(self, factors: PyTree, damping: Float[Tensor, ""]) -> Estimated:
        """Invert this rank's blocks, and return the inverses of all blocks."""
        done = self._own(factors, damping)
        names = self._diagnostics(factors, damping)
        like = self._like(factors, damping)
        scalar = torch.empty((), dtype=torch.float64, device="meta")
        sent = {key: [*leaves(done.factors[key]), *scalars(done, key, names)] for key in done.factors}
        held = {key: [*leaves(like[key]), *[scalar] * (1 + len(names))] for key in factors}
        found = from_owners(self.ranks, "inverses", self.owner, sent, held)
        split = -1 - len(names)
        inverses = {key: rebuilt(like[key], parts[:split]) for key, parts in found.items()}
        return with_scalars(inverses, {key: parts[split:] for key, parts in found.items()}, names, damping)

    def precondition(self, inverses: PyTree, gradients: Mapping[str, Gradient], inner: bool) -> Preconditioned:
        """Return the method's preconditioned gradients."""
        return self.inner.precondition(inverses, gradients, inner)

    def matvec(self, factors: PyTree, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Multiply by the method's approximation."""
        return self.inner.matvec(factors, matrices)

    def overlap(self, factors: PyTree, taps: Mapping[str, AnyTap]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the method's overlaps."""
        return self.inner.overlap(factors, taps)

    def trace(self, factors: PyTree, shapes: Mapping[str, Shape]) -> Float[Tensor, ""] | None:
        """Return the trace of the method's approximation."""
        return self.inner.trace(factors, shapes)

    def eigenvalues(self, factors: PyTree, shapes: Mapping[str, Shape]) -> Float[Tensor, " p"] | None:
        """Return the eigenvalues of the method's approximation."""
        return self.inner.eigenvalues(factors, shapes)

    def logdet(self, inverses: PyTree, shapes: Mapping[str, Shape]) -> Float[Tensor, ""] | None:
        """Return the log-determinant of the method's inverse."""
        return self.inner.logdet(inverses, shapes)

    # ---------------------------------------------------------------------------------------------------------

    def _own(self, factors: PyTree, damping: Tensor) -> Estimated:
        """Invert the blocks of this rank."""
        owner = self.owner
        mine = {key: factors[key] for key in factors if owner[key] == self.ranks.rank}
        return self.inner.invert(mine, damping) if mine else Estimated({}, {}, {})

    def _diagnostics(self, factors: PyTree, damping: Tensor) -> list[str]:
        """Return the names of the diagnostics: those of the smallest possible block, which every rank inverts."""
        leaf = tree.leaves(factors)[0]
        empty, _ = self.inner.init({"small": Shape(1, 1, 1)}, leaf.dtype, leaf.device, damping)
        return sorted(self.inner.invert(empty, damping).diagnostics)

    def _like(self, factors: PyTree, damping: Tensor) -> PyTree:
        """Return the inverses of these blocks without values."""
        meta, shapes = torch.device("meta"), {key: self.shapes[key] for key in factors}
        return self.inner.init(shapes, tree.leaves(factors)[0].dtype, meta, damping.to(meta))[1]


def from_owners(
    ranks: Ranks,
    what: str,
    owner: Mapping[str, int],
    mine: Mapping[str, Sequence[Tensor]],
    like: Mapping[str, Sequence[Tensor]],
) -> dict[str, list[Tensor]]:
    """Return the tensors of all blocks, each from its owner, in one message.

    Args:
        ranks: the ranks.
        what: the purpose of the message.
        owner: the rank that has each block.
        mine: the tensors of this rank's blocks.
        like: tensors of the same shapes and types for all blocks, in the order of the message; without values.
    """
    flat = [tensor for key in like if key in mine for tensor in mine[key]]
    rows = ranks.gathered(what, flat, part_sizes(owner, like, ranks.size))
    at = [0] * ranks.size
    found: dict[str, list[Tensor]] = {}
    for key, each in like.items():
        row, found[key] = rows[owner[key]], []
        for tensor in each:
            start, end = at[owner[key]], at[owner[key]] + size(tensor)
            at[owner[key]] = end
            found[key].append(from_bytes(row[start:end], tensor, tensor.shape))
    return found


def part_sizes(owner: Mapping[str, int], like: Mapping[str, Sequence[Tensor]], ranks: int) -> list[int]:
    """Return the bytes that each rank sends, given the tensors of all blocks."""
    return [sum(size(each) for key in like if owner[key] == rank for each in like[key]) for rank in range(ranks)]


def scalars(done: Estimated, key: str, names: list[str]) -> list[Tensor]:
    """Return the mask and the diagnostics of a block as numbers of double precision."""
    numbers = [done.ok[key], *(done.diagnostics[name][key] for name in names)]
    return [number.double().reshape(()) for number in numbers]


def with_scalars(
    inverses: PyTree, numbers: Mapping[str, Sequence[Tensor] | Tensor], names: list[str], damping: Tensor
) -> Estimated:
    """Return inverses with their masks and diagnostics, given the numbers of `scalars`."""
    ok = {key: each[0] == 1 for key, each in numbers.items()}
    measured = {
        name: {key: each[at].to(damping.dtype) for key, each in numbers.items()} for at, name in enumerate(names, 1)
    }
    return Estimated(inverses, ok, measured)


def leaves(inverse: PyTree) -> list[Tensor]:
    """Return the leaves of an inverse; the factors of a product are symmetric, so their upper triangles do."""
    return [triangle(leaf) for leaf in inverse] if isinstance(inverse, Pair) else tree.leaves(inverse)


def rebuilt(like: PyTree, parts: list[Tensor]) -> Any:
    """Return the inverse with these leaves."""
    if isinstance(like, Pair):
        return Pair(*(filled(part, leaf) for part, leaf in zip(parts, like, strict=True)))
    return tree.replace_leaves(like, parts)


def size(leaf: Tensor) -> int:
    """Return the bytes of a tensor."""
    return leaf.numel() * leaf.element_size()
