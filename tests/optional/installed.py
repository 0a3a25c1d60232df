"""Packages that the tests in this folder need, or the reason why they are skipped."""

import importlib
import warnings

import pytest


def need(name, extra="optional"):
    """The package, or a skipped module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other packages warn of when imported is theirs
        try:
            return importlib.import_module(name)
        except ImportError:
            reason = (
                f"{name} is not installed: pip install -c constraints.txt -c constraints-optional.txt -e '.[{extra}]'"
            )
            pytest.skip(reason, allow_module_level=True)
