"""The examples of the documentation as modules."""

import importlib.util
from pathlib import Path

import matplotlib

DOCS = Path(__file__).resolve().parents[1] / "docs"

matplotlib.use("Agg")


def load(name):
    """Return the example of that name."""
    spec = importlib.util.spec_from_file_location(name, DOCS / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
