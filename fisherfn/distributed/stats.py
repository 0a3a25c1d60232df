"""Statistics of a batch that is spread over ranks: the loss, gradient and taps of the global batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import tree
from fisherfn.distributed.ranks import Ranks, Shard
from fisherfn.distributed.sharded import Sharding
from fisherfn.distributed.taps import Exchange, Raw, ReducedTap
from fisherfn.errors import StructureError
from fisherfn.stats import Layout, Stats
from fisherfn.stats.processes import spread, squared_error
from fisherfn.types import Matrix, PyTree, Tree


@dataclass(frozen=True)
class ReducedStats(Stats):
    """Statistics of a batch whose examples are on several ranks. Made by `data_parallel(ng).stats`.

    Loss, gradients, checks and taps are those of the global batch; `outputs`, `context` and `layers` are this rank's.
    """

    matrices: dict[str, Tensor] = field(default_factory=dict)
    """The gradient of the mean loss over all ranks, one matrix per block."""
    ranks: Ranks = field(default_factory=Ranks)
    shard: Shard = Shard(0, (0,))
    sharding: Sharding | None = None
    """The placement of the parameters, which gradients and steps take; None if they are whole."""

    @property
    def grads(self) -> Tree:
        """The gradient of the mean loss of the global batch, a tree like params, sharded if these are."""
        whole = super().grads
        return whole if self.sharding is None else self.sharding.scatter(whole)

    @property
    def examples(self) -> int:
        """The number of examples of the global batch, N."""
        return self.shard.total

    def total(self, here: int) -> int:
        """Return the number of examples of the global batch."""
        del here
        return self.shard.total

    def part(self, wanted: int, here: int) -> list[int]:
        """Return which examples of this rank are among `wanted` ones spread over the global batch."""
        own = range(self.shard.start, self.shard.start + min(self.shard.own, here))
        return [at - own.start for at in spread(wanted, self.shard.total) if at in own]

    def mean(self, value: PyTree, examples: int) -> PyTree:
        """Return the mean over the examples of all ranks, given the mean over `examples` ones here, in one message."""
        leaves = [leaf.double() for leaf in tree.leaves(value)]
        mine = [examples * leaf if examples else torch.zeros_like(leaf) for leaf in leaves]
        *sums, count = self.ranks.total("scalars", [*mine, leaves[0].new_tensor(examples)])
        means = [total / count for total in sums]
        return tree.replace_leaves(value, [m.to(leaf) for m, leaf in zip(means, tree.leaves(value), strict=True)])

    def measured(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Return the mean of the losses of the global batch, and its squared standard error."""
        mine = self.losses.double()
        own = mine.mean() if self.shard.own else mine.sum()
        squares = (mine - own).square().sum()
        _, table = self.ranks.total_and_table("scalars", [], torch.stack([own, squares]))
        counts = table.new_tensor(self.shard.counts)
        mean = (counts * table[:, 0]).sum() / self.examples
        variance = (table[:, 1] + counts * (table[:, 0] - mean).square()).sum() / self.examples
        return mean, squared_error(variance, self.examples)

    def gradient(self, key: str) -> Matrix:
        """Return the gradient of the mean loss over all ranks for one block, as its matrix."""
        return self.matrices[key]

    def lazy_tap(self, key: str) -> ReducedTap:
        """Return the tap of a block for the sampled labels of the global batch."""
        if not self.layers[key].grads:
            raise StructureError(
                f"block {key!r} has no Fisher samples: these statistics were made with curvature=False or for other "
                "blocks. Call ng.stats without it to update the curvature."
            )
        return self._sampled.tap(key)

    def lazy_loss_tap(self, key: str) -> ReducedTap:
        """Return the tap of a block for the targets of the global batch."""
        return self._observed.tap(key)

    @cached_property
    def _sampled(self) -> Exchange:
        raw = {key: Raw(stats.inputs, stats.grads) for key, stats in self.layers.items() if stats.grads}
        return Exchange(self.ranks, self.shard, self.layout, raw)

    @cached_property
    def _observed(self) -> Exchange:
        raw = {
            key: Raw(stats.inputs, tuple(g.unsqueeze(0) for g in stats.loss_grads))
            for key, stats in self.layers.items()
        }
        return Exchange(self.ranks, self.shard, self.layout, raw)


def reduced(stats: Stats, ranks: Ranks, shard: Shard, sharding: Sharding | None = None) -> ReducedStats:
    """Return the statistics of the global batch, given those of this rank: one message of gradients and scalars."""
    grads = {block.key: stats.gradient(block.key) for block in stats.layout.blocks}
    mine = [shard.weighted(leaf) for leaf in [*grads.values(), *stats.plain.values()]]
    own = shard.own > 0
    loss = stats.loss.detach().double()
    # the ranks with at most one chunk of examples have no such mask, and all messages need the same length
    given = {"chunks": torch.ones_like(loss, dtype=torch.bool), **stats.checks}
    checks = [mask.double() if own else torch.ones_like(loss) for mask in given.values()]
    scalars = torch.stack([loss if own else torch.zeros_like(loss), *checks])
    sums, table = ranks.total_and_table("gradient", mine, scalars)
    counts = table.new_tensor(shard.counts)
    mean = (counts * table[:, 0]).sum() / shard.total
    masks = {name: (table[:, at] == 1).all() for at, name in enumerate(given, start=1)}
    matrices, plain = dict(zip(grads, sums, strict=False)), dict(zip(stats.plain, sums[len(grads) :], strict=True))
    outputs, losses = (stats.outputs, stats.losses) if own else (stats.outputs[:0], stats.losses[:0])
    return ReducedStats(
        mean.to(stats.loss), outputs, stats.context, stats.layers, masks, stats.layout,
        {name: grad.to(stats.plain[name]) for name, grad in plain.items()}, losses,
        stats.empirical, (), matrices, ranks, shard, sharding,
    )  # fmt: skip


def stand_in(values: PyTree) -> PyTree:
    """Return one example of zeros for an empty shard; it counts as no example."""
    return tree.map(lambda leaf: leaf.new_zeros(1, *leaf.shape[1:]) if isinstance(leaf, Tensor) else leaf, values)


def _flatten(stats: ReducedStats) -> tuple[list[Any], tuple[Layout, bool, Ranks, Shard, Sharding | None]]:
    children = [
        stats.loss, stats.outputs, stats.context, stats.layers, stats.checks, stats.plain, stats.losses, stats.matrices
    ]  # fmt: skip
    return children, (stats.layout, stats.empirical, stats.ranks, stats.shard, stats.sharding)


def _unflatten(children: list[Any], static: tuple[Layout, bool, Ranks, Shard, Sharding | None]) -> ReducedStats:
    loss, outputs, context, layers, checks, plain, losses, matrices = children
    layout, empirical, ranks, shard, sharding = static
    return ReducedStats(
        loss,
        outputs,
        context,
        layers,
        checks,
        layout,
        cast(Tree, plain),
        losses,
        empirical,
        (),
        matrices,
        ranks,
        shard,
        sharding,
    )


tree.register(ReducedStats, _flatten, _unflatten)
