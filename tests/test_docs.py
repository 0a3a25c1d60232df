"""Every ```python block of README.md and docs/ runs; the blocks of one file share a namespace, in order."""

import re
from pathlib import Path

import pytest
import torch

from tests import zoo

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


@pytest.mark.parametrize("page", pages())
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    namespace = {"__name__": "__docs__"}
    with torch.random.fork_rng(), zoo.as_installed():
        torch.manual_seed(0)
        for line, code in blocks(page.read_text()):
            padded = "\n" * (line - 1) + code  # a traceback then shows the page's own line
            exec(compile(padded, str(page), "exec"), namespace)


def test_blocks_are_found_whole_and_only_python():
    text = "a\n```python\nx = 1\n```\n\n```bash\nls\n```\n- item\n\n    ```python title='t'\n    y = 2\n    ```\n"
    assert list(blocks(text)) == [(3, "x = 1"), (12, "y = 2")]


def test_the_coverage_page_shows_what_its_code_prints(capsys):
    page = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    shown = page.split("```text\n")[1].split("```")[0]
    exec(compile(code, "coverage.md", "exec"), {})
    assert capsys.readouterr().out == shown
