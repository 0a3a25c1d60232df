"""The pass with run-time checks of shapes and types: it has to call every function of the library once.

Checking every call in every test would double the suite's time. So `make test` runs it without checks, and then the
modules marked `typed` with them; this plugin fails that pass when a function with annotations was never called in it.
`make test-deep` checks everywhere.
"""

import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parents[1] / "fisherfn"
HOOK = "--jaxtyping-packages"

Place = tuple[str, str, int]
"""File, name and line of a function."""


def annotated() -> Iterator[Place]:
    """Every function of the library whose arguments or result have types; a body that is `...` is none."""
    for path in sorted(LIBRARY.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not declared(node):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if node.returns or any(argument.annotation for argument in arguments):
                    yield str(path), node.name, node.lineno


def declared(node: ast.FunctionDef) -> bool:
    """Whether the function only says what others must have: a docstring and `...`, or an error."""
    last = node.body[-1]
    constant = isinstance(last, ast.Expr) and isinstance(last.value, ast.Constant)
    return constant or (isinstance(last, ast.Raise) and len(node.body) <= 2)


class Calls:
    """The functions of the library that were called, by the places of their code."""

    def __init__(self) -> None:
        self.codes: dict[object, bool] = {}
        self.places: set[Place] = set()

    def __call__(self, frame, event, argument):
        if event == "call" and frame.f_code not in self.codes:
            code = frame.f_code
            self.codes[code] = True
            if code.co_filename.startswith(str(LIBRARY)):
                # the first line is that of a decorator where there is one
                self.places |= {(code.co_filename, code.co_name, line) for line in lines(code)}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        sys.setprofile(self)
        yield
        sys.setprofile(None)

    def pytest_sessionfinish(self, session):
        output = getattr(session.config, "workeroutput", None)
        if output is not None:  # one of several processes: the first one collects
            output["called"] = sorted(self.places)
            return
        missing = [place for place in annotated() if place not in self.places]
        if missing and not session.exitstatus:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            for path, name, line in missing:
                print(f"\nnot called with type checks: {os.path.relpath(path)}:{line} {name}", end="")

    def pytest_testnodedown(self, node):
        self.places |= {tuple(place) for place in node.workeroutput.get("called", ())}


def lines(code) -> range:
    """Lines on which the function's `def` may be: its code begins at the first decorator."""
    return range(code.co_firstlineno, code.co_firstlineno + 8)
