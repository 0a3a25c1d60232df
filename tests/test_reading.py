"""The files that docs/design.md names for one step and for one method's factors are those that run."""

import ast
import re
import sys
from pathlib import Path

import pytest
import torch

from tests import zoo

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "fisherfn"
PAGE = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `(?P<file>[\w/]+\.py)` \| (?P<functions>`.*?`) \|", re.M)
COUNT = re.compile(r"(?P<files>\d+) files, (?P<lines>[\d,]+) lines; their functions above: (?P<own>[\d,]+) lines")


def a_step():
    """A call that takes one step of K-FAC on a net of linear layers."""
    problem = zoo.pick("mlp-categorical")
    ng = problem.build(method="kfac")
    state = ng.init(problem.params, damping=0.1)
    return lambda: ng.step(problem.params, state, problem.batch, generator=zoo.generator(0))


def factors():
    """A call that updates the factors of KPSVD for the same net."""
    problem = zoo.pick("mlp-categorical")
    ng = problem.build(method="kpsvd")
    state = ng.init(problem.params, damping=0.1)
    stats = ng.stats(problem.params, problem.batch, generator=zoo.generator(0))
    return lambda: ng.method.update(state.factors, stats.lazy_taps, torch.tensor(0.5, dtype=torch.float64))


READ = {"One step of K-FAC": (a_step, 12), "The factors of KPSVD": (factors, 6)}
"""The sections of the page, and the largest number of files that each of them may ask its reader to open."""


def called(call):
    """Return the qualified names of the library's functions that a call runs, by file."""
    seen: dict[str, set[str]] = {}

    def note(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if event == "call" and LIBRARY in path.parents:
            seen.setdefault(path.relative_to(LIBRARY).as_posix(), set()).add(frame.f_code.co_qualname)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return seen


def section(title):
    return PAGE.split(f"### {title}\n")[1].split("\n#")[0]


def listed(title):
    """Return the functions of a section's table by file."""
    rows = ROW.finditer(section(title))
    return {row["file"]: re.findall(r"`([\w.]+)`", row["functions"]) for row in rows}


def lengths(file):
    """Return the number of lines of each function of a file, by qualified name."""
    found = {}

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                found[prefix + child.name] = child.end_lineno - child.lineno + 1
                visit(child, f"{prefix}{child.name}.")

    visit(ast.parse((LIBRARY / file).read_text(encoding="utf-8")), "")
    return found


@pytest.mark.parametrize("title", READ)
def test_every_function_of_the_table_runs(title):
    seen = called(READ[title][0]())
    for file, functions in listed(title).items():
        assert set(functions) <= seen.get(file, set()), f"{file} in docs/design.md"


@pytest.mark.parametrize("title", READ)
def test_every_file_that_runs_is_in_the_table_or_named_below_it(title):
    seen = called(READ[title][0]())
    below = section(title).split("It also runs")[1]
    named = set(re.findall(r"`([\w/]+\.py)`", below))
    assert named | listed(title).keys() == seen.keys()


@pytest.mark.parametrize("title", READ)
def test_the_counts_are_those_of_the_files(title):
    found, table = COUNT.search(section(title)), listed(title)
    lines = sum(len((LIBRARY / file).read_text(encoding="utf-8").splitlines()) for file in table)
    own = sum(lengths(file)[name] for file, functions in table.items() for name in functions)
    shown = [int(found[name].replace(",", "")) for name in ("files", "lines", "own")]
    assert shown == [len(table), lines, own], "docs/design.md shows other counts"
    assert len(table) <= READ[title][1]
