"""The habits of the project: one page of README with measured numbers, one version, workflows that parse."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import fisherfn as ff

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def rows(text):
    """The cells of a page's tables, bold or not, by the first of them."""
    lines = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {cells[0]: cells[1:] for cells in reversed(lines)}  # the first of that name stays


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 100


def test_the_readmes_code_is_about_twenty_lines():
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    lines = [line for line in code.splitlines() if line.strip()]
    assert 15 <= len(lines) <= 25


def test_the_front_page_of_the_site_has_the_readmes_code():
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    assert code in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")


def test_the_readme_compares_by_measured_numbers():
    measured = rows((ROOT / "docs/performance.md").read_text(encoding="utf-8").split("<!-- table: mean step -->")[1])
    first = "average time per step, relative to SGD: CURVES autoencoder"
    nets = {first: 0, "MNIST autoencoder": 1, "convolutional autoencoder": 3}
    shown = rows(README)
    libraries = shown["[measured](docs/performance.md) on two CPU cores"]
    for row, column in nets.items():
        assert shown[row] == [measured[library][column] for library in libraries], "docs/performance.md says otherwise"


def test_every_method_is_in_the_readmes_table():
    table = " ".join(rows(README))
    assert all(f"`{name}`" in table for name in ff.METHODS)


def test_there_is_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "fisherfn.__version__"}
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == ff.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", ff.__version__)


def test_the_changelog_is_kept():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\]", text, re.M)
    assert headings[0] == "Unreleased"
    parts = set(re.findall(r"^### (\w+)", text, re.M))
    assert parts <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_what_the_makefile_has(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    targets = set(re.findall(r"make ([a-z-]+)", " ".join(step.get("run", "") for step in steps)))
    assert targets <= set(re.findall(r"^([a-z-]+):", MAKEFILE, re.M))
    assert all(re.fullmatch(r"[\w-]+/[\w/-]+@[\w./-]+", step["uses"]) for step in steps if "uses" in step)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_an_issue_template_is_a_form(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.name == "config.yml":
        assert form["blank_issues_enabled"] in (True, False)
        return
    assert form["name"] and form["description"] and form["body"]
    fields = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert len(fields) == len(set(fields)) > 0


def test_there_are_workflows_and_templates():
    assert {path.stem for path in WORKFLOWS} == {"ci", "release"}
    assert {path.stem for path in TEMPLATES} >= {"bug", "feature"}


@pytest.mark.parametrize("target", "help install test lint format docs demo build check-wheel benchmark clean".split())
def test_a_newcomer_guesses_right(target):
    assert re.search(rf"^{target}:.*## ", MAKEFILE, re.M), f"make {target} is missing, or `make help` does not list it"
