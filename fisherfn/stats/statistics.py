"""The statistics of one batch as a value: raw tensors of each layer, from which one tap at a time is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import tree
from fisherfn.errors import StructureError
from fisherfn.stats.layout import Block, Layout
from fisherfn.types import PyTree, Tap, Tree


class LayerStats(NamedTuple):
    """A layer's raw statistics, one tensor a use. `()` where they were not asked for."""

    inputs: tuple[Tensor, ...]
    """`[N, …]`, as the layer saw them (a convolution's are not unfolded)."""
    grads: tuple[Tensor, ...]
    """`[S, N, …]`: output-gradients of the Fisher's draws."""
    loss_grads: tuple[Tensor, ...]
    """`[N, …]`: output-gradients of the data's loss, `N · ∂(mean loss)/∂output`."""


@dataclass(frozen=True)
class Stats:
    """What one batch says: loss, gradient and curvature statistics. A pytree; the layout is its static part."""

    loss: Float[Tensor, ""]
    """Mean negative log-likelihood over the batch."""
    outputs: Tensor
    context: PyTree
    layers: dict[str, LayerStats]
    checks: dict[str, Tensor]
    layout: Layout

    @property
    def taps(self) -> dict[str, Tap]:
        """Every block's tap of the Fisher's draws. Prefer `tap(key)` where one at a time will do."""
        return {block.key: self.tap(block.key) for block in self.layout.blocks}

    @property
    def grads(self) -> Tree:
        """The gradient of the mean loss, formed from the taps at each call: keep it if you need it twice."""
        return self.layout.tree({block.key: gradient(self.loss_tap(block.key)) for block in self.layout.blocks})

    def tap(self, key: str) -> Tap:
        """The block's tap of the Fisher's draws.

        Raises:
            StructureError: these statistics were made with `curvature=False`.
        """
        stats = self.layers[key]
        if not stats.grads:
            raise StructureError(
                f"block {key!r} has no Fisher draws: these statistics were made with curvature=False. "
                "Call ng.stats without it to update the curvature."
            )
        return make_tap(self.layout.block(key), stats.inputs, stats.grads)

    def loss_tap(self, key: str) -> Tap:
        """The block's tap of the data's own targets: one draw, whose mean over examples is the gradient."""
        stats = self.layers[key]
        return make_tap(self.layout.block(key), stats.inputs, tuple(g.unsqueeze(0) for g in stats.loss_grads))


def _flatten(stats: Stats) -> tuple[list[Any], Layout]:
    return [stats.loss, stats.outputs, stats.context, stats.layers, stats.checks], stats.layout


def _unflatten(children: list[Any], layout: Layout) -> Stats:
    loss, outputs, context, layers, checks = children
    return Stats(loss, outputs, context, layers, checks, layout)


tree.register(Stats, _flatten, _unflatten)


def gradient(tap: Tap) -> Float[Tensor, "k o i"]:
    """The mean over examples of `Σ_s Σ_t g aᵀ`: the gradient, when the tap is a loss tap."""
    k, s, n, t, o = tap.g.shape
    g = tap.g.sum(1) if s > 1 else tap.g.squeeze(1)
    a = tap.a.to(g.dtype)
    return g.reshape(k, n * t, o).mT @ a.reshape(k, n * t, -1) / n


def make_tap(block: Block, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> Tap:
    """Raw statistics as `(a, g)`: uses are concatenated along the shared positions, the bias is a column of `a`."""
    rows = [
        _with_bias(block, use.biased, block.family.rows(x, use.facts))
        for use, x in zip(block.uses, inputs, strict=True)
    ]
    columns = [block.family.columns(g, use.facts) for use, g in zip(block.uses, grads, strict=True)]
    if len(rows) == 1:
        return Tap(rows[0], columns[0])
    return Tap(torch.cat(rows, 2), torch.cat(columns, 3))


def _with_bias(block: Block, biased: bool, a: Float[Tensor, "k n t i"]) -> Tensor:
    if block.bias is None:
        return a
    return torch.cat([a, a.new_full((*a.shape[:-1], 1), float(biased))], -1)


def join(parts: Sequence[tuple[int, Stats]]) -> Stats:
    """Statistics of chunks, each with its number of examples, as those of the whole batch."""
    chunks = [chunk for _, chunk in parts]
    first = chunks[0]
    total = sum(size for size, _ in parts)
    loss = torch.stack([size / total * chunk.loss for size, chunk in parts]).sum()
    layers = {
        key: LayerStats(
            *(_cat([chunk.layers[key][field] for chunk in chunks], axis) for field, axis in enumerate((0, 1, 0)))
        )
        for key in first.layers
    }
    checks = {name: torch.stack([chunk.checks[name] for chunk in chunks]).all() for name in first.checks}
    outputs = torch.cat([chunk.outputs for chunk in chunks])
    return Stats(loss, outputs, chunks[-1].context, layers, checks, first.layout)


def _cat(parts: Sequence[tuple[Tensor, ...]], axis: int) -> tuple[Tensor, ...]:
    return tuple(torch.cat(use, axis) for use in zip(*parts, strict=True))
