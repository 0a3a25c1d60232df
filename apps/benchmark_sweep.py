"""Measure sweeps: time per step and model of vmapped groups, a loop over models, and two processes that loop.

`python apps/benchmark_sweep.py --page docs/sweeps.md` writes the table of the page and the picture
docs/images/sweep_speed.png. `--compile true` writes the table and the picture of compiled steps instead, `--memory
true` the table of peak memory, and `--threads true` that of groups that use all cores. `--case` measures one case; in
the table of compiled steps, the rows of the other cases stay. A process has one thread, and times are its processor
time, which other programs on the machine hardly change; with `--threads true` they are wall-clock time.
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

from common.benchmark.sweep_report import draw, draw_compiled, first, put, rows_of
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
from common.config import POSITIVE, Check, option, parse
from common.memory import keep_freed_memory
from common.runs import reported
from common.sweep.group import Group

SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Models at once."""

LOOPED = [case for case in CASES if case.optim == "kfac" and case.cadence == CADENCES[0]]
"""Cases of the table of threads: those in which most time of a loop is the overhead of calls."""


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


def two_processes(case: Case, compiled: bool = False) -> float:
    """Return seconds per step and model if two processes loop over half of the models each."""
    command = [sys.executable, __file__, "--half", "--case", str(CASES.index(case)), "--compile", str(compiled).lower()]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    return sum(float(process.communicate()[0].split()[-1]) for process in processes) / 4


def compiled_rows(case: Case) -> Iterator[str]:
    """Yield the rows of a case: plain and compiled times of a loop, of two processes and of groups."""
    single = loop(case, problem(case, 1))
    compiled, compiling_loop = compiling(partial(loop, case, problem(case, 1, compiled=True)))
    pairs = two_processes(case), two_processes(case, compiled=True)
    for members in TOGETHER:
        plain, group = [Group(problem(case, members, compiled=how), range(members)) for how in (False, True)]
        of_group, (of_compiled, compiling_group) = grouped(plain), compiling(partial(grouped, group))
        times = (single, compiled, *pairs, of_group, of_compiled)
        cells = [f"{1e3 * seconds:.3g}" for seconds in times]
        cells += [f"{compiled / of_compiled:.1f}×", f"{pairs[1] / of_compiled:.1f}×"]
        cells += [f"{compiling_loop:.0f}", f"{compiling_group:.0f}"]
        yield f"| {case.title} | {members} | {' | '.join(cells)} |"


def compiled_table(numbers: Sequence[int], page: str | None) -> list[str]:
    """Return the lines of the table of compiled steps; rows of other cases are those of the page."""
    inductor.compile_threads = 1  # others compile in processes whose time is not that of a child
    parts = ("loop, ms", "loop, compiled", "two processes", "two processes, compiled", "group", "group, compiled")
    gains = ("speed-up, compiled", "against two, compiled", "compiling, s: loop", "compiling, s: group")
    rows = {} if page is None else {first(row): row for row in rows_of(Path(page).read_text(), "compiled")}
    for number in numbers:
        for row in compiled_rows(CASES[number]):
            rows[first(row)] = row
            print(row, flush=True)
    order = [(case.title, str(members)) for case in CASES for members in TOGETHER]
    return [
        f"| case | models | {' | '.join((*parts, *gains))} |",
        "|---" * 12 + "|",
        *(rows[key] for key in order if key in rows),
    ]


def speed_table(numbers: Sequence[int], sizes: Sequence[int]) -> tuple[list[str], dict[Case, list[float]]]:
    """Return the lines of the table of plain steps, and the speed-ups of groups of these sizes."""
    head = ("case", "loop, ms", "two processes, ms", "best group: models: ms", "speed-up", "against two processes")
    lines = [f"| {' | '.join(head)} | MiB per model |", "|---|---|---|---|---|---|---|"]
    speed_ups = {}
    for case in (CASES[number] for number in numbers):
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
    return lines, speed_ups


def threads_table(numbers: Sequence[int], members: int) -> list[str]:
    """Return the lines of the table of wall-clock times with one thread, and with one thread per core."""
    cores = len(os.sched_getaffinity(0))
    head = f"loop, ms | loop, {cores} threads | two processes | group of {members} | group, {cores} threads"
    lines = [f"| case | {head} | speed-up | against two processes |", "|---" * 8 + "|"]
    for case in (CASES[number] for number in numbers):
        single, group = problem(case, 1), Group(problem(case, members), range(members))
        times = [loop(case, single, time.perf_counter)]
        with threads(cores):
            times.append(loop(case, single, time.perf_counter))
        times += [two_processes(case), grouped(group, time.perf_counter)]
        with threads(cores):
            times.append(grouped(group, time.perf_counter))
        gains = min(times[:2]) / times[-1], times[2] / times[-1]
        cells = [*(f"{1e3 * seconds:.2f}" for seconds in times), *(f"{gain:.1f}×" for gain in gains)]
        lines.append(f"| {case.title} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


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


def main(config: Config) -> None:
    """Measure what the options ask for, and write the tables and pictures."""
    torch.set_num_threads(1)
    keep_freed_memory()
    numbers = range(len(CASES)) if config.case is None else [config.case]
    images = None if config.page is None else Path(config.page).parent / "images"
    if config.half:
        case = CASES[numbers[0]]
        print(loop(case, problem(case, 1, config.compile)))
    elif config.peak:
        print(*peak_of(CASES[numbers[0]], config.members))
    elif config.memory:
        put(memory_table(), config.page, "memory")
    elif config.threads:
        cases = [number for number in numbers if CASES[number] in LOOPED]
        put(threads_table(cases, config.members), config.page, "threads")
    elif config.compile:
        for number in (number for number in numbers if CASES[number].optim == "kfac"):
            lines = compiled_table([number], config.page)
            put(lines, config.page, "compiled")  # after each case: compiling all takes hours
        if images is not None:
            draw_compiled(lines[2:], images / "sweep_compiled.png")
    else:
        sizes = [size for size in SIZES if size <= config.members]
        lines, speed_ups = speed_table(numbers, sizes)
        if images is not None and config.case is None:
            draw(speed_ups, sizes, images / "sweep_speed.png")
        put(lines, config.page if config.case is None else None, "speed")


if __name__ == "__main__":
    with reported():
        main(parse(Config, description=__doc__))
