"""Measure sweeps: time per step and model of vmapped groups, a loop over models, and two processes that loop.

`python apps/benchmark_sweep.py --page docs/sweeps.md` writes the table of the page and the picture
docs/images/sweep_speed.png. The figures of a busy machine are only indications.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import fisherfn as ff
from common.atomic import replace_text
from common.config import POSITIVE, option, parse
from common.loop import Task, sound
from common.memory import keep_freed_memory
from common.models.mlp import chain
from common.plots import INK, PALETTE, new_figure, save_figure
from common.runs import reported
from common.sweep.auto import cost, size_of
from common.sweep.group import Group, Problem
from common.train_config import TrainConfig

STEPS = 1000
START, END = "<!-- sweep speed: begin -->", "<!-- sweep speed: end -->"


class Case(NamedTuple):
    """A net, a batch size and an optimizer."""

    net: str
    inputs: int
    batch: int
    optim: str
    cadence: tuple[int, int] = (10, 100)

    @property
    def title(self) -> str:
        """Return the case in words."""
        every = "" if self.optim in ("sgd", "adam") else f", {self.cadence[0]}/{self.cadence[1]}"
        return f"{self.net}, {self.inputs} inputs, batch {self.batch}, {self.optim}{every}"


CASES = (
    Case("ToyNet", 64, 32, "kfac"),
    Case("ToyNet", 784, 32, "kfac"),
    Case("ToyNet", 784, 32, "sgd"),
    Case("CURVES/8", 784, 16, "kfac"),
    Case("CURVES/8", 784, 16, "adam"),
)
CODE = (50, 25, 12, 6, 3, 3, 3, 6, 12, 25, 50)
"""Hidden widths of the CURVES autoencoder at 1/8, at least 3."""


@dataclass(frozen=True)
class Config:
    """The settings of the benchmark."""

    case: int | None = option(None, "number of a single case; null: all cases")
    members: int = option(64, "largest number of models", check=POSITIVE)
    half: bool = option(False, "only print the time of one model, for two processes at once")
    page: str | None = option(None, "page whose table is replaced; null: print it")


def problem(case: Case, members: int) -> Problem:
    """Return a sweep over learning rates on random data; times do not depend on values."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4 * case.batch, case.inputs, generator=generator)
    code = case.net != "ToyNet"
    widths = [case.inputs, *(CODE if code else (10, 30, 20, 15)), case.inputs if code else 10]
    net = chain(widths, lambda width: torch.nn.Tanh())
    y = x if code else torch.randint(10, (len(x),), generator=generator)
    model, params, context = ff.functional(net)
    likelihood = ff.Bernoulli() if code else ff.Categorical()
    task = Task(model, model, params, context, likelihood, (x, y), (x, y), 1)
    update, invert = case.cadence
    config = TrainConfig(
        optim=case.optim, batch_size=case.batch, lr=1e-3, damping=0.1, kl_bound=0.01, update_every=update,
        invert_every=invert,
    )  # fmt: skip
    rows = [{"lr": 1e-3 * 0.9**member, "seed": member} for member in range(members)]
    return Problem(config, rows, lambda each: task)


def loop(case: Case) -> float:
    """Return the seconds per step of a single run, as the trainer makes it, averaged over the cadence."""
    runs = problem(case, 1)
    optimizer, task = runs.optimizer, runs.task
    batch, draws = tuple(leaf[: case.batch] for leaf in task.train), torch.Generator().manual_seed(0)
    params, state = task.params, optimizer.init(task.params)
    times: dict[tuple[bool, ...], float] = {}
    for index in (0, 0, 1, *case.cadence) * 3:
        began = time.perf_counter()
        new = optimizer.step(params, state, batch, task.context, optimizer.draw(batch, draws), index)
        sound(new.info)
        seconds = time.perf_counter() - began
        due = optimizer.cadence(index)
        times[due] = min(seconds, times.get(due, seconds))
        params, state = new.params, new.state
    return sum(times[optimizer.cadence(step)] for step in range(STEPS)) / STEPS


def measured(case: Case, sizes: list[int]) -> list[tuple[float, int]]:
    """Return seconds per step and model, and bytes per model, for each size of group."""
    runs = problem(case, max(sizes))
    found = []
    for size in sizes:
        group = Group(runs, range(size))
        at = group.start()
        found.append((cost(group, at, STEPS) / size, size_of(at) // size))
    return found


def two_processes(number: int) -> float:
    """Return seconds per step and model if two processes loop over half of the models each."""
    command = [sys.executable, __file__, "--half", "--case", str(number)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    return sum(float(process.communicate()[0].split()[-1]) for process in processes) / 4


def main(config: Config) -> None:
    """Measure all cases, print the table and draw the picture."""
    torch.set_num_threads(1)
    keep_freed_memory()
    numbers = range(len(CASES)) if config.case is None else [config.case]
    if config.half:
        print(loop(CASES[numbers[0]]))
        return
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 128) if size <= config.members]
    lines = ["| case | loop, ms | two processes | best group | speed-up | against two processes | MiB per model |"]
    lines += ["|---|---|---|---|---|---|---|"]
    figure = new_figure(width=7.5, height=4.6)
    axes = figure.subplots()
    for number in numbers:
        found = measured(CASES[number], sizes)
        single, times = loop(CASES[number]), [seconds for seconds, _ in found]
        pair = two_processes(number)
        best = min(range(len(sizes)), key=partial(lambda place, times: times[place], times=times))
        lines.append(
            f"| {CASES[number].title} | {1e3 * single:.2f} | {1e3 * pair:.2f} "
            f"| {sizes[best]}: {1e3 * times[best]:.2f} | "
            f"{single / times[best]:.1f}× | {pair / times[best]:.1f}× | {found[best][1] / 2**20:.1f} |"
        )
        print(lines[-1], [round(1e3 * seconds, 2) for seconds in times], flush=True)
        axes.plot(
            sizes, [single / seconds for seconds in times], "o-", color=PALETTE[number], label=CASES[number].title
        )
    axes.axhline(1, color=INK, linewidth=0.8, linestyle="--")
    axes.set(xscale="log", xlabel="models at once", ylabel="speed-up over a loop", xticks=sizes, xticklabels=sizes)
    axes.minorticks_off()
    axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    if config.page is None:
        print("\n".join(lines))
        return
    page = Path(config.page)
    save_figure(figure, page.parent / "images" / "sweep_speed.png")
    text = page.read_text()
    before, _, rest = text.partition(START)
    replace_text(page, before + START + "\n" + "\n".join(lines) + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    with reported():
        main(parse(Config, description=__doc__))
