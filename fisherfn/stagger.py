"""Staggered refreshes: few blocks are refreshed in each step, so that no step takes much longer than the others.

A refresh of all blocks makes one step in T several times as long as the others, which matters where steps are
synchronised or have a deadline. Here block b takes its statistics in steps ≡ u(b) mod U, and is inverted in steps
≡ s(b) mod T. Each block is then refreshed as often as before; only the blocks no longer change at the same time. They
are dealt to the steps by cost (`fisherfn.shares`). A step with statistics of any block has the backward pass of the
sampled labels, so that spreading them makes the average step a little longer.

E-KFAC finds its eigenvectors in updates, so its blocks are inverted in steps that update them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fisherfn.errors import HyperparameterError, StructureError, expect, expect_count, expect_number
from fisherfn.natgrad import NaturalGradient
from fisherfn.shares import backward_cost, costs, dealt, moment_costs, owners

EXAMPLES = 256
"""The batch size for which statistics are dealt to the steps, unless another one is given."""


class DueBlocks(NamedTuple):
    """The blocks to refresh in one step, passed as `ng.step(..., **due._asdict())`: all, none, or those with keys."""

    update: bool | frozenset[str]
    invert: bool | frozenset[str]


@dataclass(frozen=True)
class Staggered:
    """A cadence that refreshes few blocks at a time. Made by `staggered`.

    Attributes:
        update_every: steps between statistics of a block.
        groups: the keys of the blocks that are inverted in each step of a period.
        updates: the keys of the blocks whose statistics are taken in each step of a period; if empty, those of all
            blocks are taken together.
    """

    update_every: int
    groups: tuple[frozenset[str], ...]
    updates: tuple[frozenset[str], ...] = ()

    def __call__(self, step: int) -> DueBlocks:
        """Return the refreshes of step number `step`, counted from 0; the first refreshes all blocks."""
        if not step:
            return DueBlocks(True, True)
        at = step % len(self.groups)
        return DueBlocks(self.updates[at] if self.updates else step % self.update_every == 0, self.groups[at])


def staggered(
    ng: NaturalGradient,
    update_every: int = 5,
    invert_every: int = 10,
    *,
    stagger_statistics: bool = True,
    examples: int = EXAMPLES,
) -> Staggered:
    """Return a cadence that refreshes every block as often as a usual one, and few blocks in each step.

    Pass its result to a step as `ng.step(params, state, batch, **cadence(step)._asdict())`. A compiled step is
    compiled once for each group of blocks.

    Args:
        ng: the natural gradient, whose blocks are dealt to the steps.
        update_every: steps between statistics of the same block.
        invert_every: steps between two inversions of the same block, a multiple of `update_every`.
        stagger_statistics: False takes the statistics of all blocks together, with one backward pass in
            `update_every` steps: the average step is shorter, and the longest one longer.
        examples: number of examples per batch, from which the cost of statistics follows.

    Raises:
        HyperparameterError: an interval or a batch size that is not a whole number >= 1, or no multiple.
        StructureError: the method couples the blocks.
    """
    expect(ng, NaturalGradient, "ng", "pass what ff.natural_gradient returned")
    for name, every in (("update_every", update_every), ("invert_every", invert_every)):
        expect_number(name, every, lambda v: v >= 1, "must be a whole number of steps >= 1", whole=True)
    expect_count("examples", examples)
    if invert_every % update_every:
        raise HyperparameterError(
            f"invert_every, {invert_every}, must be a multiple of update_every, {update_every}: a block is inverted in "
            "the same place of every period."
        )
    if ng.method.couples:
        raise StructureError(f"{ng.method.name} couples its blocks, so it inverts them together: use ff.Cadence.")
    limit = getattr(ng.method, "diagonal_above", 0)
    work, together = costs(ng.layout.block_shapes, limit), ng.method.inverts_updated
    if stagger_statistics:
        rows = {block.key: examples * block.positions for block in ng.layout.blocks}
        moments = moment_costs(ng.layout.block_shapes, rows, limit)
        backward = backward_cost(ng.layout.block_shapes, rows)
        shares = dealt(moments, work, backward, update_every, invert_every, together)
        return Staggered(update_every, shares.inversions, shares.updates)
    with_statistics = range(0, invert_every, update_every)
    without = [step for step in range(invert_every) if step not in with_statistics]
    steps = list(with_statistics) if together or not without else without
    place = owners(work, len(steps))
    groups = [frozenset(key for key in place if steps[place[key]] == step) for step in range(invert_every)]
    return Staggered(update_every, tuple(groups))
