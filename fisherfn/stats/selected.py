"""Rows that were chosen by values, as by a mask of padding: the examples of these rows change from batch to batch.

`h[mask]` of a batch with three tokens in every example looks like a layer with three rows per example, and the next
batch has four and two. So a layer on such rows is none whose rows the library can assign to examples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fisherfn.stats.steps import name_of, tensors_among, tensors_of
from fisherfn.types import PyTree

CHOOSING = {"masked_select", "nonzero", "argwhere", "unique", "unique_consecutive", "_unique2", "_pack_padded_sequence"}
"""Functions whose outputs have as many rows as the values of their inputs say."""


class Selected:
    """The tensors of a run whose rows were chosen by values; their rows stay chosen until a call makes others."""

    def __init__(self) -> None:
        self._found: dict[int, Tensor] = {}

    def note(self, func: Callable[..., Any], args: tuple[Any, ...], arguments: PyTree, output: Any) -> None:
        """Note the outputs of a call, if it chooses rows or reads chosen ones."""
        if _chooses(func, args):
            found = tensors_of(output)
        else:
            rows = {len(leaf) for leaf in tensors_among(arguments) if leaf in self and leaf.ndim}
            found = [leaf for leaf in tensors_of(output) if leaf.ndim and len(leaf) in rows] if rows else []
        self._found |= {id(leaf): leaf for leaf in found}  # kept alive, so that no other tensor gets its identity

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._found


def _chooses(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Return True for a function of `CHOOSING`, and for a boolean index of the first axis."""
    if name_of(func) in CHOOSING:
        return True
    if func is not Tensor.__getitem__:
        return False
    index = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
