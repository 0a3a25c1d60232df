"""Every ```python block of README.md and docs/ runs; the blocks of one file share a namespace, in order.

Every page has its place in the site, every link leads somewhere, and the site fetches nothing.
"""

import importlib.util
import re
import subprocess
import sys
import unicodedata
from functools import partial
from inspect import signature
from pathlib import Path

import pytest
import torch
import yaml

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
    """Register a layer as docs/adding_a_layer.md asks its reader to do."""
    for family in [value for value in namespace.values() if isinstance(value, layers.Family)]:
        monkeypatch.setitem(layers.FAMILIES, family.name, family)
        for function in family.functions:
            monkeypatch.setitem(layers._BY_FUNCTION, function, [family])


def test_the_line_of_the_registry_that_a_reader_changes_is_that_of_the_file():
    page, registry = DOCS / "adding_a_layer.md", ROOT / "fisherfn" / "layers" / "__init__.py"
    before = re.search(r"^-(_ALL = .+)$", page.read_text(), re.M)[1]
    assert before in registry.read_text().splitlines()


OF_THE_READER = {  # files that a page asks its reader to write, and one of the original repository
    "fisherfn/layers/scale.py", "fisherfn/methods/diagonal.py", "tests/methods/test_diagonal.py",
    "apps/mlp_cnn/grid_search_mlp.py",
}  # fmt: skip


def test_every_file_that_a_page_names_exists():
    named = {
        path for page in PAGES for path in re.findall(r"`((?:fisherfn|apps|tests|docs)/[\w/.]+)`", page.read_text())
    }
    assert len(named) > 20
    assert {path for path in named if not (ROOT / path).exists()} <= OF_THE_READER


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


# -------------------------------------------------------------------------------------------------------- the site

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FROM_THE_ROOT = {"changelog.md", "contributing.md"}  # docs/hooks/root_pages.py
NOT_PROSE = re.compile(r"^[ \t]*```.*?^[ \t]*```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]+\$", re.M | re.S)
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
HEADING = re.compile(r"^#+ (?P<text>.+)$", re.M)
FETCHED = re.compile(
    r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=[\"']?(?:https?:)?//[^>]*>|url\((?:https?:)?//", re.I
)


def titles(nav):
    """The pages of a navigation, in order."""
    for entry in nav:
        for value in [entry] if isinstance(entry, str) else entry.values():
            yield from titles(value) if isinstance(value, list) else [value]


def test_every_page_has_its_place_in_the_site():
    nav = list(titles(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert len(nav) == len(set(nav))
    assert set(nav) == {page.relative_to(DOCS).as_posix() for page in PAGES} | FROM_THE_ROOT


def links(page):
    return [match["target"] for match in LINK.finditer(NOT_PROSE.sub("", page.read_text(encoding="utf-8")))]


def anchors(page):
    """Return the anchors of the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return {anchor(match["text"]) for match in HEADING.finditer(text)}


def anchor(heading):
    plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *PAGES], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    for target in links(page):
        path, _, fragment = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{target} is not there"
        if fragment and there.suffix == ".md" and not fragment.startswith("fisherfn."):
            assert fragment in anchors(there), f"{target}: no such heading"


def test_links_and_headings_are_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# K-FAC's (π) cost\n[a](x.md#y) `[b](c)` $[d](e)$\n```text\n# [f](g)\n```\n![h](i.png)\n")
    assert links(page) == ["x.md#y", "i.png"]
    assert anchors(page) == {"k-facs-cost"}


def test_every_public_name_is_in_the_reference():
    reference = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    names = [*ff.__all__, *(f"optim.{name}" for name in ff.optim.__all__)]
    assert [name for name in names if not re.search(rf"\b{re.escape(name)}\b", reference)] == []


@pytest.mark.parametrize("name", sorted(ff.METHODS))
def test_a_page_on_a_method_says_what_it_costs_and_when_to_take_it(name):
    builder = ff.METHODS[name].__name__
    text = (DOCS / "methods" / f"{builder}.md").read_text(encoding="utf-8")
    assert f"`ff.{builder}(" in text and f"--optim {name}" in text and "$" in text
    assert {"cost", "when-to-use-it"} < (found := anchors(DOCS / "methods" / f"{builder}.md"))
    assert found & {"reference", "references"}
    assert "](../references.md#" in text


def test_the_site_builds_and_fetches_nothing(tmp_path):
    if not all(importlib.util.find_spec(name) for name in ("material", "mkdocstrings", "latex2mathml", "ziamath")):
        pytest.skip("what builds the site is not installed: `make docs` installs it")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert FETCHED.findall(text) == [], page
        assert 'class="arithmatex"' not in text, f"{page}: mathematics left as TeX"
    sheets = [sheet.read_text(encoding="utf-8") for sheet in (tmp_path / "site").rglob("*.css")]
    assert sheets and not any(FETCHED.search(sheet) for sheet in sheets)


def test_network_requests_of_a_page_are_detected():
    assert FETCHED.search('<script async src="https://cdn.example/x.js">') and FETCHED.search(
        "url(//cdn.example/f.woff)"
    )
    assert not FETCHED.search('<a href="https://example.org">') and not FETCHED.search('<link href="../x.css">')
