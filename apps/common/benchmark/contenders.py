"""The timed parts of an optimizer, and the average cost per training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from common.benchmark.problems import Problem

Step = Callable[[], Any]

STEP, STATISTICS, INVERSES = "step", "statistics", "inverses"
ALONE = {STATISTICS: STATISTICS, INVERSES: INVERSES}
"""Parts that are separate calls."""

JOINT = {STATISTICS: "step + statistics", INVERSES: "step + inverses"}
"""Parts that are timed together with a step; the difference counts."""

ALL_THREE = "step + statistics + inverses"


class Contender(NamedTuple):
    """An optimizer on a problem, ready to be timed.

    `parts` has "step" (gradient, preconditioning, update of the weights), and the less frequent parts, alone
    ("statistics", "inverses") or with a step ("step + statistics", "step + inverses", "step + statistics + inverses").
    """

    parts: dict[str, Step]
    covers: str = "all"  # the layers that it preconditions
    note: str = ""
    error: str = ""


class Cost(NamedTuple):
    """The costs of a step, of statistics and of inverses, in one unit."""

    step: float
    statistics: float = 0.0
    inverses: float = 0.0


class Cycle(NamedTuple):
    """Steps between statistics and between inverses."""

    update_every: int
    invert_every: int

    def mean(self, cost: Cost) -> float:
        """Return the average cost per step."""
        return cost.step + cost.statistics / self.update_every + cost.inverses / self.invert_every


CYCLES = (Cycle(10, 100), Cycle(5, 10))
"""The usual cadence of other libraries, shown in tables and picture, and the trainers' default."""


def cost(medians: Mapping[str, float]) -> Cost:
    """Return the three costs, from the medians of a contender's parts."""
    step = medians[STEP]

    def extra(part: str) -> float:
        if part in medians:
            return medians[part]
        return medians[JOINT[part]] - step if JOINT[part] in medians else 0.0

    if ALL_THREE in medians:
        return Cost(step, extra(STATISTICS), medians[ALL_THREE] - medians[JOINT[STATISTICS]])
    return Cost(step, extra(STATISTICS), extra(INVERSES))


def attempted(build: Callable[[Problem], Contender], problem: Problem) -> Contender:
    """Run a peer once; return it, or the first line of its error."""
    try:
        contender = build(problem)
        for step in contender.parts.values():
            step()
    except Exception as error:  # any error of a peer is shown in the table
        return Contender({}, covers="–", error=f"{type(error).__name__}: {first_line(error)}")
    return contender


def first_line(error: Exception) -> str:
    """Return the first line of an error message."""
    return (str(error).strip().splitlines() or ["no message"])[0]


def coverage(net: nn.Module, covered: tuple[type[nn.Module], ...]) -> str:
    """Describe which layers with parameters are of the given kinds, and which kinds are not."""
    layers = [module for module in net.modules() if list(module.parameters(recurse=False))]
    missing = dict.fromkeys(type(module).__name__ for module in layers if not isinstance(module, covered))
    return f"not {', '.join(missing)}" if missing else "all"
