"""The tap of a block, converted from the raw tensors of its layer for some examples at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import rows
from fisherfn.layers import balance, swapped_columns, swapped_rows
from fisherfn.stats.blocks import Block, Use
from fisherfn.taps import LazyTap, Sizes, Tap


def make_tap(block: Block, inputs: Sequence[Tensor], grads: Sequence[Tensor], scale: Tensor | float = 1.0) -> Tap:
    """Convert raw statistics to `(a, g)`: uses are joined along the shared positions, the bias is a column of `a`.

    `scale` is the scale of a tied embedding's output layer, see `fisherfn.layers.tied`.
    """
    parts = []
    for use, x, g in zip(block.uses, inputs, grads, strict=True):
        a = swapped_rows(_columns_of(block, use, g), scale) if use.transposed else _rows(block, use, x)
        parts.append(a if block.bias is None else rows.with_column(a, float(use.biased)))
    return Tap(rows.cat(parts), _columns(block, inputs, grads, scale))


def _rows(block: Block, use: Use, x: Tensor) -> rows.Rows:
    return rows.split_examples(block.family.rows(x, use.config), use.repeats)


def _columns_of(block: Block, use: Use, g: Tensor) -> Float[Tensor, "k s n t o"]:
    columns = block.family.columns(g, use.config)
    return columns if use.repeats == 1 else columns.unflatten(2, (-1, use.repeats)).flatten(3, 4)


def _columns(
    block: Block, inputs: Sequence[Tensor], grads: Sequence[Tensor], scale: Tensor | float
) -> Float[Tensor, "k s n t o"]:
    """Compute only `g`, without computing any row."""
    parts = [
        swapped_columns(rows.dense(_rows(block, use, x)), g.shape[0], scale)
        if use.transposed
        else _columns_of(block, use, g)
        for use, x, g in zip(block.uses, inputs, grads, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 3)


def _scale(block: Block, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor | float:
    """Compute the scale of a tied embedding's output layer from all examples."""
    head = next((at for at, use in enumerate(block.uses) if use.transposed), None)
    if head is None:
        return 1.0
    words = next(at for at, use in enumerate(block.uses) if not use.transposed)
    return balance(inputs[head], grads[words])


def _second_moment(
    block: Block, inputs: Sequence[Tensor], positions: int, dtype: torch.dtype
) -> Float[Tensor, "k i i"] | None:
    """Return `Σ_nt a aᵀ` from the raw inputs of a layer that is used once and has a faster way than from its rows."""
    (use, *more), x = block.uses, inputs[0]
    if more or use.repeats > 1:
        return None
    precise = torch.promote_types(torch.promote_types(x.dtype, dtype), torch.float32)
    moments = block.family.moments(x.to(precise), use.config)
    if moments is None or block.bias is None:
        return None if moments is None else moments.second
    first = moments.first.unsqueeze(-1) * float(use.biased)  # the bias sees ones, or nothing
    corner = first.new_full((first.shape[0], 1, 1), x.shape[0] * positions * float(use.biased))
    return torch.cat([torch.cat([moments.second, first], -1), torch.cat([first.mT, corner], -1)], -2)


class Known(NamedTuple):
    """Properties of a tap that follow from its shapes: sizes, row storage per example, one-hot or not, type."""

    sizes: Sizes
    stored: int
    one_hot: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class BlockTap(LazyTap):
    """The tap of a block, computed from raw statistics for some examples at a time.

    Attributes:
        inputs, grads: the raw statistics of each use.
        scale: scale of a tied embedding's output layer, computed from all examples.
        precision: type to which parts are cast; None keeps that of the raw statistics.
    """

    block: Block
    inputs: Sequence[Tensor]
    grads: Sequence[Tensor]
    known: Known
    scale: Tensor | float
    precision: torch.dtype | None = None

    @property
    def sizes(self) -> Sizes:
        """Return the length of each axis."""
        return self.known.sizes

    @property
    def stored(self) -> int:
        """Return the size of the rows of one example, in numbers."""
        return self.known.stored

    @property
    def one_hot(self) -> bool:
        """Return True if the rows are stored as indices."""
        return self.known.one_hot

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of `g`."""
        return self.precision or self.known.dtype

    def part(self, examples: slice) -> Tap:
        """Return the tap of some examples, computed now."""
        some = self.window(examples)
        tap = make_tap(some.block, some.inputs, some.grads, some.scale)
        return tap if self.precision is None else tap.to(self.precision)

    def window(self, examples: slice) -> BlockTap:
        """Return the lazy tap of some of the examples."""
        start, stop, _ = examples.indices(self.sizes.n)
        if (start, stop) == (0, self.sizes.n):
            return self
        ranges = [slice(start * use.repeats, stop * use.repeats) for use in self.block.uses]
        inputs = [x[chosen] for x, chosen in zip(self.inputs, ranges, strict=True)]
        grads = [g[:, chosen] for g, chosen in zip(self.grads, ranges, strict=True)]
        sizes = self.sizes._replace(n=max(0, stop - start))
        return replace(self, inputs=inputs, grads=grads, known=self.known._replace(sizes=sizes))

    def to(self, dtype: torch.dtype) -> BlockTap:
        """Return the lazy tap in another precision."""
        return replace(self, precision=dtype)

    def outputs(self) -> Float[Tensor, "k s n t o"]:
        """Return only `g`, without computing any row."""
        return _columns(self.block, self.inputs, self.grads, self.scale).to(self.dtype)

    def quick_input_moment(self) -> Float[Tensor, "k i i"] | None:
        """Return `Σ_nt a aᵀ`, at least in float32, if the layer has a faster way than from its rows; else None."""
        return _second_moment(self.block, self.inputs, self.sizes.t, self.dtype)


def lazy(block: Block, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> BlockTap:
    """Return the lazy tap of raw statistics; only the scale of a tied embedding is computed now."""
    known = _of_one_example(
        block,
        tuple(((use.repeats, *x.shape[1:]), x.dtype) for x, use in zip(inputs, block.uses, strict=True)),
        tuple(((g.shape[0], use.repeats, *g.shape[2:]), g.dtype) for g, use in zip(grads, block.uses, strict=True)),
    )
    sizes = known.sizes._replace(n=inputs[0].shape[0] // block.uses[0].repeats)
    return BlockTap(block, inputs, grads, known._replace(sizes=sizes), _scale(block, inputs, grads))


_Kind: TypeAlias = tuple[tuple[int, ...], torch.dtype]
"""The shape and type of a tensor."""


# cached, because torch runs the meta device in Python: this took half of the time of a small net's step
@lru_cache(maxsize=4096)
def _of_one_example(block: Block, inputs: tuple[_Kind, ...], grads: tuple[_Kind, ...]) -> Known:
    x, g = ([torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in kinds] for kinds in (inputs, grads))
    tap = make_tap(block, x, g)
    return Known(tap.sizes, rows.stored(tap.a), tap.one_hot, tap.dtype)
