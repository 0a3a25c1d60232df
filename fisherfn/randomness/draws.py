"""Calls for random numbers and their axes of examples, found by runs with two and with three examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Size

UNKNOWN = -1
"""The axis of the examples if it cannot be found."""


class Draw(NamedTuple):
    """A call for random numbers.

    Attributes:
        shape: shape of the numbers for two examples.
        axis: axis of the examples; None for numbers that all examples share, `UNKNOWN` if it cannot be found.
    """

    shape: Size
    axis: int | None

    def fits(self, shape: Size, examples: int) -> bool:
        """Return True if a call of this shape may be the same call, with this number of examples."""
        if self.axis is None or self.axis == UNKNOWN:
            return self.axis == UNKNOWN or shape == self.shape
        return shape == Size(n * examples // 2 if at == self.axis else n for at, n in enumerate(self.shape))


def draws_of(two: Sequence[Size], three: Sequence[Size]) -> list[Draw]:
    """Return the calls for random numbers of a run, given their shapes with two and with three examples."""
    return [Draw(shape, _axis(shape, longer)) for shape, longer in zip(two, three, strict=True)]


def _axis(shape: Size, longer: Size) -> int | None:
    if shape == longer:
        return None
    axes = [axis for axis, (a, b) in enumerate(zip(shape, longer, strict=False)) if a != b]
    one = len(axes) == 1 and len(shape) == len(longer) and 3 * shape[axes[0]] == 2 * longer[axes[0]]
    return axes[0] if one else UNKNOWN
