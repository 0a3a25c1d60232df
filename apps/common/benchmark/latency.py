"""Times of single steps in a run of many, and of what happens before the first: import, build."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import fisherfn as ff
from common.benchmark.clock import milliseconds
from common.benchmark.ours import Prepared, prepared
from common.benchmark.problems import Problem

IMPORT = "import time; import torch; began = time.perf_counter(); import fisherfn; print(time.perf_counter() - began)"

Refreshes = Callable[[int], dict[str, Any]]
"""Arguments of a step that depend on its number."""


class Spread(NamedTuple):
    """Median, 99th percentile and longest of some times, in milliseconds."""

    p50: float
    p99: float
    longest: float


def spread(ms: list[float]) -> Spread:
    """Return the percentiles of at least two times."""
    cuts = statistics.quantiles(ms, n=100, method="inclusive")
    return Spread(cuts[49], cuts[98], max(ms))


def cadences(one: Prepared) -> dict[str, Refreshes]:
    """Return the default cadence with all blocks at once, with staggered inversions, and with statistics too."""
    examples = ff.tree.leaves(one.problem.batch[0])[0].shape[0]
    found: dict[str, Callable[[int], Any]] = {
        "all blocks at once": ff.Cadence.fixed(5, 10),
        "inversions staggered": ff.staggered(one.ng, 5, 10, stagger_statistics=False),
        "staggered": ff.staggered(one.ng, 5, 10, examples=examples),
    }

    def arguments(cadence: Callable[[int], Any]) -> Refreshes:
        return lambda step: cadence(step)._asdict()

    return {name: arguments(cadence) for name, cadence in found.items()}


def run(one: Prepared, refreshes: Refreshes, steps: int, device: str) -> list[float]:
    """Time consecutive training steps with KL clip, after the first."""
    gpu = device if device.startswith("cuda") else None
    params, state, problem = one.problem.params, one.state, one.problem
    times = []

    def step(number: int) -> None:
        nonlocal params, state
        due = refreshes(number)
        nat, state, info = one.ng.step(params, state, problem.batch, inner=True, **due, **one.given)
        params = ff.tree.add(params, ff.kl_clip(nat, info.inner, lr=1e-3, kl_bound=1e-4), scale=-1e-3)

    for number in range(steps + 1):
        times.append(milliseconds(lambda number=number: step(number), gpu))  # type: ignore[misc]
    return times[1:]


def latencies(problem: Problem, steps: int, device: str, method: str = "kfac") -> dict[str, Spread]:
    """Return the spread of the step times for each cadence."""
    one = prepared(problem, method)
    return {label: spread(run(one, refreshes, steps, device)) for label, refreshes in cadences(one).items()}


def build_ms_per_layer(problem: Problem) -> float:
    """Return the time of one build divided by the number of its blocks, after a first build."""
    for _ in range(2):
        began = time.perf_counter()
        ng = ff.natural_gradient(
            problem.model, problem.params, problem.batch[0], likelihood=problem.likelihood, context=problem.context
        )
        taken = time.perf_counter() - began
    return 1e3 * taken / len(ng.layout.blocks)


def import_seconds(repeats: int = 3) -> float:
    """Return the time that importing the library takes in a new process, beyond torch's own."""
    command = [sys.executable, "-c", IMPORT]
    called = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(repeats)]
    return statistics.median(float(each.stdout) for each in called)
