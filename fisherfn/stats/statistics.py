"""The statistics of one batch as a value: raw tensors of each layer, converted to one tap at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import rows, tree
from fisherfn.errors import StructureError
from fisherfn.layers import balance, swapped_columns, swapped_rows
from fisherfn.stats.layout import Block, Layout, Use
from fisherfn.stats.processes import OneProcess
from fisherfn.taps import AnyTap, LazyTap, Sizes, Tap
from fisherfn.types import Matrix, PyTree, Tree, at_least_single


class LayerStats(NamedTuple):
    """A layer's raw statistics: one tensor per use, with the examples first; `()` for those not requested."""

    inputs: tuple[Tensor, ...]
    """Inputs of the layer, `[N, …]`, as it received them (those of a convolution are not unfolded)."""
    grads: tuple[Tensor, ...]
    """Output-gradients of the sampled labels, `[S, N, …]`."""
    loss_grads: tuple[Tensor, ...]
    """Output-gradients of the loss on the data, `[N, …]`: `N · ∂(mean loss)/∂output`."""


@dataclass(frozen=True)
class Stats(OneProcess):
    """Loss, gradient and curvature statistics of one batch. A pytree; the layout is its static part."""

    loss: Float[Tensor, ""]
    """The mean negative log-likelihood over the batch."""
    outputs: Tensor
    context: PyTree
    layers: dict[str, LayerStats]
    checks: dict[str, Tensor]
    layout: Layout
    plain: Tree = field(default_factory=dict)
    """The gradient of the mean loss for the parameters that are in no block and take the plain gradient."""
    losses: Tensor = field(default_factory=lambda: torch.full((1,), torch.nan))
    """The negative log-likelihood of each example; NaN in a watched pass, whose loss is not known."""
    empirical: bool = False
    """True if the Fisher is made of the gradients of the loss on the data."""

    @property
    def examples(self) -> int:
        """The number of examples, N."""
        block = self.layout.blocks[0]
        return self.layers[block.key].inputs[0].shape[0] // block.uses[0].repeats

    @property
    def coefficients(self) -> Float[Tensor, " n"] | None:
        """The c of the gradient `1/N Σ c_n W_n` in the per-example gradients of `taps`; None if there is no such c."""
        return self.losses.new_ones(self.examples, dtype=torch.float64) if self.empirical else None

    @property
    def taps(self) -> dict[str, Tap]:
        """The tap of every block for the sampled labels. `lazy_tap(key)` needs less memory: one block at a time."""
        return {block.key: self.tap(block.key) for block in self.layout.blocks}

    @property
    def grads(self) -> Tree:
        """The gradient of the mean loss, a tree like params. It is computed at each access, so keep the result."""
        matrices = {block.key: self.gradient(block.key) for block in self.layout.blocks}
        return self.layout.cast(self.layout.tree(matrices) | self.plain)

    def tap(self, key: str) -> Tap:
        """Return the block's tap for the sampled labels, with `a` as a tensor (an index for an embedding).

        Raises:
            StructureError: these statistics were made with `curvature=False`.
        """
        return self.lazy_tap(key).whole().plain()

    def loss_tap(self, key: str) -> Tap:
        """Return the block's tap for the data's targets: one sample, whose mean over examples is the gradient."""
        return self.lazy_loss_tap(key).whole().plain()

    def lazy_tap(self, key: str) -> AnyTap:
        """Return `tap(key)` computed on demand for a slice of examples, with `a` in its structured form."""
        stats = self.layers[key]
        if not stats.grads:
            raise StructureError(
                f"block {key!r} has no Fisher samples: these statistics were made with curvature=False. "
                "Call ng.stats without it to update the curvature."
            )
        return lazy(self.layout.block(key), stats.inputs, stats.grads)

    @property
    def lazy_taps(self) -> dict[str, AnyTap]:
        """The lazy tap of every block for the sampled labels, computed on demand for a slice of examples."""
        return {block.key: self.lazy_tap(block.key) for block in self.layout.blocks}

    def lazy_loss_tap(self, key: str) -> AnyTap:
        """Return `loss_tap(key)` computed on demand for a slice of examples."""
        stats = self.layers[key]
        return lazy(self.layout.block(key), stats.inputs, tuple(g.unsqueeze(0) for g in stats.loss_grads))

    def gradient(self, key: str) -> Matrix:
        """Return the gradient of the mean loss for one block, as its matrix."""
        stats = self.layers[key]
        return gradient(self.layout.block(key), stats.inputs, stats.loss_grads)


def _flatten(stats: Stats) -> tuple[list[Any], tuple[Layout, bool]]:
    fields = [stats.loss, stats.outputs, stats.context, stats.layers, stats.checks, stats.plain, stats.losses]
    return fields, (stats.layout, stats.empirical)


def _unflatten(children: list[Any], config: tuple[Layout, bool]) -> Stats:
    loss, outputs, context, layers, checks, plain, losses = children
    return Stats(loss, outputs, context, layers, checks, config[0], plain, losses, config[1])


tree.register(Stats, _flatten, _unflatten)


def gradient(block: Block, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> Matrix:
    """Compute `1/N Σ_n Σ_t g aᵀ` for one sample, in the fastest way the layer has, at least in float32."""
    dtype = at_least_single(grads[0].dtype)
    grads = [g.to(dtype) for g in grads]
    backward = block.family.weight_gradient
    if backward is None:
        return lazy(block, inputs, [g.unsqueeze(0) for g in grads]).mean_gradient()
    total: Matrix | None = None
    for use, x, g in zip(block.uses, inputs, grads, strict=True):
        x = x.to(dtype) if x.is_floating_point() else x  # indices stay indices
        weight = block.family.to_matrix(backward(x, g, use.config, block.weight_shape), use.config)
        if block.bias is not None:
            bias = block.family.columns(g.unsqueeze(0), use.config).sum((1, 2, 3)) * float(use.biased)
            weight = torch.cat([weight, bias.unsqueeze(-1)], -1)
        total = weight if total is None else total + weight
    assert total is not None
    return total / (inputs[0].shape[0] // block.uses[0].repeats)


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
