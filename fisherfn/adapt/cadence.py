"""Cadences: the steps that refresh statistics and inverses, from the step number alone.

Factors change fast at first, so inverses that are 50 steps old ruin the first epochs and do no harm later. Intervals
therefore grow in proportion to the number of steps, from a short one to a longest one. They depend on no measurement,
so they are the same for vmapped members, ranks and resumed runs.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from fisherfn.errors import HyperparameterError, expect_number

FOREVER = 2**53
"""A number of steps that no run makes."""


class Due(NamedTuple):
    """The refreshes of one step, passed as `ng.step(..., **due._asdict())`."""

    update: bool
    invert: bool


@dataclass(frozen=True)
class Cadence:
    """Intervals that grow with the number of steps: `growth` times the steps made so far.

    Inverses that are due wait for the next statistics. They are thus of new statistics, which E-KFAC's basis and the
    coarse correction of two-level methods need. Where statistics are rarer than inverses, these are refreshed between
    them as well, which matters only for a new damping.

    Attributes:
        update: shortest and longest interval between statistics, in steps.
        invert: shortest and longest interval between inverses, in steps.
        growth: interval divided by the steps made; 0 for the shortest intervals throughout.

    >>> Cadence((2, 10), (4, 20))(0)
    Due(update=True, invert=True)
    >>> [step for step in range(100) if Cadence((2, 10), (4, 20))(step).invert]
    [0, 4, 8, 12, 16, 20, 24, 28, 33, 36, 42, 46, 50, 55, 60, 66, 72, 79, 86, 94]
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
        update = self._hits(self.update, step)
        if self._phase(self.invert, step)[1] < self._phase(self.update, step)[1] and self._hits(self.invert, step):
            return Due(update, True)
        return Due(update, update and any(self._hits(self.invert, due) for due in self._since_statistics(step)))

    def _since_statistics(self, step: int) -> Iterator[int]:
        """Yield this step and those before it, back to the one after the last statistics."""
        yield step
        while step > 0 and not self._hits(self.update, step - 1):
            step -= 1
            yield step

    def _hits(self, bounds: tuple[int, int], step: int) -> bool:
        start, interval = self._phase(bounds, step)
        return (step - start) % interval == 0

    def _phase(self, bounds: tuple[int, int], step: int) -> tuple[int, int]:
        """Return the first step and the interval of the phase of this step."""
        phases = self._phases[bounds]
        return phases[bisect(phases, (step, math.inf)) - 1]

    @cached_property
    def _phases(self) -> dict[tuple[int, int], list[tuple[int, int]]]:
        """Return for each pair of bounds the phases of constant interval: (first step, interval)."""
        return {bounds: list(self._grown(*bounds)) for bounds in (self.update, self.invert)}

    def _grown(self, interval: int, last: int) -> Iterator[tuple[int, int]]:
        """Yield the phases from the shortest interval to the longest."""
        step = 0
        yield step, interval
        while interval < last and self.growth * FOREVER > interval:
            left = (interval + 1) / self.growth - step  # steps until the interval may be a longer one
            step += interval * max(1, math.ceil(left / interval))
            interval = max(interval, int(min(last, self.growth * step)))
            yield step, interval
