"""Calls for random numbers, and where their numbers have the examples, from runs of two and of three examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Size

UNKNOWN = -1
"""Axis of the examples where it is not to be found."""


class Draw(NamedTuple):
    """A call for random numbers.

    Attributes:
        shape: with two examples.
        axis: of the examples; None for numbers that all examples share, `UNKNOWN` where it is not to be found.
    """

    shape: Size
    axis: int | None

    def fits(self, shape: Size, examples: int) -> bool:
        """Whether a call of this shape may be the same one, for so many examples."""
        if self.axis is None or self.axis == UNKNOWN:
            return self.axis == UNKNOWN or shape == self.shape
        return shape == Size(n * examples // 2 if at == self.axis else n for at, n in enumerate(self.shape))


def draws_of(two: Sequence[Size], three: Sequence[Size]) -> list[Draw]:
    """The calls for random numbers of a run, from their shapes with two examples and with three."""
    return [Draw(shape, _axis(shape, longer)) for shape, longer in zip(two, three, strict=True)]


def _axis(shape: Size, longer: Size) -> int | None:
    if shape == longer:
        return None
    axes = [axis for axis, (a, b) in enumerate(zip(shape, longer, strict=False)) if a != b]
    one = len(axes) == 1 and len(shape) == len(longer) and 3 * shape[axes[0]] == 2 * longer[axes[0]]
    return axes[0] if one else UNKNOWN
