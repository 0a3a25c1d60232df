"""The data-parallel natural gradient: the calls of `NaturalGradient`, for a batch that is spread over ranks.

A step sends, in order: the agreement (a few whole numbers per rank), the gradient with all scalars, in steps that
update the moments of all blocks, and in steps that invert the inverses, each from its owner. Parameters and state are
equal on all ranks, and nothing else is sent. If owners precondition (`preconditioners.py`), they keep their inverses,
and every step sends the preconditioned gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fisherfn import tree
from fisherfn.distributed.agreement import agreed, of_tensors
from fisherfn.distributed.ranks import Ranks, Shard
from fisherfn.distributed.sharded import placement, sharding_of, stand_ins
from fisherfn.distributed.states import SharedStates, same_model
from fisherfn.distributed.stats import ReducedStats, reduced, stand_in
from fisherfn.errors import EmptyBatchError, StructureError, expect
from fisherfn.randomness import dropout_seeds
from fisherfn.state import State
from fisherfn.stats import Batch, FisherKind, Layout, Stats, independent, pair
from fisherfn.stats.batch import Checked, check_fisher, checked
from fisherfn.stats.whole import is_sharded
from fisherfn.types import PyTree, Tree


@dataclass(frozen=True)
class DataParallel(SharedStates):
    """A natural gradient whose batches are spread over ranks. Made by `data_parallel`."""

    def init(self, params: Tree, *, damping: float | Tensor = 1e-3, ema: float | Tensor = 0.95) -> State:
        """Return the empty state; see `NaturalGradient.init`.

        Raises:
            RankError: the parameters, the damping or the average differ between ranks.
        """

        def fits() -> int:
            sharding_of(params, self.ranks)
            return 0

        whole = {name: leaf for name, leaf in params.items() if not is_sharded(leaf)}
        facts = {
            "the initial parameters": (of_tensors(whole), placement(params)),
            "damping and ema": (float(damping), float(ema)),
        }
        agreed(self.ranks, facts, fits)
        return super().init(stand_ins(params), damping=damping, ema=ema)

    def for_shape(self, params: Tree, x: PyTree, *, context: PyTree = None) -> DataParallel:
        """Return the natural gradient for inputs of another example shape; see `NaturalGradient.for_shape`.

        Raises:
            StructureError: the net now couples the examples of a batch, or has other blocks on these inputs.
        """
        found = super().for_shape(params, x, context=context)
        check_uncoupled(found.layout, self.ranks)
        return found

    def noise(self, batch: Batch, generator: torch.Generator, *, samples: int | None = None) -> Tensor:
        """Return this rank's part of the noise of the global batch; all ranks pass generators in the same state."""
        expect(generator, torch.Generator, "generator", "pass a torch.Generator, from which the labels are sampled")
        given = Checked(*pair(batch), (), _count(pair(batch)[0]))
        shard = self._agreed({"the generator": of_tensors({"state": generator.get_state()})}, lambda: given.examples)
        return self._noise_for(shard, given, generator, samples)

    def stats(
        self,
        params: Tree,
        batch: Batch,
        *,
        fisher: FisherKind | None = None,
        samples: int | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        context: PyTree = None,
        chunk_size: int | None = None,
        curvature: bool | Collection[str] = True,
    ) -> ReducedStats:
        """Return loss, gradient and curvature statistics of the global batch; `batch` is this rank's part.

        Parts may have different numbers of examples, also none. Labels are sampled for the global batch and sliced, so
        generators must be in the same state on all ranks; `noise` and entries of the context per example are this
        rank's. See `NaturalGradient.stats`.

        Raises:
            RankError: on every rank, if the ranks disagree or the call failed on one of them.
        """
        kind = self.fisher_kind if fisher is None else fisher
        sampled = bool(curvature) and kind == "mc"
        blocks = sorted(curvature) if isinstance(curvature, Collection) else curvature
        facts = {
            "the arguments of ng.stats": (kind, samples, blocks, sampled and noise is None, placement(params)),
            "the generator": of_tensors({"state": generator.get_state()}) if sampled and generator is not None else 0,
        }
        shard = self._agreed(facts, partial(self._count, params, batch, kind, context))
        sharding = sharding_of(params, self.ranks)
        params = params if sharding is None else sharding.gather(params)
        if shard.own == 0:
            batch, context = stand_in(pair(batch)), self._stand_in_context(context)
            noise = None if noise is None else stand_in(noise)
        if sampled and noise is None and generator is not None:
            given = Checked(*pair(batch), (), max(shard.own, 1))
            noise = self._noise_for(shard, given, generator, samples)
        found = super().stats(
            params, batch, fisher=fisher, samples=samples, noise=noise, context=context, chunk_size=chunk_size,
            curvature=curvature,
        )  # fmt: skip
        found.checks["chunks"] = self._independent(found, pair(batch)[1], shard)
        return reduced(found, self.ranks, shard, sharding)

    def dropout_seeds(self, examples: int, generator: torch.Generator) -> Tensor:
        """Return this rank's slice of the dropout seeds of the global batch; see `ff.dropout_seeds`."""
        facts = {"the generator": of_tensors({"state": generator.get_state()})}
        shard = self._agreed(facts, lambda: examples)
        return dropout_seeds(shard.total, generator)[shard.start : shard.start + shard.own]

    def reduced(self, stats: Stats) -> ReducedStats:
        """Return the statistics of the global batch, given those of this rank, as `ff.join` returns them."""
        expect(stats, Stats, "stats", "pass what ng.local.stats(params, batch) or ff.join returned")
        sampled = [key for key, layer in stats.layers.items() if layer.grads]
        shard = self._agreed({"the kind of statistics": sampled}, lambda: stats.examples)
        return reduced(stats, self.ranks, shard)

    # ---------------------------------------------------------------------------------------------------------

    def _check_step(self, state: State, grads: Tree | Stats, stats: Stats | None, **options: Any) -> None:
        """Raise one `RankError` on every rank if the ranks disagree on the arguments, or if one's do not fit."""

        def fits() -> int:
            super(DataParallel, self)._check_step(state, grads, stats)
            for given in (grads, stats):
                if isinstance(given, Stats):
                    expect(given, ReducedStats, "statistics", "pass what ng.stats or ng.reduced returned")
            if not isinstance(grads, Stats):
                self.layout.validate(grads)  # whole, unlike in ng.precondition
            return 0

        invert, inner, damping = (options[name] for name in ("invert", "inner", "damping"))
        blocks = sorted(invert) if isinstance(invert, Collection) else invert
        sampled = isinstance(stats, Stats) and [key for key, layer in stats.layers.items() if layer.grads]
        asked = (blocks, inner, damping is not None, isinstance(grads, Stats), sampled)
        agreed(self.ranks, {"the arguments of a step (invert, inner, damping, statistics)": asked}, fits)

    def _gradients(self, stats: Stats) -> Mapping[str, Any]:
        return stats.matrices if isinstance(stats, ReducedStats) else super()._gradients(stats)

    def _agreed(self, facts: Mapping[str, object], check: Callable[[], int]) -> Shard:
        facts = {**same_model(self), "the batch": 0, **facts}
        return agreed(self.ranks, facts, check)

    def _count(self, params: Tree, batch: Batch, kind: str, context: PyTree) -> int:
        """Return the number of this rank's examples, once all that can be checked before the run fits."""
        sharding_of(params, self.ranks)
        self.layout.validate(stand_ins(params))
        check_fisher(kind)
        try:
            return checked(self.layout, batch, context).examples
        except EmptyBatchError:
            return 0

    def _noise_for(self, shard: Shard, given: Checked, generator: torch.Generator, samples: int | None) -> Tensor:
        """Return this rank's slice of the noise of the global batch."""
        whole = self._drawn(given._replace(examples=shard.total), generator, samples)
        return whole[shard.start : shard.start + shard.own] if shard.own else whole[:1]

    def _stand_in_context(self, context: PyTree) -> PyTree:
        if context is None:
            return None
        pairs = zip(tree.leaves(context), self.layout.by_example(context), strict=True)
        return tree.replace_leaves(context, [stand_in(leaf) if mine else leaf for leaf, mine in pairs])

    def _independent(self, stats: Stats, targets: PyTree, shard: Shard) -> Tensor:
        """Return False if the likelihood couples examples, whose global loss no rank can compute."""
        if shard.own < 2 or self.ranks.size == 1:
            return stats.loss.new_ones((), dtype=torch.bool)
        return independent(self.likelihood, stats.outputs, targets, shard.own // 2)


def check_uncoupled(layout: Layout, ranks: Ranks) -> None:
    """Raise `StructureError` if there are several ranks and the net couples the examples of a batch."""
    if layout.couples and ranks.size > 1:
        raise StructureError(
            "the net couples the examples of a batch (batch norm in training mode), and each rank would normalise by "
            "its own examples only: the result would depend on the number of ranks. Use layer or group norm, or batch "
            "norm in evaluation mode."
        )


def _count(x: PyTree) -> int:
    return int(tree.leaves(x)[0].shape[0])
