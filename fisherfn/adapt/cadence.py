"""Cadences: the steps that refresh statistics and inverses, from the step number alone.

Factors change fast at first, so inverses that are 50 steps old ruin the first epochs and do no harm later. Intervals
therefore grow in proportion to the number of steps, from a short one to a longest one. They depend on no measurement,
so they are the same for vmapped members, ranks and resumed runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from fisherfn.errors import HyperparameterError, expect_number


class Due(NamedTuple):
    """The refreshes of one step, passed as `ng.step(..., **due._asdict())`."""

    update: bool
    invert: bool


@dataclass(frozen=True)
class Cadence:
    """Intervals that grow with the number of steps: `growth` times the steps made so far.

    Attributes:
        update: shortest and longest interval between statistics, in steps.
        invert: shortest and longest interval between inverses, in steps.
        growth: interval divided by the steps made.

    >>> Cadence((2, 10), (4, 20))(0)
    Due(update=True, invert=True)
    >>> [step for step in range(100) if Cadence((2, 10), (4, 20))(step).invert]
    [0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 57, 62, 68, 74, 81, 89, 97]
    """

    update: tuple[int, int] = (2, 10)
    invert: tuple[int, int] = (4, 20)
    growth: float = 0.1

    def __post_init__(self) -> None:
        """Check the intervals."""
        expect_number("growth", self.growth, lambda v: v >= 0, "must be >= 0")
        for name in ("update", "invert"):
            first, last = getattr(self, name)
            for value in (first, last):
                expect_number(name, value, lambda v: v >= 1, "must be a whole number of steps >= 1", whole=True)
            if first > last:
                raise HyperparameterError(
                    f"{name}: the shortest interval, {first}, is longer than the longest, {last}."
                )

    @classmethod
    def fixed(cls, update: int, invert: int) -> Cadence:
        """Return a cadence with constant intervals."""
        return cls((update, update), (invert, invert))

    def __call__(self, step: int) -> Due:
        """Return the refreshes of step number `step`, counted from 0."""
        return Due(self._hits(self.update, step), self._hits(self.invert, step))

    def _hits(self, bounds: tuple[int, int], step: int) -> bool:
        first, last = bounds
        marks, settled = self._marks[bounds]
        return step in marks if step < settled else (step - settled) % last == 0

    @cached_property
    def _marks(self) -> dict[tuple[int, int], tuple[frozenset[int], int]]:
        """Return for each pair of bounds the refreshes at growing intervals, and the step at which growth ends."""
        found = {}
        for first, last in (self.update, self.invert):
            at, marks = 0, set()
            while min(last, max(first, int(self.growth * at))) < last and self.growth > 0:
                marks.add(at)
                at += min(last, max(first, int(self.growth * at)))
            settled = at if self.growth > 0 else 0
            found[first, last] = frozenset(marks), settled
        return found
