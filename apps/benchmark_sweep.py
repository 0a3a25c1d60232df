"""Measure sweeps: time per step and model of vmapped groups, a loop over models, and two processes that loop.

`python apps/benchmark_sweep.py --page docs/sweeps.md` writes the table of the page and the picture
docs/images/sweep_speed.png. The figures of a busy machine are only indications.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

import fisherfn as ff
from common.atomic import replace_text
from common.config import POSITIVE, option, parse
from common.data import Data, Split
from common.loop import Task, sound
from common.memory import keep_freed_memory
from common.models.cnn import toy_cnn
from common.models.mlp import chain
from common.plots import INK, PALETTE, new_figure, save_figure
from common.runs import reported
from common.sweep.auto import cost, size_of
from common.sweep.group import Group, Problem
from common.train_config import TrainConfig

STEPS = 1000
START, END = "<!-- sweep speed: begin -->", "<!-- sweep speed: end -->"
SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Models at once."""


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
COMPILED = (Case("ToyNet on 8×8", 32), Case("CURVES/8", 16))


@dataclass(frozen=True)
class Config:
    """The settings of the benchmark."""

    case: int | None = option(None, "number of a single case; null: all cases")
    members: int = option(64, "largest number of models", check=POSITIVE)
    half: bool = option(False, "only print the time of one model, for two processes at once")
    compile: bool = option(False, "compiled steps of the loop and of the largest group, for two cases")
    page: str | None = option(None, "page whose table is replaced; null: print it")


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


def loop(case: Case, compiled: bool = False) -> float:
    """Return the seconds per step of a single run, as the trainer makes it, averaged over the cadence."""
    runs = problem(case, 1, compiled)
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


def measured(case: Case, sizes: Sequence[int], compiled: bool = False) -> list[tuple[float, int]]:
    """Return seconds per step and model, and bytes per model, for each size of group."""
    runs = problem(case, max(sizes), compiled)
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


def draw(speed_ups: Mapping[Case, list[float]], sizes: Sequence[int], path: Path) -> None:
    """Draw the speed-up over a loop against the models at once: a panel per batch size and cadence, a line per net."""
    panels = [(batch, cadence) for cadence in CADENCES for batch in (32, 256)]
    figure = new_figure(width=9, height=7)
    for place, (batch, cadence) in enumerate(panels):
        axes = figure.add_subplot(2, 2, place + 1)
        for color, net in zip(PALETTE, NETS, strict=False):
            axes.plot(sizes, speed_ups[Case(net, batch, cadence)], "o-", markersize=3, color=color, label=net)
        axes.axhline(1, color=INK, linewidth=0.8, linestyle="--")
        axes.set(xscale="log", yscale="log", xticks=sizes, xticklabels=sizes, ylim=(0.4, 40))
        axes.set_yticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
        axes.set_title(f"batch {batch}, statistics and inverses every {cadence[0]}/{cadence[1]} steps", fontsize=10)
        axes.minorticks_off()
        axes.set_xlabel("models at once")
        axes.set_ylabel("speed-up over a loop")
    figure.axes[0].legend(fontsize=8, frameon=False, labelcolor=INK)
    save_figure(figure, path)


def compiled_table(members: int) -> None:
    """Print plain and compiled times of the loop and of the largest group."""
    print("| case | loop | compiled | group | compiled | speed-up, compiled |\n|---|---|---|---|---|---|")
    for case in COMPILED:
        singles = [loop(case, compiled) for compiled in (False, True)]
        groups = [measured(case, [members], compiled)[0][0] for compiled in (False, True)]
        cells = " | ".join(f"{1e3 * seconds:.2f}" for seconds in (*singles, *groups))
        print(f"| {case.title} | {cells} | {singles[1] / groups[1]:.1f}× |", flush=True)


def main(config: Config) -> None:
    """Measure all cases, print the table and draw the picture."""
    torch.set_num_threads(1)
    keep_freed_memory()
    numbers = range(len(CASES)) if config.case is None else [config.case]
    if config.half:
        print(loop(CASES[numbers[0]]))
        return
    if config.compile:
        compiled_table(config.members)
        return
    sizes = [size for size in SIZES if size <= config.members]
    lines = ["| case | loop, ms | two processes | best group | speed-up | against two processes | MiB per model |"]
    lines += ["|---|---|---|---|---|---|---|"]
    speed_ups = {}
    for number in numbers:
        case = CASES[number]
        found = measured(case, sizes)
        single, times = loop(case), [seconds for seconds, _ in found]
        pair = two_processes(number)
        best = times.index(min(times))
        lines.append(
            f"| {case.title} | {1e3 * single:.2f} | {1e3 * pair:.2f} | {sizes[best]}: {1e3 * times[best]:.2f} | "
            f"{single / times[best]:.1f}× | {pair / times[best]:.1f}× | {found[best][1] / 2**20:.1f} |"
        )
        print(lines[-1], [round(1e3 * seconds, 2) for seconds in times], flush=True)
        speed_ups[case] = [single / seconds for seconds in times]
    if config.page is None or config.case is not None:
        print("\n".join(lines))
        return
    page = Path(config.page)
    draw(speed_ups, sizes, page.parent / "images" / "sweep_speed.png")
    before, _, rest = page.read_text().partition(START)
    replace_text(page, before + START + "\n" + "\n".join(lines) + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    with reported():
        main(parse(Config, description=__doc__))
