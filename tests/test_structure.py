"""The house keeps its floors: imports go down a tower only, and apps use public names (CONTRIBUTING.md, "Structure").

Files of the library stay short, and few small helpers are called only once.

From the top (a file may import from lower floors of its own tower, and from the ground):

    __init__             public names only
    F7   optim                                             the shell for other people's loops, on the roof
    F6   adapt, distributed, laplace; stagger              how far a step goes, several processes, a posterior
    F5   natgrad, compiled; terms                          the roof, which alone knows both towers
    F4   views, dataset, influence, linearised, merged     what a state says; factors of many batches; Jacobians
         posterior_noise  priors                           the noise and the prior of a posterior
         refreshes                                         new states from old ones
                                      F3s  stats
    F2m  methods                      F2s  randomness
    F1m  base, fisher                 F1s  layers, likelihoods, decompositions
         lowrank, rearrangement
         gradients
         linalg
    F0   types, masked, tree, errors, calls, operators, state, which  the ground, which both towers stand on
         members, equal_shapes, products, rows, taps, joined, per_example, conjugate_gradients, shares, free_constant
         value_reads
"""

import ast
import re
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]


class Floor(NamedTuple):
    tower: str
    height: float


FLOORS = {
    **dict.fromkeys(
        [
            "types",
            "masked",
            "tree",
            "equal_shapes",
            "errors",
            "calls",
            "operators",
            "conjugate_gradients",
            "products",
            "rows",
            "state",
            "taps",
            "joined",
            "per_example",
            "free_constant",
            "shares",
            "which",
            "value_reads",
        ],
        Floor("ground", 0),
    ),
    "members": Floor("ground", 0),
    **dict.fromkeys(["linalg"], Floor("method", 1)),
    **dict.fromkeys(["gradients"], Floor("method", 1.2)),
    **dict.fromkeys(["lowrank", "rearrangement"], Floor("method", 1.4)),
    **dict.fromkeys(["base", "fisher"], Floor("method", 1.6)),
    **dict.fromkeys(["methods"], Floor("method", 2)),
    **dict.fromkeys(["layers", "likelihoods", "decompositions"], Floor("stats", 1)),
    "randomness": Floor("stats", 2),
    "stats": Floor("stats", 3),
    **dict.fromkeys(
        ["views", "dataset", "influence", "linearised", "merged", "posterior_noise", "priors"], Floor("roof", 4)
    ),
    "refreshes": Floor("roof", 4.5),
    **dict.fromkeys(["natgrad", "compiled"], Floor("roof", 5)),
    "terms": Floor("roof", 5.5),
    **dict.fromkeys(["adapt", "laplace", "distributed"], Floor("roof", 6)),
    "stagger": Floor("roof", 6.5),
    "optim": Floor("roof", 7),
    "__init__": Floor("roof", 8),
}
LINES = 300
FEW_LINES = 4
PUBLIC_MODULES = {"distributed", "errors", "tree", "likelihoods", "members", "optim"}
RUNTIME = {"torch", "numpy", "einops", "jaxtyping"}
OPTIONAL = {"fisherfn/operators.py": "scipy"}  # imported by the call that needs it, with an error that says so
# at the top of the repository: what is installed, built or made by running things
NOT_OURS = re.compile(r"\.git|\.venv|\.\w+_cache|\.hypothesis|results|data|build|dist|site|.*\.egg-info")
# in pieces, so that this file does not hold what it looks for
FORBIDDEN = re.compile("/" + "(work|home|root|Users|opt)/|py" + "pi|python" + "hosted|arti" + "factory")


def our_files(pattern):
    """Files of the repository; the git history is not asked, so that an unpacked archive is tested as well."""
    tops = [top for top in ROOT.iterdir() if not NOT_OURS.fullmatch(top.name)]
    files = [path for top in tops for path in (top.rglob(pattern) if top.is_dir() else [top])]
    return sorted(path for path in files if path.match(pattern) and path.is_file() and "__pycache__" not in path.parts)


def short(path):
    return str(path.relative_to(ROOT))


def package_of(path):
    return ".".join(path.relative_to(ROOT).parent.parts)


LIBRARY = [path for path in our_files("*.py") if short(path).startswith("fisherfn/")]
APPS = [path for path in our_files("*.py") if short(path).startswith("apps/")]


# ---------------------------------------------------------------------------------------------------- reading imports


def imports(source, package):
    """Every dotted name that `source` imports, wherever the statement stands; relative ones made absolute."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            base = [*above, *filter(None, [node.module])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def parts(source, package):
    """The parts of fisherfn (its top-level files and sub-packages) that `source` imports."""
    for name in imports(source, package):
        top, part, *_ = [*name.split("."), "__init__"]
        if top == "fisherfn":
            # `from fisherfn import kfac` takes a public name out of the roof
            yield part if part in FLOORS else "__init__"


def may_import(above, below):
    """Whether a file of the part `above` may import from the part `below`."""
    if above == below:
        return True  # a sub-package is one floor
    high, low = FLOORS[above], FLOORS[below]
    return low.tower == "ground" or (low.height < high.height and high.tower in (low.tower, "roof"))


# -------------------------------------------------------------------------------------------------------- the library


@pytest.mark.parametrize("path", LIBRARY, ids=short)
def test_library_imports_only_go_down_their_own_tower(path):
    top = path.relative_to(ROOT / "fisherfn").parts[0]
    part = top.removesuffix(".py")
    assert part in FLOORS, (
        f"{short(path)} has no floor. Give {part!r} one in FLOORS above: 'ground' 0 if it knows no other part; "
        "'method' 1 for mathematics of factors, 2 for a method; 'stats' 1 for what a layer, a likelihood or a "
        "decomposition is, 2 for random numbers, 3 for collecting statistics; 'roof' 4 or more if it needs both towers."
    )
    for other in parts(path.read_text(), package_of(path)):
        assert may_import(part, other), (
            f"{short(path)} (tower {FLOORS[part].tower}, floor {FLOORS[part].height}) imports fisherfn.{other} "
            f"(tower {FLOORS[other].tower}, floor {FLOORS[other].height}). Imports go to lower floors of one's own "
            "tower or to the ground: move down what the two share, or up what combines them."
        )


@pytest.mark.parametrize(
    ("start", "end"),
    [("# Design: two towers", "## Where to look"), ("## Structure", "## Adding a method"), ("The house", "ROOT =")],
)
def test_every_part_has_its_place_in_the_drawings_of_the_towers(start, end):
    text = "".join(
        (ROOT / file).read_text() for file in ("docs/design.md", "CONTRIBUTING.md", "tests/test_structure.py")
    )
    shown = text.partition(start)[2].partition(end)[0]
    assert [part for part in FLOORS if part != "__init__" and not re.search(rf"\b{part}\b", shown)] == []


def test_the_rule_refuses_what_it_should():
    allowed = ["natgrad methods", "natgrad stats", "methods base", "stats layers", "layers types", "errors types"]
    refused = ["methods layers", "stats linalg", "base methods", "linalg base", "types base", "natgrad adapt"]
    assert all(may_import(*pair.split()) for pair in [*allowed, "methods methods", "__init__ natgrad"])
    assert not any(may_import(*pair.split()) for pair in [*refused, "stats __init__", "likelihoods fisher"])


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("from fisherfn.stats import Stats", "stats"),
        ("from fisherfn import stats", "stats"),
        ("import fisherfn.stats.collect as c", "stats"),
        ("from ..stats import Stats", "stats"),
        ("from .. import stats", "stats"),
        ("def late():\n    from fisherfn.stats import Stats", "stats"),
        ("if TYPE_CHECKING:\n    from fisherfn.stats import Stats", "stats"),
        ("from .kfac import kfac", "methods"),
        ("from . import kfac", "methods"),
        ("import fisherfn as ff", "__init__"),
        ("from fisherfn import natural_gradient", "__init__"),
    ],
)
def test_every_way_to_import_is_seen(source, part):
    assert list(parts(source, package="fisherfn.methods")) == [part]


@pytest.mark.parametrize("path", LIBRARY, ids=short)
def test_library_imports_its_four_packages_only(path):
    tops = {name.split(".")[0] for name in imports(path.read_text(), package_of(path))}
    assert tops <= {"fisherfn", *RUNTIME, *sys.stdlib_module_names} | {OPTIONAL.get(short(path), "fisherfn")}


@pytest.mark.parametrize("package", sorted(RUNTIME))
def test_every_runtime_dependency_is_imported_by_the_library(package):
    tops = {name.split(".")[0] for path in LIBRARY for name in imports(path.read_text(), package_of(path))}
    assert package in tops


@pytest.mark.parametrize(("file", "package"), OPTIONAL.items())
def test_an_optional_package_is_imported_only_by_the_call_that_needs_it(file, package):
    tree = ast.parse((ROOT / file).read_text())
    outside = [node for node in tree.body if not isinstance(node, ast.FunctionDef)]
    names = [name for node in outside for name in imports(ast.unparse(node), "fisherfn")]
    assert package not in {name.split(".")[0] for name in names}


# ----------------------------------------------------------------------------------------------------------- the apps


def not_public(source):
    """Return the names that an app imports from fisherfn and that are not public."""
    tree = ast.parse(source)
    used = [f"fisherfn.{n.attr}" for n in ast.walk(tree) if isinstance(n, ast.Attribute) and is_library(n.value)]
    for name in [*imports(source, package="apps"), *used]:
        top, *rest = name.split(".")
        hidden = rest and rest[0] in FLOORS and rest[0] not in PUBLIC_MODULES
        if top == "fisherfn" and (hidden or any(part.startswith("_") for part in rest)):
            yield name


def is_library(node):
    return isinstance(node, ast.Name) and node.id in ("ff", "fisherfn")


@pytest.mark.parametrize("path", APPS, ids=short)
def test_apps_use_public_names_only(path):
    assert list(not_public(path.read_text())) == [], "write `import fisherfn as ff` and take public names from ff"


def test_private_names_are_detected():
    assert list(not_public("from fisherfn.stats.collect import collect")) == ["fisherfn.stats.collect.collect"]
    assert list(not_public("from fisherfn import methods")) == ["fisherfn.methods"]
    assert list(not_public("from fisherfn.tree import _walk")) == ["fisherfn.tree._walk"]
    assert list(not_public("import fisherfn as ff\nff.natgrad.State")) == ["fisherfn.natgrad"]
    public = "import fisherfn as ff\nfrom fisherfn import errors, kfac\nfrom fisherfn.tree import add\nff.tree.add"
    assert list(not_public(public)) == []


# ------------------------------------------------------------------------------------------------ files and functions


@pytest.mark.parametrize("path", LIBRARY, ids=short)
def test_a_file_of_the_library_has_at_most_300_lines(path):
    assert len(path.read_text().splitlines()) <= LINES, "split it by subject, or find what can be said more simply"


def called_once(source):
    """Yield the private functions of a module that have few lines besides their docstring and are called once."""
    tree = ast.parse(source)
    used = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    called = [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("_"):
            docstring = node.body[0] if ast.get_docstring(node) else None
            lines = node.end_lineno - node.lineno + 1
            lines -= docstring.end_lineno - docstring.lineno + 1 if docstring else 0
            if lines <= FEW_LINES and used.count(node.name) == called.count(node.name) == 1:
                yield node.name


def test_few_small_helpers_are_called_only_once():
    found = [f"{short(path)} {name}" for path in LIBRARY for name in called_once(path.read_text())]
    assert len(found) <= 10, f"write one of them where it is called, unless its name says more than its body: {found}"


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("def _a(x):\n    return x\n\n_a(1)", ["_a"]),
        ("def _a(x):\n    'Says what.'\n    y = x\n    z = y\n    return z\n\n_a(1)", ["_a"]),
        ("def _a(x):\n    y = x\n    z = y\n    w = z\n    return w\n\n_a(1)", []),  # too long
        ("def _a(x):\n    return x\n\n_a(1), _a(2)", []),
        ("def _a(x):\n    return x\n\nsorted([], key=_a)", []),  # a value: it has no place to be written in
        ("def a(x):\n    return x\n\na(1)", []),
    ],
)
def test_small_helpers_are_found(source, names):
    assert list(called_once(source)) == names


# -------------------------------------------------------------------------------------------------------- the project


def test_runtime_dependencies_stay_the_four():
    assert {bare(requirement) for requirement in project()["dependencies"]} == RUNTIME


def test_every_package_of_every_extra_is_pinned():
    wanted = sum(project()["optional-dependencies"].values(), project()["dependencies"])
    pins = "".join((ROOT / file).read_text() for file in ("constraints.txt", "constraints-optional.txt"))
    pinned = {bare(line) for line in pins.splitlines() if "==" in line}
    assert {bare(requirement) for requirement in wanted} <= pinned


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def bare(requirement):
    return re.split(r"[<>=!~ \[]", requirement)[0].lower().replace("_", "-")


def test_no_file_is_called_utils():
    assert [short(path) for path in our_files("utils*")] == [], "name a file by what it holds"


def test_no_file_names_a_machine_or_a_package_registry():
    found = [f"{short(path)}:{number}: {line}" for path in our_files("*") for number, line in forbidden(path)]
    assert found == []


def forbidden(path):
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError:
        return []  # a picture
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if FORBIDDEN.search(line)]


def test_forbidden_code_is_detected(tmp_path):
    (tmp_path / "notes.md").write_text("fine\nsee /" + "home/someone/notes\npip install -i https://py" + "pi.example\n")
    assert [number for number, _ in forbidden(tmp_path / "notes.md")] == [2, 3]
