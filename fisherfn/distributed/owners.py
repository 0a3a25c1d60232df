"""Inversions that are shared out: each block is inverted by its owner, and one message gives the inverses to all ranks.

Owners follow from the shapes alone, by the costs of `fisherfn.shares`.

Pauloski et al. 2021, *KAISA: an adaptive second-order optimizer framework for deep neural networks*, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import tree
from fisherfn.base import Estimated, Method, Preconditioned, Which
from fisherfn.distributed.ranks import Ranks, from_bytes
from fisherfn.distributed.taps import filled, triangle
from fisherfn.gradients import Gradient
from fisherfn.linalg.kron import Pair
from fisherfn.operators import Kind
from fisherfn.shares import costs, owners
from fisherfn.taps import AnyTap
from fisherfn.types import PyTree, Shape


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

    def update(self, factors: PyTree, taps: Mapping[str, AnyTap], rho: Tensor, inverting: Which = True) -> Estimated:
        """Update the factors of all blocks, which every rank needs for its part of later messages."""
        return self.inner.update(factors, taps, rho, inverting)

    def invert(self, factors: PyTree, damping: Float[Tensor, ""]) -> Estimated:
        """Invert this rank's blocks, and return the inverses of all blocks."""
        owner = self.owner
        mine = {key: factors[key] for key in factors if owner[key] == self.ranks.rank}
        done = self.inner.invert(mine, damping) if mine else Estimated({}, {}, {})
        like, names = self._structure(factors, damping)
        held = dict(like)
        for key in mine:
            scalars = [done.ok[key], *(done.diagnostics[name][key] for name in names)]
            held[key] = [*_leaves(done.factors[key]), *(scalar.double().reshape(()) for scalar in scalars)]
        sizes = [
            sum(_size(leaf) for key in factors if owner[key] == rank for leaf in held[key])
            for rank in range(self.ranks.size)
        ]
        rows = self.ranks.gathered("inverses", [leaf for key in mine for leaf in held[key]], sizes)
        return self._unpacked(rows, owner, factors, held, names, damping)

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

    def _structure(self, factors: PyTree, damping: Tensor) -> tuple[dict[str, list[Tensor]], list[str]]:
        """Return the leaves that each block sends, without values, and the names of the diagnostics.

        The names are those of the smallest possible block, which every rank inverts for itself.
        """
        leaf = tree.leaves(factors)[0]
        small = {"small": Shape(1, 1, 1)}
        empty, _ = self.inner.init(small, leaf.dtype, leaf.device, damping)
        names = sorted(self.inner.invert(empty, damping).diagnostics)
        shapes = {key: self.shapes[key] for key in factors}
        meta = torch.device("meta")
        _, inverses = self.inner.init(shapes, leaf.dtype, meta, damping.to(meta))
        scalar = torch.empty((), dtype=torch.float64, device=meta)
        return {key: [*_leaves(inverses[key]), *[scalar] * (1 + len(names))] for key in factors}, names

    def _unpacked(
        self,
        rows: list[Tensor],
        owner: dict[str, int],
        factors: PyTree,
        held: dict[str, list[Tensor]],
        names: list[str],
        damping: Tensor,
    ) -> Estimated:
        """Return the inverses, masks and diagnostics of all blocks from the bytes of all ranks."""
        leaf = tree.leaves(factors)[0]
        _, inverses = self.inner.init(self.shapes, leaf.dtype, torch.device("meta"), damping.to("meta"))
        at = [0] * len(rows)
        found, ok, measured = {}, {}, {name: {} for name in names}  # type: ignore[var-annotated]
        for key in factors:
            parts = []
            for like in held[key]:
                start = at[owner[key]]
                at[owner[key]] = start + _size(like)
                parts.append(from_bytes(rows[owner[key]][start : start + _size(like)], like, like.shape))
            scalars = parts[-1 - len(names) :]
            found[key], ok[key] = _rebuilt(inverses[key], parts[: -1 - len(names)]), scalars[0] == 1
            for name, value in zip(names, scalars[1:], strict=True):
                measured[name][key] = value.to(damping.dtype)
        return Estimated(found, ok, measured)


def _leaves(inverse: PyTree) -> list[Tensor]:
    """Return the leaves of an inverse; the factors of a product are symmetric, so their upper triangles do."""
    return [triangle(leaf) for leaf in inverse] if isinstance(inverse, Pair) else tree.leaves(inverse)


def _rebuilt(like: PyTree, parts: list[Tensor]) -> Any:
    """Return the inverse with these leaves."""
    if isinstance(like, Pair):
        return Pair(*(filled(part, leaf) for part, leaf in zip(parts, like, strict=True)))
    return tree.replace_leaves(like, parts)


def _size(leaf: Tensor) -> int:
    return leaf.numel() * leaf.element_size()
