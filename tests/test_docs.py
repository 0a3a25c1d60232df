"""Every ```python block of README.md and docs/ runs; the blocks of one file share a namespace, in order."""

import re
from functools import partial
from inspect import signature
from pathlib import Path

import pytest
import torch

import fisherfn as ff
from fisherfn import layers
from tests import zoo
from tests.methods import test_all

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^(?P<indent>[ \t]*)```python[^\n]*\n(?P<code>.*?)^(?P=indent)```[ \t]*$", re.M | re.S)


def blocks(text: str):
    """(line number, code) of every python block, its indentation removed."""
    for match in FENCE.finditer(text):
        indent = match["indent"]
        lines = [line.removeprefix(indent) for line in match["code"].splitlines()]
        yield text.count("\n", 0, match.start("code")) + 1, "\n".join(lines)


def pages():
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    with_code = [page for page in found if page.exists() and list(blocks(page.read_text()))]
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in with_code]


def run(page, after_each=lambda namespace: None):
    """Run the blocks of a page and return what they defined."""
    namespace = {"__name__": "__docs__"}
    with torch.random.fork_rng(), zoo.as_installed():
        torch.manual_seed(0)
        for line, code in blocks(page.read_text()):
            padded = "\n" * (line - 1) + code  # a traceback then shows the page's own line
            exec(compile(padded, str(page), "exec"), namespace)
            after_each(namespace)
    return namespace


@pytest.mark.parametrize("page", pages())
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    run(page, partial(with_its_line_in_the_registry, monkeypatch))


def with_its_line_in_the_registry(monkeypatch, namespace):
    """What docs/adding_a_layer.md asks its reader to write into the registry of layers."""
    for family in [value for value in namespace.values() if isinstance(value, layers.Family)]:
        monkeypatch.setitem(layers.FAMILIES, family.name, family)
        for function in family.functions:
            monkeypatch.setitem(layers._BY_FUNCTION, function, [family])


def of_all_methods():
    """The tests that every method passes, but for those that want a file."""
    tests = [test for name, test in vars(test_all).items() if name.startswith("test_")]
    return [test for test in tests if "tmp_path" not in signature(test).parameters]


@pytest.fixture(scope="module")
def walkthrough():
    return run(ROOT / "docs" / "adding_a_method.md")["diagonal"]


@pytest.mark.parametrize("test", of_all_methods(), ids=lambda test: test.__name__)
def test_the_method_of_the_walkthrough_is_a_whole_one(test, walkthrough, monkeypatch):
    monkeypatch.setitem(ff.METHODS, "diagonal", walkthrough)
    for case in ("mlp-categorical", "conv-groups", "tokens"):
        test("diagonal", *[case] * ("id" in signature(test).parameters))


def test_blocks_are_found_whole_and_only_python():
    text = "a\n```python\nx = 1\n```\n\n```bash\nls\n```\n- item\n\n    ```python title='t'\n    y = 2\n    ```\n"
    assert list(blocks(text)) == [(3, "x = 1"), (12, "y = 2")]


def test_the_coverage_page_shows_what_its_code_prints(capsys):
    page = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    shown = page.split("```text\n")[1].split("```")[0]
    exec(compile(code, "coverage.md", "exec"), {})
    assert capsys.readouterr().out == shown
