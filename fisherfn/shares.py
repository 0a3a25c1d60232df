"""Inversions that are dealt out, to ranks or to steps: each share costs about the same.

Shares follow from the shapes alone: the most expensive block goes to the share with the least work so far. A block with
factors of widths i and o costs i³ + o³ (a factor that is kept as its diagonal costs nothing).
"""

from __future__ import annotations

from collections.abc import Mapping

from fisherfn.types import Shape


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
