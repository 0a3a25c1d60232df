"""Values that a call reads: some calls take a tensor for its shape or type alone, and some return it as it is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from fisherfn.stats.steps import name_of

_FIRST_ALONE = {"to", "type_as", "view_as", "expand_as", "reshape_as"}
"""Functions that read the values of their first argument alone; those that make new tensors read none."""

_CASTS = {"to", "type", "type_as", "contiguous", "float", "double", "half", "bfloat16", "cpu", "cuda"}
"""Functions that return the very tensor if it has the asked type, place and order already."""

_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]


def values_read(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call without those that it takes for their shape or type alone."""
    name = name_of(func)
    if name in _FIRST_ALONE:
        return args[:1], {}
    if name.endswith("_like") or name.startswith("new_"):
        return (), {}
    return args, kwargs


def changes_nothing(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return True if a call casts its first argument to what it is already: a layer's weight then stays this weight."""
    if name_of(func) not in _CASTS or any(arg is True for arg in (*args[1:], kwargs.get("copy"))):
        return False  # True may ask for a copy
    given, output = args[0], func(*args, **kwargs)
    return isinstance(output, Tensor) and bool(
        (output.dtype, output.device, output.shape, output.stride())
        == (given.dtype, given.device, given.shape, given.stride())
    )


def inside_function() -> bool:
    """Return True within the forward of a `torch.autograd.Function`.

    Under a transform such a function is one call, with a derivative of its own; without one, its calls look like calls
    of the model.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _APPLY:
            return True
        frame = frame.f_back
    return False
