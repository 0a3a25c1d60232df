"""The benchmark of sweeps: tables in pages, and what is called compiling."""

from pathlib import Path

import pytest
import torch

import benchmark_sweep
from benchmark_sweep import Config, cases_of, compiled_table, main, threads_rows
from common.benchmark import sweeps
from common.benchmark.sweep_report import cells_of, draw_compiled, put, rows_of
from common.benchmark.sweeps import CASES, IN_MEMORY, compiling, peak, threads
from common.config import ConfigError

PAGE = Path(__file__).parents[2] / "docs" / "sweeps.md"


def test_a_table_replaces_that_of_its_name_only(tmp_path):
    page = copied(tmp_path / "page.md")
    for name in ("speed", "threads", "compiled", "memory"):
        before = page.read_text()
        start, end = (f"<!-- sweep {name}: {what} -->\n" for what in ("begin", "end"))
        put(["| a |", "|---|"], str(page), name)
        head, _, rest = before.partition(start)
        assert page.read_text() == head + start + "| a |\n|---|\n" + end + rest.partition(end)[2]


def test_compiled_rows_of_other_cases_stay_and_come_in_the_order_of_the_cases(tmp_path, monkeypatch):
    page, rows = (
        tmp_path / "page.md",
        [f"| {CASES[1].title} | 8 |{' 1.0 |' * 6} old |", "| a case of the past | 8 | 1 |"],
    )
    put(["| head |", "|---|", *rows], str(copied(page)), "compiled")
    new = [f"| {CASES[number].title} | {members} |{' 2.0 |' * 6} new |" for number in (0, 1) for members in (8, 64)]
    monkeypatch.setattr(benchmark_sweep, "compiled_rows", lambda case: [row for row in new if case.title in row])
    assert compiled_table([0], str(page))[2:] == [*new[:2], rows[0]]
    assert compiled_table([1], str(page))[2:] == new == rows_of(str(page), "compiled")
    assert len(draw_compiled(new, tmp_path / "picture.png").axes[0].lines[0].get_ydata()) == 2


def copied(page: Path) -> Path:
    """Write the text of the page of sweeps to another one."""
    page.write_text(PAGE.read_text())
    return page


def test_compiling_is_what_the_first_call_takes_longer(monkeypatch):
    times, results = iter([10.0, 25.0, 27.0]), iter([3.0, 0.5])
    monkeypatch.setattr(sweeps, "with_compilers", lambda: next(times))
    assert compiling(lambda: next(results)) == (0.5, 13.0)


def test_gains_of_threads_are_over_the_faster_loop_and_over_two_processes(monkeypatch):
    monkeypatch.setattr(benchmark_sweep, "loop", lambda case, runs, clock: 0.006 * torch.get_num_threads())
    monkeypatch.setattr(benchmark_sweep, "grouped", lambda group, clock: 0.002 / torch.get_num_threads())
    monkeypatch.setattr(benchmark_sweep, "two_processes", lambda case, wall: 0.003 if wall else 9.0)
    monkeypatch.setattr(benchmark_sweep, "CORES", 2)
    with threads(1):
        (row,) = threads_rows([0], 2)
        assert torch.get_num_threads() == 1
    assert cells_of(row)[1:] == "6.00 12.00 3.00 2.00 1.00 6.0× 3.0×".split()


@pytest.mark.parametrize("mode", ["compile", "memory", "threads"])
def test_a_case_of_another_table_is_an_error(mode):
    outside = next(n for n in range(len(CASES)) if n not in cases_of(Config(**{mode: True})))
    with pytest.raises(ConfigError, match=f"case {outside} is not in the table of --{mode}"):
        main(Config(case=outside, **{mode: True}))


@pytest.mark.parametrize(("name", "mode"), [("speed", None), ("memory", "memory"), ("threads", "threads")])
def test_rows_of_other_cases_stay_in_every_table(name, mode, tmp_path, monkeypatch):
    page = copied(tmp_path / "page.md")
    old, new = (f"| {case.title} | {word} |" for case, word in ((IN_MEMORY[1], "old"), (IN_MEMORY[0], "new")))
    put(["| head |", "|---|", old, f"| {IN_MEMORY[0].title} | past |"], str(page), name)
    for rows in ("memory_rows", "threads_rows"):
        monkeypatch.setattr(benchmark_sweep, rows, lambda *args: [new])
    monkeypatch.setattr(benchmark_sweep, "speed_table", lambda *args: ([new], {}))
    case = CASES.index(IN_MEMORY[0])
    main(Config(case=case, page=str(page), **({mode: True} if mode else {})))
    assert rows_of(str(page), name) == [new, old]


@pytest.mark.parametrize("mode", [{}, {"compile": True}, {"memory": True}, {"threads": True}])
def test_a_page_without_a_place_for_the_table_is_an_error_before_anything_is_measured(mode, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("A page.\n")
    with pytest.raises(ConfigError, match="has no place for the table: write the lines <!-- sweep"):
        main(Config(page=str(page), **mode))
    assert page.read_text() == "A page.\n"


def test_the_peak_is_at_least_the_memory_in_use():
    in_use = int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0]) / 1024
    assert peak() >= in_use > 0


def test_the_cases_have_numbers_by_which_other_processes_find_them():
    assert all(case in CASES for case in IN_MEMORY)
