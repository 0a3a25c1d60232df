r"""Elementwise scales, shifts and every other parameter that all examples share up to a broadcast: $y = w \odot x + b$.

Hand-written normalisations, layer scales, class and position tokens, tables of relative positions, trained slopes: each
reaches the batch by a broadcast, after views, casts or other small computations that no example enters. Give every
example a copy $w_n$ of the parameter where it meets the batch; $g_n = \partial L_n / \partial w_n$ is then exactly the
per-example gradient, already summed over positions, and $a = 1$. A small parameter is one dense block, a wide one a
block for each entry, as in the fallback. Unlike the fallback this needs no run of the model per example.

This file says which calls are such a meeting, and how copies are laid out for one. Raw "input" `[N]` of ones, raw
"output-gradient" `[S, N, *shape]`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fisherfn.layers.base import Family
from fisherfn.layers.fallback import columns, from_matrix, rows, to_matrix

_BROADCASTING = {
    *("add", "sub", "rsub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "pow", "where"),
    *("maximum", "minimum", "addcmul", "addcdiv", "lerp", "logaddexp", "hypot", "atan2"),
    *("__rsub__", "__rdiv__", "__rtruediv__", "__rpow__", "__radd__", "__rmul__"),
}
_SPREADING = {"expand", "expand_as", "broadcast_to", "repeat", "tile"}


def broadcasts(function: Callable[..., Any]) -> bool:
    """Whether a call broadcasts its tensors against each other, so that copies can stand for a shared one."""
    name = getattr(function, "__name__", "")
    return name in _BROADCASTING or (changes_input(function) and name.rstrip("_") in _BROADCASTING)


def spreads(function: Callable[..., Any]) -> bool:
    """Whether a call only makes a tensor larger by repeating it."""
    return getattr(function, "__name__", "") in _SPREADING


def changes_input(function: Callable[..., Any]) -> bool:
    """Whether a call works in place."""
    name = getattr(function, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def works_in_place(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call changes its first tensor: by its name, or by `inplace=True` as activations have it."""
    if changes_input(function):
        return True
    place = _place_of_inplace(function)
    return place is not None and bool(args[place] if len(args) > place else kwargs.get("inplace"))


@lru_cache(maxsize=1024)
def _place_of_inplace(function: Callable[..., Any]) -> int | None:
    if getattr(function, "__module__", None) != F.__name__:
        return None
    names = list(inspect.signature(function).parameters)
    return names.index("inplace") if "inplace" in names else None


def meeting(copies: Float[Tensor, "n *shape"], axis: int, repeats: int, outer: int) -> Float[Tensor, "..."]:
    """Lay out copies `[N, *shape]` for a broadcast against a tensor that has the examples on `axis`, from the right.

    The shared tensor has a length of 1 there, or fewer axes. The other tensor may have `repeats` rows per example,
    `outer` of them further out than the examples. Where a call repeats a longer shared tensor once per example, its own
    length is innermost.

    Raises:
        ValueError: it has another length on that axis.
    """
    right = -axis - 1
    missing = right - (copies.ndim - 1)
    if missing >= 0:
        laid: Tensor = copies.reshape(copies.shape[0], *(1,) * missing, *copies.shape[1:])
    else:
        place = copies.ndim - right - 1
        length = copies.shape[place]
        laid = copies.movedim(0, place - 1)  # examples, then the shared tensor's own
        if length == 1:
            laid = laid.squeeze(place)
        elif repeats % length or outer > 1:
            raise ValueError(f"a shared tensor has length {length} where the examples are")
        else:
            again = repeats // length
            laid = laid.unsqueeze(place)
            laid = laid.expand(*laid.shape[:place], again, *laid.shape[place + 1 :])
            return laid.flatten(place - 1, place + 1)
    if repeats == 1:
        return laid
    row = torch.arange(copies.shape[0] * repeats, device=copies.device)
    return laid.index_select(axis, row // (repeats // outer) % copies.shape[0])


ELEMENTWISE = Family("elementwise", (), lambda function, args, kwargs: None, rows, columns, to_matrix, from_matrix)
