"""Times and peak memory of vmapped groups, and of loops over single runs, in this process.

A case is a net, a batch size and a cadence. Times are processor time, unless a caller passes another clock: other
programs on the machine hardly change it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import fisherfn as ff
from common.data import Data, Split
from common.loop import Task, sound
from common.models.cnn import toy_cnn
from common.models.mlp import chain
from common.sweep.auto import cost, size_of
from common.sweep.group import Group, Problem
from common.train_config import TrainConfig

STEPS = 1000
"""Length of a run, over which the cost of refreshes is averaged."""


class Case(NamedTuple):
    """A net, a batch size and a cadence of K-FAC: statistics and inverses every so many steps."""

    net: str
    batch: int
    cadence: tuple[int, int] = (10, 100)
    optim: str = "kfac"

    @property
    def title(self) -> str:
        """Return the case in words."""
        every = "" if self.optim != "kfac" else f", {self.cadence[0]}/{self.cadence[1]}"
        return f"{self.net}, batch {self.batch}, {self.optim}{every}"


CURVES = (400, 200, 100, 50, 25, 6)
"""Widths of the encoder of the CURVES autoencoder; the decoder has them in reverse."""

NETS = ("ToyNet on 8×8", "ToyNet", "toyCNN", "CURVES/8", "CURVES/4", "CURVES")
CADENCES = ((10, 100), (1, 1))
CASES = (
    *(Case(net, batch, cadence) for cadence in CADENCES for batch in (32, 256) for net in NETS),
    Case("CURVES/8", 16),
    *(Case(net, 32, optim=optim) for net in ("ToyNet", "CURVES/8") for optim in ("sgd", "adam")),
)
TOGETHER = (8, 64)
"""Numbers of models in the table of compiled steps."""

IN_MEMORY = (Case("CURVES/8", 32), Case("CURVES", 32))
MEMBERS = (1, 8, 32, 64)
"""Cases and numbers of models whose peak memory is measured."""

Clock = Callable[[], float]
"""Function that returns the time in seconds."""


def net_of(case: Case) -> tuple[torch.nn.Module, tuple[int, ...]]:
    """Return the net of a case and the shape of its inputs."""
    if case.net == "toyCNN":
        split = Split(torch.zeros(10, 3, 32, 32), torch.arange(10))
        return toy_cnn(Data("random", split, split, case.net, ff.Bernoulli(), ff.Categorical())), (3, 32, 32)
    inputs = 64 if case.net.endswith("8×8") else 784
    if case.net.startswith("ToyNet"):
        widths: Sequence[int] = (10, 30, 20, 15, 10)
    else:
        code = [max(3, width // int(case.net.partition("/")[2] or 1)) for width in CURVES]
        widths = (*code, *code[-2::-1], inputs)
    return chain((inputs, *widths), lambda width: torch.nn.Tanh()), (inputs,)


def problem(case: Case, members: int, compiled: bool = False) -> Problem:
    """Return a sweep over learning rates on random data; times do not depend on values."""
    generator = torch.Generator().manual_seed(0)
    net, shape = net_of(case)
    x = torch.rand(4 * case.batch, *shape, generator=generator)
    code = case.net.startswith("CURVES")
    y = x if code else torch.randint(10, (len(x),), generator=generator)
    model, params, context = ff.functional(net)
    likelihood = ff.Bernoulli() if code else ff.Categorical()
    task = Task(model, model, params, context, likelihood, (x, y), (x, y), 1)
    update, invert = case.cadence
    config = TrainConfig(
        optim=case.optim, batch_size=case.batch, lr=1e-3, damping=0.1, kl_bound=0.01, update_every=update,
        invert_every=invert, compile=compiled,
    )  # fmt: skip
    rows = [{"lr": 1e-3 * 0.9**member, "seed": member} for member in range(members)]
    return Problem(config, rows, lambda each: task)


def loop(case: Case, runs: Problem, clock: Clock = time.process_time) -> float:
    """Return the seconds per step of a single run, as the trainer makes it, averaged over the cadence."""
    optimizer, task = runs.optimizer, runs.task
    batch, draws = tuple(leaf[: case.batch] for leaf in task.train), torch.Generator().manual_seed(0)
    params, state = task.params, optimizer.init(task.params)
    times: dict[tuple[bool, ...], float] = {}
    for index in (0, 0, 1, *case.cadence) * 3:
        began = clock()
        new = optimizer.step(params, state, batch, task.context, optimizer.draw(batch, draws), index)
        sound(new.info)
        seconds = clock() - began
        due = optimizer.cadence(index)
        times[due] = min(seconds, times.get(due, seconds))
        params, state = new.params, new.state
    return sum(times[optimizer.cadence(step)] for step in range(STEPS)) / STEPS


def grouped(group: Group, clock: Clock = time.process_time) -> float:
    """Return the seconds per step and model of a group, averaged over the cadence."""
    return cost(group, group.start(), STEPS, clock=clock) / len(group.members)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use so many threads inside the `with`."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measured(case: Case, sizes: Sequence[int]) -> list[tuple[float, int]]:
    """Return seconds per step and model, and bytes per model, for each size of group."""
    runs = problem(case, max(sizes))
    groups = [Group(runs, range(size)) for size in sizes]
    return [(grouped(group), size_of(group.start()) // len(group.members)) for group in groups]


def compiling(measure: Callable[[], float]) -> tuple[float, float]:
    """Return the result of a second call, and by how much processor time the first call takes longer."""
    began = with_compilers()
    measure()
    between = with_compilers()
    seconds = measure()
    return seconds, 2 * between - began - with_compilers()


def with_compilers() -> float:
    """Return the processor time of this process and of the C++ compilers that it has started, in seconds."""
    return sum(os.times()[:4])


def peak() -> float:
    """Return the largest memory of this process so far, in MiB."""
    status = Path("/proc/self/status").read_text()  # unlike getrusage, without the memory of the parent process
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def peak_of(case: Case, members: int) -> tuple[float, float, float]:
    """Return the peak memory of this process before a group and after all kinds of steps, and its state, in MiB."""
    before, group = peak(), Group(problem(case, members), range(members))
    at = group.start()
    cost(group, at, STEPS, repeat=1)
    return before, peak(), size_of(at) / 2**20
