"""Inversions and statistics that are dealt out, to ranks or to steps: each share costs about the same.

Shares follow from the shapes alone: the most expensive block goes to the share with the least work so far. A block with
factors of widths i and o costs i³ + o³ (a factor that is kept as its diagonal costs nothing).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from fisherfn.types import Shape

MOVED = 128
"""Multiplications in the time in which a number of a layer's rows is read and written as often as its use needs."""

SAME = 1.02
"""Ratio up to which two longest steps are equally long."""


def owners(costs: Mapping[str, float], size: int) -> dict[str, int]:
    """Return the owner of each block: the most expensive first, each to the owner with the least work so far."""
    work, found = [0.0] * size, {}
    for key in sorted(costs, key=lambda each: (-costs[each], each)):
        found[key] = min(range(size), key=lambda rank: (work[rank], rank))
        work[found[key]] += costs[key]
    return {key: found[key] for key in costs}


def costs(shapes: Mapping[str, Shape], limit: int) -> dict[str, float]:
    """Return the cost of inverting each block, in multiplications: k (i³ + o³); factors wider than `limit` are free."""
    return {
        key: k * float((0 if i > limit or one_hot else i**3) + (0 if o > limit else o**3))
        for key, (k, o, i, one_hot) in shapes.items()
    }


def moment_costs(shapes: Mapping[str, Shape], rows: Mapping[str, int], limit: int) -> dict[str, float]:
    """Return the cost of the moments of each block, in multiplications: k rows (i² + o²), and the rows themselves.

    A diagonal costs no product.
    """
    return {
        key: k * rows[key] * float((0 if i > limit or one_hot else i**2) + (0 if o > limit else o**2) + MOVED * (i + o))
        for key, (k, o, i, one_hot) in shapes.items()
    }


def backward_cost(shapes: Mapping[str, Shape], rows: Mapping[str, int]) -> float:
    """Return the cost of a backward pass to the activations, in multiplications."""
    return sum(k * rows[key] * float(o * i + MOVED * (i + o)) for key, (k, o, i, _) in shapes.items())


class Dealt(NamedTuple):
    """The blocks of each step of a period: those whose statistics are taken, and those that are inverted."""

    updates: tuple[frozenset[str], ...]
    inversions: tuple[frozenset[str], ...]
    longest: float
    """The cost of the refreshes in the longest step."""


def dealt(
    moments: Mapping[str, float],
    inversions: Mapping[str, float],
    backward: float,
    update_every: int,
    invert_every: int,
    together: bool = False,
) -> Dealt:
    """Deal statistics and inversions to the steps of a period, so that the longest step is short.

    Every step with statistics has a backward pass, whatever the number of its blocks. So the number of these steps is
    the smallest one with which the longest step is as short as with any other.

    Args:
        moments: the cost of each block's moments, taken every `update_every` steps.
        inversions: the cost of each block's inversion, made every `invert_every` steps.
        backward: the cost of a backward pass.
        update_every: steps between statistics of a block.
        invert_every: steps between inversions of a block, and the length of a period; a multiple of `update_every`.
        together: invert a block only in steps that update it.
    """
    numbers = range(1, update_every + 1)
    found = [_dealt(moments, inversions, backward, update_every, invert_every, together, n) for n in numbers]
    shortest = min(each.longest for each in found)
    return next(each for each in found if each.longest <= SAME * shortest)


def _dealt(
    moments: Mapping[str, float],
    inversions: Mapping[str, float],
    backward: float,
    update_every: int,
    invert_every: int,
    together: bool,
    number: int,
) -> Dealt:
    """Deal to a number of steps with statistics: expensive tasks first, each to the step with the least work."""
    slots = [slot * update_every // number for slot in range(number)]
    steps = {slot: range(slot, invert_every, update_every) for slot in slots}
    load = [backward if step % update_every in steps else 0.0 for step in range(invert_every)]
    updates: list[set[str]] = [set() for _ in load]
    inverted: list[set[str]] = [set() for _ in load]
    tasks = [(cost, key, True) for key, cost in moments.items()]
    tasks += [] if together else [(cost, key, False) for key, cost in inversions.items()]
    for cost, key, updating in sorted(tasks, key=lambda task: (-task[0] - together * inversions[task[1]], task[1:])):
        if updating:
            slot = min(slots, key=lambda at: (max(load[step] for step in steps[at]), at))
            for step in steps[slot]:
                updates[step].add(key)
                load[step] += cost
        if together or not updating:
            allowed = steps[slot] if together else range(invert_every)
            step = min(allowed, key=lambda at: (load[at], at))
            inverted[step].add(key)
            load[step] += inversions[key]
    return Dealt(tuple(map(frozenset, updates)), tuple(map(frozenset, inverted)), max(load))
