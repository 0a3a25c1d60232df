"""Plain English: numbers keep their leading zero, docstrings begin with a verb or a noun, a unit follows "per".

The tuples below list the files that do not follow a rule yet. They only shrink.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [
    path for folder in ("fisherfn", "apps", "docs", "tests", ".ci") for path in sorted((ROOT / folder).rglob("*.py"))
]

BARE_DECIMAL = re.compile(r"(?<![\w.)\]}*/])\.\d")
RIDDLE = re.compile(r"(What|Of|By|In|As|How|All|Which|At|On)\b")
UNITS = (
    "batch|block|channel|chunk|class|column|core|draw|entry|epoch|example|factor|file|group|image|layer|leaf|member|method|minute|"
    "output|pair|parameter|pixel|position|process|rank|refresh|row|run|sample|second|seed|sequence|step|task|thread|token|update|worker"
)
COUNTED = (
    r"\d[\d.,]*%?|one|two|three|four|factor|factorisation|eigendecomposition|seconds?|bits?|nats|rows?|columns?|lines?|objects?|masks?|"
    r"epochs?|labels?|examples?|blocks?|pair|products?|minutes?|steps?|times|integer|number|score|cost|costs|KiB|MiB|GiB|s|ms"
)
A_FOR_PER = re.compile(rf"\b(?:{COUNTED}) an? (?:{UNITS})\b")

# files, and folders that end in a slash
PER_LEFT = ("fisherfn/stats/layout.py",)
DOCSTRINGS_LEFT = ("fisherfn/layers/", "fisherfn/stats/")


def name(path):
    return path.relative_to(ROOT).as_posix()


def docstrings(text):
    """The strings that stand alone as statements: docstrings, also those below a constant."""
    bodies = (getattr(node, "body", None) for node in ast.walk(ast.parse(text)))
    statements = [statement for body in bodies if isinstance(body, list) for statement in body]
    values = [statement.value for statement in statements if isinstance(statement, ast.Expr)]
    return [v.value.strip() for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)]


def comments(text):
    return [
        token.string for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type == tokenize.COMMENT
    ]


def prose(path):
    text = path.read_text(encoding="utf-8")
    return "\n".join([*docstrings(text), *comments(text)]) if path.suffix == ".py" else text


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=name)
def test_decimals_have_a_leading_zero(path):
    assert BARE_DECIMAL.findall(prose(path)) == []


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=name)
def test_rates_are_per_unit(path):
    if not name(path).startswith(PER_LEFT):
        assert A_FOR_PER.findall(prose(path)) == []


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_docstrings_begin_with_a_verb_or_a_noun(path):
    if not name(path).startswith(DOCSTRINGS_LEFT):
        found = docstrings(path.read_text(encoding="utf-8"))
        assert [docstring.splitlines()[0] for docstring in found if RIDDLE.match(docstring)] == []


def test_the_rules_see_what_they_forbid():
    assert BARE_DECIMAL.search("an error of .853") and BARE_DECIMAL.search("| .5 |") and BARE_DECIMAL.search("−.1")
    assert not BARE_DECIMAL.search("0.853, version 2.13.0, x.1, f().0, [.]")
    assert RIDDLE.match("What a step costs.") and not RIDDLE.match("Return the cost of a step.")
    assert A_FOR_PER.search("one mask a block") and not A_FOR_PER.search("each block has a mask")


def test_the_lists_of_files_left_name_files():
    for left in (*PER_LEFT, *DOCSTRINGS_LEFT):
        assert (ROOT / left).exists(), left
