"""What is timed of an optimizer, and what the mean step of a training costs that uses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from common.benchmark.problems import Problem

Step = Callable[[], Any]

STEP, STATISTICS, INVERSES = "step", "statistics", "inverses"
ALONE = {STATISTICS: STATISTICS, INVERSES: INVERSES}
"""Parts that are calls of their own."""

JOINT = {STATISTICS: "step + statistics", INVERSES: "step + inverses"}
"""Where they come with a step: what they add to it counts."""

ALL_THREE = "step + statistics + inverses"


class Contender(NamedTuple):
    """An optimizer on a problem, ready to be timed.

    `parts` has "step" (gradient, preconditioning, update of the weights), and what is done less often, alone
    ("statistics", "inverses") or with a step ("step + statistics", "step + inverses", "step + statistics + inverses").
    """

    parts: dict[str, Step]
    covers: str = "all"  # which layers it preconditions
    note: str = ""
    error: str = ""


class Cost(NamedTuple):
    """A step, and what statistics and inverses cost beside it; all in one unit."""

    step: float
    statistics: float = 0.0
    inverses: float = 0.0


class Cycle(NamedTuple):
    """Steps between statistics and between inverses."""

    update_every: int
    invert_every: int

    def mean(self, cost: Cost) -> float:
        """The mean step of a training."""
        return cost.step + cost.statistics / self.update_every + cost.inverses / self.invert_every


CYCLES = (Cycle(10, 100), Cycle(5, 10))
"""The peers' usual one, which tables and picture show, and the trainers' default."""


def cost(medians: Mapping[str, float]) -> Cost:
    """The three costs, from the medians of a contender's parts."""
    step = medians[STEP]

    def extra(part: str) -> float:
        if part in medians:
            return medians[part]
        return medians[JOINT[part]] - step if JOINT[part] in medians else 0.0

    if ALL_THREE in medians:
        return Cost(step, extra(STATISTICS), medians[ALL_THREE] - medians[JOINT[STATISTICS]])
    return Cost(step, extra(STATISTICS), extra(INVERSES))


def attempted(build: Callable[[Problem], Contender], problem: Problem) -> Contender:
    """A peer that has run once, or what it said when it did not: the first line of its error."""
    try:
        contender = build(problem)
        for step in contender.parts.values():
            step()
    except Exception as error:  # whatever a peer raises belongs in the table
        return Contender({}, covers="–", error=f"{type(error).__name__}: {first_line(error)}")
    return contender


def first_line(error: Exception) -> str:
    """Of its message."""
    return (str(error).strip().splitlines() or ["no message"])[0]


def coverage(net: nn.Module, covered: tuple[type[nn.Module], ...]) -> str:
    """Which layers with parameters are of the given kinds, and the kinds that are not."""
    layers = [module for module in net.modules() if list(module.parameters(recurse=False))]
    missing = dict.fromkeys(type(module).__name__ for module in layers if not isinstance(module, covered))
    return f"not {', '.join(missing)}" if missing else "all"
