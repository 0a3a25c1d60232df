"""Packages that the tests in this folder need, or the reason why they are skipped."""

import importlib
import warnings

import pytest

from common.zoo import nets


def need(name, extra="optional", how=None):
    """The package, or a skipped module; `how` says how to install it, if not by an extra."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other packages warn of when imported is theirs
        try:
            if name in ("timm", "transformers"):
                nets.torchvision()
            return importlib.import_module(name)
        except ImportError:
            how = how or f"pip install -c constraints.txt -c constraints-optional.txt -e '.[{extra}]'"
            reason = f"{name} is not installed: {how}"
            pytest.skip(reason, allow_module_level=True)
