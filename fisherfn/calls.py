"""Calls of torch functions, as a torch-function mode sees them: a function with positional and named arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def bind(names: Iterable[str], args: Iterable[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given arguments of a call by name.

    >>> bind(("input", "weight", "bias"), (1, 2), {"bias": 3})
    {'input': 1, 'weight': 2, 'bias': 3}
    """
    return {**dict(zip(names, args, strict=False)), **kwargs}
