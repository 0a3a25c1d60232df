"""The timed parts of an optimizer, and the average cost per training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

from torch import nn

from common.benchmark.problems import Problem

Step = Callable[[], Any]

T = TypeVar("T")


class Parts(NamedTuple, Generic[T]):
    """The calls that are timed, or their times: the step, and its less frequent parts alone or together with a step.

    The step is gradient, preconditioning and update of the weights. Of parts that are timed together with a step, the
    difference counts.
    """

    step: T
    statistics: T | None = None
    inverses: T | None = None
    step_with_statistics: T | None = None
    step_with_inverses: T | None = None
    step_with_both: T | None = None

    def given(self) -> dict[str, T]:
        """Return the parts that there are, by name."""
        return {name: part for name, part in self._asdict().items() if part is not None}


class Contender(NamedTuple):
    """An optimizer on a problem, ready to be timed, or the error of one that is not."""

    parts: Parts[Step] | None
    covers: str = "all"  # the layers that it preconditions
    note: str = ""
    error: str = ""

    def calls(self) -> dict[str, Step]:
        """Return the calls to time, by name."""
        return {} if self.parts is None else self.parts.given()


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


def cost(ms: Parts[float]) -> Cost:
    """Return the three costs, from the times of a contender's parts."""

    def extra(alone: float | None, joint: float | None, base: float) -> float:
        if alone is not None:
            return alone
        return 0.0 if joint is None else joint - base

    statistics = extra(ms.statistics, ms.step_with_statistics, ms.step)
    if ms.step_with_both is not None:
        return Cost(ms.step, statistics, ms.step_with_both - ms.step - statistics)
    return Cost(ms.step, statistics, extra(ms.inverses, ms.step_with_inverses, ms.step))


def attempted(build: Callable[[Problem], Contender], problem: Problem) -> Contender:
    """Run a peer once; return it, or the first line of its error."""
    try:
        contender = build(problem)
        for step in contender.calls().values():
            step()
    except Exception as error:  # any error of a peer is shown in the table
        return Contender(None, covers="–", error=f"{type(error).__name__}: {first_line(error)}")
    return contender


def first_line(error: Exception) -> str:
    """Return the first line of an error message."""
    return (str(error).strip().splitlines() or ["no message"])[0]


def coverage(net: nn.Module, covered: tuple[type[nn.Module], ...]) -> str:
    """Describe which layers with parameters are of the given kinds, and which kinds are not."""
    layers = [module for module in net.modules() if list(module.parameters(recurse=False))]
    missing = dict.fromkeys(type(module).__name__ for module in layers if not isinstance(module, covered))
    return f"not {', '.join(missing)}" if missing else "all"
