"""Calls of torch functions, as a torch-function mode sees them: a function with positional and named arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def bind(names: Iterable[str], args: Iterable[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given arguments of a call by name.

    >>> bind(("input", "weight", "bias"), (1, 2), {"bias": 3})
    {'input': 1, 'weight': 2, 'bias': 3}
    """
    return {**dict(zip(names, args, strict=False)), **kwargs}


def holds(mask: Bool[Tensor, ""]) -> bool:
    """Return a mask's value; true where values cannot be looked at (`torch.vmap`, a trace)."""
    if get_proxy_mode() is not None or torch.compiler.is_compiling():
        return True
    try:
        return bool(mask)
    except RuntimeError:  # under torch.vmap
        return True
