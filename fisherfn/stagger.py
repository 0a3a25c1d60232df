"""Staggered refreshes: a few blocks are inverted in each step, so that no step takes much longer than the others.

A refresh of all blocks makes one step in T several times as long as the others, which matters where steps are
synchronised or have a deadline. Here block b is inverted in steps ≡ s(b) mod T. Each block is then refreshed as often
as before, and its inverse is T steps old at most; only the blocks no longer change at the same time. The blocks are
dealt to the steps by cost (`fisherfn.shares`), and steps with statistics get none, because they are longer anyway.

E-KFAC finds its eigenvectors in updates, so its blocks are dealt to the steps with statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fisherfn.errors import HyperparameterError, StructureError, expect, expect_number
from fisherfn.natgrad import NaturalGradient
from fisherfn.shares import costs, owners


class DueBlocks(NamedTuple):
    """The refreshes of one step, passed as `ng.step(..., **due._asdict())`: statistics, and the blocks to invert."""

    update: bool
    invert: bool | frozenset[str]


@dataclass(frozen=True)
class Staggered:
    """A cadence that inverts a few blocks at a time. Made by `staggered`.

    Attributes:
        update_every: steps between statistics.
        groups: the keys of the blocks that are inverted in each step of a period.
    """

    update_every: int
    groups: tuple[frozenset[str], ...]

    def __call__(self, step: int) -> DueBlocks:
        """Return the refreshes of step number `step`, counted from 0; the first inverts all blocks."""
        return DueBlocks(step % self.update_every == 0, not step or self.groups[step % len(self.groups)])


def staggered(ng: NaturalGradient, update_every: int = 5, invert_every: int = 10) -> Staggered:
    """Return a cadence that refreshes every block once in `invert_every` steps, and few blocks in each.

    Pass its result to a step as `ng.step(params, state, batch, **cadence(step)._asdict())`. A compiled step is
    compiled once for each group of blocks.

    Args:
        ng: the natural gradient, whose blocks are dealt to the steps.
        update_every: steps between statistics.
        invert_every: steps between two inversions of the same block, a multiple of `update_every`.

    Raises:
        HyperparameterError: an interval that is not a whole number, or not a multiple.
        StructureError: the method couples the blocks.
    """
    expect(ng, NaturalGradient, "ng", "pass what ff.natural_gradient returned")
    for name, every in (("update_every", update_every), ("invert_every", invert_every)):
        expect_number(name, every, lambda v: v >= 1, "must be a whole number of steps >= 1", whole=True)
    if invert_every % update_every:
        raise HyperparameterError(
            f"invert_every, {invert_every}, must be a multiple of update_every, {update_every}: a block is inverted in "
            "the same place of every period."
        )
    if ng.method.couples:
        raise StructureError(f"{ng.method.name} couples its blocks, so it inverts them together: use ff.Cadence.")
    with_statistics = range(0, invert_every, update_every)
    without = [step for step in range(invert_every) if step not in with_statistics]
    steps = list(with_statistics) if ng.method.inverts_updated or not without else without
    work = costs(ng.layout.block_shapes, getattr(ng.method, "diagonal_above", 0))
    place = owners(work, len(steps))
    groups = [frozenset(key for key in place if steps[place[key]] == step) for step in range(invert_every)]
    return Staggered(update_every, tuple(groups))
