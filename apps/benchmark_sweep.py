"""Measure sweeps: time per step and model of vmapped groups, a loop over models, and two processes that loop.

`python apps/benchmark_sweep.py --page docs/sweeps.md` writes the table of the page and the picture
docs/images/sweep_speed.png. `--compile true` writes the table and the picture of compiled steps instead, `--memory
true` the table of peak memory. `--case` measures one case; in the table of compiled steps, the rows of the other cases
stay. A process has one thread, and times are its processor time, which other programs on the machine hardly change.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch._inductor.config as inductor
from matplotlib.figure import Figure

import fisherfn as ff
from common.atomic import replace_text
from common.config import POSITIVE, Check, option, parse
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
TOGETHER = (8, 64)
"""Numbers of models in the table of compiled steps."""

IN_MEMORY = (Case("CURVES/8", 32), Case("CURVES", 32))
MEMBERS = (1, 8, 32, 64)
"""Cases and numbers of models whose peak memory is measured."""


@dataclass(frozen=True)
class Config:
    """The settings of the benchmark."""

    case: int | None = option(
        None, "number of a single case; default: all cases",
        check=Check(f"from 0 to {len(CASES) - 1}", lambda case: 0 <= case < len(CASES)),
    )  # fmt: skip
    members: int = option(64, "largest number of models", check=POSITIVE)
    half: bool = option(False, "only print the time of one model, for two processes at once")
    compile: bool = option(False, "compiled steps of loops, and of groups of 8 and 64")
    memory: bool = option(False, "peak memory of groups, each in a new process, for a few cases")
    peak: bool = option(False, "only print the peak memory of one group of so many members")
    page: str | None = option(None, "page whose table is replaced; default: print it")


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


def loop(case: Case, runs: Problem) -> float:
    """Return the seconds per step of a single run, as the trainer makes it, averaged over the cadence."""
    optimizer, task = runs.optimizer, runs.task
    batch, draws = tuple(leaf[: case.batch] for leaf in task.train), torch.Generator().manual_seed(0)
    params, state = task.params, optimizer.init(task.params)
    times: dict[tuple[bool, ...], float] = {}
    for index in (0, 0, 1, *case.cadence) * 3:
        began = time.process_time()
        new = optimizer.step(params, state, batch, task.context, optimizer.draw(batch, draws), index)
        sound(new.info)
        seconds = time.process_time() - began
        due = optimizer.cadence(index)
        times[due] = min(seconds, times.get(due, seconds))
        params, state = new.params, new.state
    return sum(times[optimizer.cadence(step)] for step in range(STEPS)) / STEPS


def measured(case: Case, sizes: Sequence[int]) -> list[tuple[float, int]]:
    """Return seconds per step and model, and bytes per model, for each size of group."""
    runs = problem(case, max(sizes))
    found = []
    for size in sizes:
        group = Group(runs, range(size))
        at = group.start()
        found.append((cost(group, at, STEPS, clock=time.process_time) / size, size_of(at) // size))
    return found


def two_processes(case: Case, compiled: bool = False) -> float:
    """Return seconds per step and model if two processes loop over half of the models each."""
    command = [sys.executable, __file__, "--half", "--case", str(CASES.index(case)), "--compile", str(compiled).lower()]
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


def compiled_rows(case: Case) -> Iterator[str]:
    """Yield the rows of a case: plain and compiled times of a loop, of two processes and of groups."""
    plain, of_loop = [compiling(partial(loop, case, problem(case, 1, compiled))) for compiled in (False, True)]
    loops, pairs = (plain[0], of_loop[0]), tuple(two_processes(case, compiled) for compiled in (False, True))
    for members in TOGETHER:
        found = []
        for compiled in (False, True):
            group = Group(problem(case, members, compiled), range(members))
            found.append(compiling(partial(cost, group, group.start(), STEPS, clock=time.process_time)))
        groups = [seconds / members for seconds, _ in found]
        cells = [f"{1e3 * seconds:.3g}" for times in (loops, pairs, groups) for seconds in times]
        cells += [f"{times[1] / groups[1]:.1f}×" for times in (loops, pairs)]
        cells += [f"{seconds:.0f}" for _, seconds in (of_loop, found[1])]
        yield f"| {case.title} | {members} | {' | '.join(cells)} |"


def compiled_table(numbers: Sequence[int], page: str | None) -> list[str]:
    """Return the lines of the table of compiled steps; rows of other cases are those of the page."""
    inductor.compile_threads = 1  # others compile in processes whose time is not that of a child
    parts = ("loop, ms", "loop, compiled", "two processes", "two processes, compiled", "group", "group, compiled")
    gains = ("speed-up, compiled", "against two, compiled", "compiling, s: loop", "compiling, s: group")
    rows = {} if page is None else {first(row): row for row in rows_of(Path(page).read_text(), "compiled")}
    for case in (CASES[number] for number in numbers if CASES[number].optim == "kfac"):
        for row in compiled_rows(case):
            rows[first(row)] = row
            print(row, flush=True)
    order = [(case.title, str(members)) for case in CASES for members in TOGETHER]
    return [
        f"| case | models | {' | '.join((*parts, *gains))} |",
        "|---" * 12 + "|",
        *(rows[key] for key in order if key in rows),
    ]


def cells_of(row: str) -> list[str]:
    """Return the cells of a row of a table."""
    return [cell.strip() for cell in row.strip("|").split("|")]


def first(row: str) -> tuple[str, str]:
    """Return the first two cells of a row, by which it is known: case and number of models."""
    title, members, *_ = cells_of(row)
    return title, members


def rows_of(text: str, name: str) -> list[str]:
    """Return the rows of the table of this name in the text of a page, without its head."""
    table = text.partition(f"<!-- sweep {name}: begin -->")[2].partition(f"<!-- sweep {name}: end -->")[0]
    return table.strip().splitlines()[2:]


def draw_compiled(rows: Sequence[str], path: Path) -> Figure:
    """Draw the speed-up over a plain loop against the size of the net: a panel per batch size and cadence."""
    found = {first(row): [float(cell) for cell in cells_of(row)[2:8]] for row in rows}
    sizes = {net: sum(leaf.numel() for leaf in net_of(Case(net, 32))[0].parameters()) for net in NETS}
    nets = sorted(sizes, key=lambda net: sizes[net])
    lines = [("loop, compiled", TOGETHER[0], 1)]  # name, models, column of the time
    lines += [(f"group of {m}{word}", m, column) for m in TOGETHER for word, column in (("", 4), (", compiled", 5))]
    figure = new_figure(width=10, height=8)
    for place, (batch, cadence) in enumerate((batch, cadence) for cadence in CADENCES for batch in (32, 256)):
        axes = figure.add_subplot(2, 2, place + 1)
        for (label, members, column), color in zip(lines, PALETTE, strict=False):
            times = [found.get((Case(net, batch, cadence).title, str(members))) for net in nets]
            points = [(x, each[0] / each[column]) for x, each in enumerate(times) if each]
            style = "o-" if "compiled" in label else "o--"
            axes.plot(*np.array(points).reshape(-1, 2).T, style, markersize=3, color=color, label=label)
        axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
        axes.set(yscale="log", ylim=(0.4, 60), xlim=(-0.3, len(nets) - 0.7))
        axes.set_xticks(range(len(nets)), [f"{net}\n{sizes[net]:,}" for net in nets], fontsize=7)
        axes.set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
        axes.minorticks_off()
        axes.set_title(f"batch {batch}, statistics and inverses every {cadence[0]}/{cadence[1]} steps", fontsize=10)
        axes.set_xlabel("net and its number of parameters")
        axes.set_ylabel("speed-up over a plain loop")
    figure.axes[0].legend(fontsize=8, frameon=False, labelcolor=INK)
    return save_figure(figure, path)


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


def memory_table() -> list[str]:
    """Return the lines of the table of peak memory."""
    head = " | ".join(f"{members}" for members in MEMBERS)
    lines = [f"| case | program | {head} | per model | state per model |", "|---" * (len(MEMBERS) + 4) + "|"]
    for case in IN_MEMORY:
        found = []
        for members in MEMBERS:
            number = str(CASES.index(case))
            command = [sys.executable, __file__, "--peak", "--case", number, "--members", str(members)]
            text = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            found.append([float(word) for word in text.split()])
        before, peaks, state = zip(*found, strict=True)
        per_model = (peaks[-1] - peaks[1]) / (MEMBERS[-1] - MEMBERS[1])
        numbers = (before[0], *peaks, per_model, state[-1] / MEMBERS[-1])
        lines.append(f"| {case.title} | {' | '.join(f'{number:,.0f}' for number in numbers)} |")
        print(lines[-1], flush=True)
    return lines


def put(lines: Sequence[str], page: str | None, name: str) -> None:
    """Replace the table of this name in a page, or print it."""
    if page is None:
        print("\n".join(lines))
        return
    before, start, rest = Path(page).read_text().partition(f"<!-- sweep {name}: begin -->")
    _, end, after = rest.partition(f"<!-- sweep {name}: end -->")
    replace_text(Path(page), before + start + "\n" + "\n".join(lines) + "\n" + end + after)


def main(config: Config) -> None:
    """Measure all cases, print the table and draw the picture."""
    torch.set_num_threads(1)
    keep_freed_memory()
    numbers = range(len(CASES)) if config.case is None else [config.case]
    if config.half:
        case = CASES[numbers[0]]
        print(loop(case, problem(case, 1, config.compile)))
        return
    if config.peak:
        print(*peak_of(CASES[numbers[0]], config.members))
        return
    if config.memory:
        put(memory_table(), config.page, "memory")
        return
    if config.compile:
        lines = compiled_table(numbers, config.page)
        if config.page is not None:
            draw_compiled(lines[2:], Path(config.page).parent / "images" / "sweep_compiled.png")
        put(lines, config.page, "compiled")
        return
    sizes = [size for size in SIZES if size <= config.members]
    head = ("case", "loop, ms", "two processes, ms", "best group: models: ms", "speed-up", "against two processes")
    lines = [f"| {' | '.join(head)} | MiB per model |", "|---|---|---|---|---|---|---|"]
    speed_ups = {}
    for number in numbers:
        case = CASES[number]
        found = measured(case, sizes)
        single, times = loop(case, problem(case, 1)), [seconds for seconds, _ in found]
        pair = two_processes(case)
        best = times.index(min(times))
        lines.append(
            f"| {case.title} | {1e3 * single:.2f} | {1e3 * pair:.2f} | {sizes[best]}: {1e3 * times[best]:.2f} | "
            f"{single / times[best]:.1f}× | {pair / times[best]:.1f}× | {found[best][1] / 2**20:.1f} |"
        )
        print(lines[-1], [round(1e3 * seconds, 2) for seconds in times], flush=True)
        speed_ups[case] = [single / seconds for seconds in times]
    page = config.page if config.case is None else None
    if page is not None:
        draw(speed_ups, sizes, Path(page).parent / "images" / "sweep_speed.png")
    put(lines, page, "speed")


if __name__ == "__main__":
    with reported():
        main(parse(Config, description=__doc__))
