"""When to take statistics and when to refresh inverses, from the step number alone.

Inverses that are 50 steps old ruin the first epochs and do no harm later: factors change fast at first. So intervals
grow in proportion to the steps made, from a short one up to a ceiling. Nothing is measured, so vmapped members, ranks
and resumed runs agree on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from fisherfn.errors import HyperparameterError, expect_number


class Due(NamedTuple):
    """The refreshes that a step makes; `ng.step(..., **due._asdict())`."""

    update: bool
    invert: bool


@dataclass(frozen=True)
class Cadence:
    """Intervals that grow with the number of steps, `growth` times as long as the run so far.

    Attributes:
        update: shortest and longest interval between statistics, in steps.
        invert: the same of inverses.
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
        """Return the cadence of constant intervals."""
        return cls((update, update), (invert, invert))

    def __call__(self, step: int) -> Due:
        """Return what step number `step`, counted from 0, does."""
        return Due(self._hits(self.update, step), self._hits(self.invert, step))

    def _hits(self, bounds: tuple[int, int], step: int) -> bool:
        first, last = bounds
        marks, settled = self._marks[bounds]
        return step in marks if step < settled else (step - settled) % last == 0

    @cached_property
    def _marks(self) -> dict[tuple[int, int], tuple[frozenset[int], int]]:
        """For each pair of bounds the steps before intervals have their full length, and where they have it."""
        found = {}
        for first, last in (self.update, self.invert):
            at, marks = 0, set()
            while min(last, max(first, int(self.growth * at))) < last and self.growth > 0:
                marks.add(at)
                at += min(last, max(first, int(self.growth * at)))
            settled = at if self.growth > 0 else 0
            found[first, last] = frozenset(marks), settled
        return found
