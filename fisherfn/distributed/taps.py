"""Taps whose examples are spread over ranks: moments are summed over ranks, everything else gathers the examples.

`ReducedTap` answers the questions of a tap for the global batch. A mean or a moment is one sum over ranks, in one
message for all blocks. A question that is no mean, such as a Gram matrix, gathers the layer's inputs and
output-gradients, which are small for layers with one position. Then every rank has the tap of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import tree
from fisherfn.distributed.ranks import Ranks, Shard, from_bytes
from fisherfn.distributed.triangles import filled, triangle
from fisherfn.layers import ratio, squares
from fisherfn.stats import Block, Layout, lazy
from fisherfn.taps import AnyTap, Sizes, Tap
from fisherfn.types import PyTree


class Raw(NamedTuple):
    """The raw statistics of a block on this rank, one tensor per use: inputs `[N, …]`, output-gradients `[S, N, …]`."""

    inputs: Sequence[Tensor]
    grads: Sequence[Tensor]


class Exchange:
    """The statistics of a batch that is spread over ranks, with the sums and examples received so far.

    Each message is sent when a method first asks for it, and its result is kept, because a method asks block by block.
    All ranks ask in the same order, because no question depends on values.
    """

    def __init__(self, ranks: Ranks, shard: Shard, layout: Layout, raw: Mapping[str, Raw]) -> None:
        self.ranks, self.shard, self.layout, self.raw = ranks, shard, layout, raw
        self._locals: dict[str, Any] = {}
        self._wholes: dict[str, Any] = {}
        self._moments: dict[Any, dict[str, tuple[Tensor, Tensor]]] = {}

    def tap(self, key: str) -> ReducedTap:
        """Return the tap of a block for the global batch."""
        return ReducedTap(self, key, None)

    def local(self, key: str) -> Any:
        """Return the tap of this rank's examples, with the scale of a tied embedding from all examples."""
        if key not in self._locals:
            block, (inputs, grads) = self.layout.block(key), self.raw[key]
            tap = lazy(block, inputs, grads)
            tied = any(use.transposed for use in block.uses)
            self._locals[key] = replace(tap, scale=self._scale(block, inputs, grads)) if tied else tap
        return self._locals[key]

    def whole(self, key: str) -> Any:
        """Return the lazy tap of all examples, gathered; blocks with one position are gathered together."""
        if key not in self._wholes:
            single = [other for other in self.raw if self.local(other).sizes.t == 1]
            for other, (inputs, grads) in self._gathered(single if key in single else [key]).items():
                self._wholes[other] = lazy(self.layout.block(other), inputs, grads)
        return self._wholes[key]

    def moments(self, key: str, limit: int, summed: bool, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """Return the input and output moments of a block, summed over ranks in one message for all blocks."""
        asked = (limit, summed, dtype)
        if asked not in self._moments:
            taps = {name: self.local(name) if dtype is None else self.local(name).to(dtype) for name in self.raw}
            pairs = [(tap.input_moment(limit, summed), tap.output_moment(limit, summed)) for tap in taps.values()]
            mine = [moment for pair in pairs for moment in pair]
            packed = [triangle(moment) if self.shard.own else torch.zeros_like(triangle(moment)) for moment in mine]
            sums = self.ranks.total("moments", packed)
            full = [filled(part, like) for part, like in zip(sums, mine, strict=True)]
            self._moments[asked] = dict(zip(taps, zip(full[::2], full[1::2], strict=True), strict=True))
        return self._moments[asked][key]

    def mean(self, what: str, value: PyTree) -> PyTree:
        """Return the mean over all examples of a tree, given its mean over this rank's examples."""
        sums = self.ranks.total(what, [self.shard.weighted(leaf) for leaf in tree.leaves(value)])
        return tree.replace_leaves(value, sums)

    def _scale(self, block: Block, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
        head = next(at for at, use in enumerate(block.uses) if use.transposed)
        words = next(at for at, use in enumerate(block.uses) if not use.transposed)
        return ratio(*self.mean("scale", squares(inputs[head], grads[words])))

    def _gathered(self, keys: Sequence[str]) -> dict[str, Raw]:
        """Return the raw statistics of all examples of some blocks, in one message."""
        own, counts = self.shard.own, self.shard.counts
        held = max(own, 1)  # an empty shard holds one stand-in example
        tensors = [tensor for key in keys for field in self.raw[key] for tensor in field]
        axes = [axis for key in keys for axis, field in enumerate(self.raw[key]) for _ in field]
        each = [tensor.movedim(axis, 0).unflatten(0, (held, -1)) for tensor, axis in zip(tensors, axes, strict=True)]
        widths = [one[0].numel() * one.element_size() for one in each]
        sizes = [count * sum(widths) for count in counts]
        rows = self.ranks.gathered("examples", [one[:own] for one in each], sizes)
        parts = [row.split([count * width for width in widths]) for row, count in zip(rows, counts, strict=True)]
        whole = [
            torch.cat([from_bytes(part[at], one, (n, *one.shape[1:])) for part, n in zip(parts, counts, strict=True)])
            .flatten(0, 1)
            .movedim(0, axes[at])
            for at, one in enumerate(each)
        ]
        found = iter(whole)
        return {key: Raw(*([next(found) for _ in field] for field in self.raw[key])) for key in keys}


@dataclass(frozen=True)
class ReducedTap(AnyTap):
    """The tap of a block for a batch that is spread over ranks.

    Attributes:
        exchange: the statistics of the batch.
        key: the block.
        precision: type to which parts are cast; None keeps that of the raw statistics.
    """

    exchange: Exchange
    key: str
    precision: torch.dtype | None

    @property
    def local(self) -> AnyTap:
        """Return the tap of this rank's examples."""
        return self._cast(self.exchange.local(self.key))  # type: ignore[no-any-return]

    @property
    def sizes(self) -> Sizes:
        """Return the length of each axis; `sizes.n` counts the examples of all ranks."""
        return self.exchange.local(self.key).sizes._replace(n=self.exchange.shard.total)  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of `g`."""
        return self.local.dtype

    @property
    def one_hot(self) -> bool:
        """Return True if the rows are stored as indices."""
        return self.local.one_hot

    def to(self, dtype: torch.dtype) -> ReducedTap:
        """Return the tap in another precision."""
        return replace(self, precision=dtype)

    def mean(self, moment: Callable[[AnyTap], PyTree]) -> PyTree:
        """Compute a mean over the examples of all ranks: each counts by its number of examples."""
        return self.exchange.mean("mean", moment(self.local))

    def mean_of_all(self, taps: Mapping[str, Any], moments: Mapping[str, Callable[[AnyTap], PyTree]]) -> PyTree:
        """Compute the means of all blocks, and sum them over ranks in one message."""
        return self.exchange.mean("mean", {key: moment(taps[key].local) for key, moment in moments.items()})

    def input_moment(self, limit: int, summed: bool = False) -> Float[Tensor, "k i *i"]:
        """Return `Σ_nt a aᵀ` over all ranks; see `AnyTap`."""
        return self.exchange.moments(self.key, limit, summed, self.precision)[0]

    def output_moment(self, limit: int, summed: bool = False) -> Float[Tensor, "k o *o"]:
        """Return `Σ_snt g gᵀ` over all ranks; see `AnyTap`."""
        return self.exchange.moments(self.key, limit, summed, self.precision)[1]

    def whole(self) -> Tap:
        """Return the tap of all examples, gathered from all ranks."""
        return self._gathered.whole()  # type: ignore[no-any-return]

    def window(self, examples: slice) -> Any:
        """Return the tap of some examples of the global batch, gathered from all ranks."""
        return self._gathered.window(examples)

    def windows(self) -> Iterator[Tap]:
        """Yield the windows of the gathered tap."""
        return self._gathered.windows()  # type: ignore[no-any-return]

    def outputs(self) -> Float[Tensor, "k s n t o"]:
        """Return `g` of all examples, gathered from all ranks."""
        return self._gathered.outputs()  # type: ignore[no-any-return]

    def mean_gradient(self) -> Float[Tensor, "k o i"]:
        """Return `1/N Σ_n Σ_t g aᵀ` over the examples of all ranks."""
        return self.exchange.mean("gradient", self.local.mean_gradient())  # type: ignore[no-any-return]

    def each(self, compute: Callable[[AnyTap], Tensor]) -> Tensor:
        """Return `compute(tap)`, `[S, N, …]`, of all examples: computed on their ranks, then gathered."""
        mine, shard = compute(self.local), self.exchange.shard
        rows = mine.movedim(1, 0)[: shard.own]
        width = mine[:, 0].numel() * mine.element_size()
        found = self.exchange.ranks.gathered("per example", [rows], [count * width for count in shard.counts])
        parts = [
            from_bytes(flat, mine, (n, mine.shape[0], *mine.shape[2:]))
            for flat, n in zip(found, shard.counts, strict=True)
        ]
        return torch.cat(parts).movedim(0, 1)

    @property
    def _gathered(self) -> Any:
        return self._cast(self.exchange.whole(self.key))

    def _cast(self, tap: Any) -> Any:
        return tap if self.precision is None else tap.to(self.precision)
