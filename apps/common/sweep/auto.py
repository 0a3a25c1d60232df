"""The number of models that share a step, chosen by measured time and memory.

Vmapping saves the overhead of many small calls, and costs memory traffic. For small nets a large group is fastest, for
wide layers a group of one. `auto` measures groups of 1, 2, 4, … models until two larger groups are slower per model
than the best: a group of two pays for vmap and hardly gains, and one of eight can still be faster than a loop. The
measured steps are not compiled, even if those of the sweep are: compiling every size would take minutes for each.
Compiling shortens the steps of one model more than those of a group, so a group must then be `COMPILED` times as fast.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import fisherfn as ff
from common.loop import generator_of
from common.sweep.group import Group, Problem, Snapshot

COMPILED = 1.5
"""Speed-up of a group without compiling that is needed to be sure of one with it (docs/sweeps.md has the times)."""

SHARE = 0.5
"""Share of the free memory that a group may use; processes of one machine that torchrun starts divide it."""

CGROUP, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Folder with the memory limits of containers and of jobs (control groups), and the names of those of this process."""

WORKING = 4
"""Memory of a step relative to the states and batches of its members: a step holds old and new ones and products."""

HORIZON = 1000
"""Steps over which the cost of refreshes is averaged."""


SLOWER = 2
"""Number of larger groups that must be slower than the best before `auto` stops."""


class Measured(NamedTuple):
    """The cost of a group: seconds per step and member, averaged over the cadence, and bytes of snapshot and batch."""

    members: int
    seconds: float
    bytes: int


def choose(problem: Problem, rows: Sequence[int], steps: int) -> tuple[int, list[Measured]]:
    """Return the best number of models per group, and all measurements.

    Args:
        problem: the runs.
        rows: the runs of this process.
        steps: length of a run.
    """
    found: list[Measured] = []
    size = 1
    while True:
        group = Group(problem, rows[:size], plain=True)
        at = group.start()
        memory = size_of(at) + sum(leaf.numel() * leaf.element_size() for leaf in next(group.batches(0, 0)))
        if found and memory * WORKING > SHARE * free_memory(at):
            break
        found.append(Measured(len(group.members), cost(group, at, steps) / len(group.members), memory))
        best = min(found, key=lambda each: each.seconds)
        if len(found) - 1 - found.index(best) == SLOWER or size >= len(rows):
            break
        size = min(2 * size, len(rows))
    best = min(found, key=lambda each: each.seconds)
    if problem.config.compile and found[0].seconds < COMPILED * best.seconds:
        return 1, found
    return best.members, found


def cost(
    group: Group, at: Snapshot, steps: int, repeat: int = 2, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the seconds per step of a group, averaged over the refreshes of a run of this length."""
    cadence = group.problem.optimizer.cadence
    dues = [tuple(cadence(step)) for step in range(max(1, min(steps, HORIZON)))]
    batch = next(group.batches(0, 0))
    draws = [generator_of(seed, 0, stream=1) for seed in group.seeds]
    at = group.step(at, batch, draws)  # fills the state
    total = 0.0
    for due in sorted(set(dues), reverse=True):
        index = dues.index(due)
        group.step(at._replace(step=index), batch, draws)
        best = min(_timed(group, at._replace(step=index), batch, draws, clock) for _ in range(repeat))
        total += best * dues.count(due) / len(dues)
    return total


def size_of(at: Snapshot) -> int:
    """Return the bytes of a group's snapshot."""
    return sum(leaf.numel() * leaf.element_size() for leaf in ff.tree.leaves((at.params, at.state, at.context)))


def free_memory(at: Snapshot) -> float:
    """Return the free bytes of this process on the device of a group; infinite if the system does not say."""
    device = at.active.device
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return min(_available(), _allowed()) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _available() -> float:
    """Return the free bytes of the machine."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024.0 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return math.inf


def _allowed() -> float:
    """Return the free bytes below the limits of this container or job, and of those around it."""
    free = [math.inf]
    with contextlib.suppress(OSError):
        for line in OWN.read_text().splitlines():
            number, kinds, path = line.split(":", 2)
            if number == "0":
                free.append(_below(CGROUP, path, "memory.max", "memory.current", "inactive_file"))
            elif "memory" in kinds.split(","):
                names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
                free.append(_below(CGROUP / "memory", path, *names))
    return min(free)


def _below(root: Path, path: str, limit: str, used: str, cached: str) -> float:
    """Return the free bytes of a control group and of its parents; cached files count as free."""
    own, free = root / path.lstrip("/"), [math.inf]
    for folder in (folder for folder in (own, *own.parents) if folder.is_relative_to(root)):
        with contextlib.suppress(OSError, ValueError):  # no limit: no file, or the word max
            most, now = (int((folder / name).read_text()) for name in (limit, used))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            free.append(max(0, most - now + int(stat.get(cached, 0))))
    return min(free)


def _timed(
    group: Group,
    at: Snapshot,
    batch: tuple[torch.Tensor, torch.Tensor],
    draws: list[torch.Generator],
    clock: Callable[[], float],
) -> float:
    start = clock()
    group.step(at, batch, draws)
    if at.active.device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start
