"""Measure sweeps: time per step and model of vmapped groups, a loop over models, and two processes that loop.

`python apps/benchmark_sweep.py --page docs/sweeps.md` writes the table of the page and the picture
docs/images/sweep_speed.png. `--compile true` writes the table and the picture of compiled steps instead, `--memory
true` the table of peak memory, and `--threads true` that of groups that use all cores. `--case` measures one case; the
rows of other cases stay on the page. A process has one thread, and times are its processor time, which other programs
on the machine hardly change; with `--threads true` they are wall-clock time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch._inductor.config as inductor

from common.benchmark.sweep_report import draw, draw_compiled, put, rows_of, table
from common.benchmark.sweeps import (
    CADENCES,
    CASES,
    IN_MEMORY,
    MEMBERS,
    TOGETHER,
    Case,
    compiling,
    grouped,
    loop,
    measured,
    peak_of,
    problem,
    threads,
)
from common.config import POSITIVE, Check, ConfigError, option, parse
from common.memory import keep_freed_memory
from common.runs import reported
from common.sweep.group import Group

SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Models at once."""

KFAC = [case for case in CASES if case.optim == "kfac"]
"""Cases of the table of compiled steps."""

LOOPED = [case for case in KFAC if case.cadence == CADENCES[0]]
"""Cases of the table of threads: those in which most time of a loop is the overhead of calls."""

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

SPEED = (
    "case", "loop, ms", "two processes, ms", "best group: models: ms", "speed-up", "against two processes",
    "MiB per model",
)  # fmt: skip
"""Columns of the table of plain steps."""


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
    threads: bool = option(False, "wall-clock time of loops and groups, with one thread and with one per core")
    peak: bool = option(False, "only print the peak memory of one group of so many members")
    page: str | None = option(None, "page whose table is replaced; default: print it")


def two_processes(case: Case, compiled: bool = False, wall: bool = False) -> float:
    """Return seconds per step and model, or wall-clock time, if two processes loop over half of the models each."""
    flags = ["--compile", str(compiled).lower(), "--threads", str(wall).lower()]
    command = [sys.executable, __file__, "--half", "--case", str(CASES.index(case)), *flags]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    return sum(float(process.communicate()[0].split()[-1]) for process in processes) / 4


def compiled_rows(case: Case) -> Iterator[str]:
    """Yield the rows of a case: plain and compiled times of a loop, of two processes and of groups."""
    single = loop(case, problem(case, 1))
    compiled, compiling_loop = compiling(partial(loop, case, problem(case, 1, compiled=True)))
    pairs = two_processes(case), two_processes(case, compiled=True)
    for members in TOGETHER:
        runs = problem(case, members, compiled=True)
        plain, group = Group(runs, range(members), plain=True), Group(runs, range(members))
        of_group, (of_compiled, compiling_group) = grouped(plain), compiling(partial(grouped, group))
        times = (single, compiled, *pairs, of_group, of_compiled)
        cells = [f"{1e3 * seconds:.3g}" for seconds in times]
        cells += [f"{compiled / of_compiled:.1f}×", f"{pairs[1] / of_compiled:.1f}×"]
        cells += [f"{compiling_loop:.0f}", f"{compiling_group:.0f}"]
        yield f"| {case.title} | {members} | {' | '.join(cells)} |"


def compiled_table(numbers: Sequence[int], page: str | None) -> list[str]:
    """Return the lines of the table of compiled steps; they are written to the page after each case."""
    inductor.compile_threads = 1  # others compile in processes whose time is not that of a child
    parts = ("loop, ms", "loop, compiled", "two processes", "two processes, compiled", "group", "group, compiled")
    gains = ("speed-up, compiled", "against two, compiled", "compiling, s: loop", "compiling, s: group")
    order = [(case.title, str(members)) for case in CASES for members in TOGETHER]
    rows = rows_of(page, "compiled")
    lines = []
    for number in numbers:
        for row in compiled_rows(CASES[number]):
            rows.append(row)
            print(row, flush=True)
        lines = table(("case", "models", *parts, *gains), order, rows)
        put(lines, page, "compiled")  # all cases take hours
    return lines


def speed_table(numbers: Sequence[int], sizes: Sequence[int]) -> tuple[list[str], dict[Case, list[float]]]:
    """Return the rows of the table of plain steps, and the speed-ups of groups of these sizes."""
    rows, speed_ups = [], {}
    for case in (CASES[number] for number in numbers):
        found = measured(case, sizes)
        single, times = loop(case, problem(case, 1)), [seconds for seconds, _ in found]
        pair = two_processes(case)
        best = times.index(min(times))
        rows.append(
            f"| {case.title} | {1e3 * single:.2f} | {1e3 * pair:.2f} | {sizes[best]}: {1e3 * times[best]:.2f} | "
            f"{single / times[best]:.1f}× | {pair / times[best]:.1f}× | {found[best][1] / 2**20:.1f} |"
        )
        print(rows[-1], [round(1e3 * seconds, 2) for seconds in times], flush=True)
        speed_ups[case] = [single / seconds for seconds in times]
    return rows, speed_ups


def threads_rows(numbers: Sequence[int], members: int) -> list[str]:
    """Return the rows of the table of wall-clock times with one thread, and with one thread per core."""
    rows = []
    for case in (CASES[number] for number in numbers):
        single, group = problem(case, 1), Group(problem(case, members), range(members))
        times = [loop(case, single, time.perf_counter)]
        with threads(CORES):
            times.append(loop(case, single, time.perf_counter))
        times += [two_processes(case, wall=True), grouped(group, time.perf_counter)]
        with threads(CORES):
            times.append(grouped(group, time.perf_counter))
        gains = min(times[:2]) / times[-1], times[2] / times[-1]
        cells = [*(f"{1e3 * seconds:.2f}" for seconds in times), *(f"{gain:.1f}×" for gain in gains)]
        rows.append(f"| {case.title} | {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    return rows


def memory_rows(numbers: Sequence[int]) -> list[str]:
    """Return the rows of the table of peak memory."""
    rows = []
    for number in numbers:
        found = []
        for members in MEMBERS:
            command = [sys.executable, __file__, "--peak", "--case", str(number), "--members", str(members)]
            text = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            found.append([float(word) for word in text.split()])
        before, peaks, state = zip(*found, strict=True)
        per_model = (peaks[-1] - peaks[1]) / (MEMBERS[-1] - MEMBERS[1])
        columns = (before[0], *peaks, per_model, state[-1] / MEMBERS[-1])
        rows.append(f"| {CASES[number].title} | {' | '.join(f'{column:,.0f}' for column in columns)} |")
        print(rows[-1], flush=True)
    return rows


def cases_of(config: Config) -> list[int]:
    """Return the numbers of the cases to measure.

    Raises:
        ConfigError: the case is none of those of this table.
    """
    own = {"compile": KFAC, "memory": IN_MEMORY, "threads": LOOPED}
    mode = next((name for name in own if getattr(config, name)), None)
    numbers = [number for number, case in enumerate(CASES) if mode is None or case in own[mode]]
    if config.case is None:
        return numbers
    if config.case not in numbers and not (config.half or config.peak):
        raise ConfigError(f"case {config.case} is not in the table of --{mode}: {', '.join(map(str, numbers))} are")
    return [config.case]


def main(config: Config) -> None:
    """Measure what the options ask for, and write the tables and pictures."""
    torch.set_num_threads(1)
    keep_freed_memory()
    numbers, page = cases_of(config), config.page
    titles = [(case.title,) for case in CASES]
    images = None if page is None else Path(page).parent / "images"
    if config.half:
        case = CASES[numbers[0]]
        clock = time.perf_counter if config.threads else time.process_time
        print(loop(case, problem(case, 1, config.compile), clock))
    elif config.peak:
        print(*peak_of(CASES[numbers[0]], config.members))
    elif config.memory:
        head = ("case", "program", *map(str, MEMBERS), "per model", "state per model")
        older = rows_of(page, "memory")
        put(table(head, titles, memory_rows(numbers), older), page, "memory")
    elif config.threads:
        groups = f"group of {config.members}", f"group, {CORES} threads"
        head = ("case", "loop, ms", f"loop, {CORES} threads", "two processes", *groups, "speed-up", "against two")
        older = rows_of(page, "threads")
        put(table(head, titles, threads_rows(numbers, config.members), older), page, "threads")
    elif config.compile:
        lines = compiled_table(numbers, page)
        if images is not None:
            draw_compiled(lines[2:], images / "sweep_compiled.png")
    else:
        sizes = [size for size in SIZES if size <= config.members]
        older = rows_of(page, "speed")
        rows, speed_ups = speed_table(numbers, sizes)
        if images is not None and config.case is None:
            draw(speed_ups, sizes, images / "sweep_speed.png")
        put(table(SPEED, titles, rows, older), page, "speed")


if __name__ == "__main__":
    with reported():
        main(parse(Config, description=__doc__))
