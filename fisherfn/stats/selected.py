"""Rows that were chosen by values, as by a mask of padding: the examples of these rows change from batch to batch.

`h[mask]` of a batch with three tokens in every example looks like a layer with three rows per example, and the next
batch has four and two. So a layer on such rows is none whose rows the library can assign to examples. A mask that does
not depend on the inputs (of a buffer, of positions) always chooses the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fisherfn.stats.steps import name_of, tensors_among, tensors_of
from fisherfn.types import PyTree

CHOOSING = {"masked_select", "nonzero", "argwhere", "unique", "unique_consecutive", "_unique2", "_pack_padded_sequence"}
"""Functions whose first outputs have as many rows as the values of their inputs say."""

READING = {"tolist", "item", "__int__", "__index__"}
"""Functions that return values as numbers of Python, which may then be lengths of slices."""

REPLACING = ("index_put", "index_add", "index_copy", "index_fill", "scatter", "masked_scatter")
"""Beginnings of the names of functions that write rows to places of another tensor, whose rows are then in order."""


class Selected:
    """The tensors of a run whose rows were chosen by values that depend on the inputs."""

    def __init__(self, inputs: PyTree = ()) -> None:
        self._chosen: Any = WeakTensorKeyDictionary()
        self._varying: Any = WeakTensorKeyDictionary()
        self._examples = 0
        self._lengths = False
        """True after values of the inputs were read as numbers."""
        self.begin(inputs)

    def begin(self, inputs: PyTree) -> None:
        """Note the inputs of the run."""
        for leaf in tensors_among(inputs):
            self._varying[leaf] = True
            self._examples = len(leaf)

    def note(self, func: Callable[..., Any], args: tuple[Any, ...], arguments: PyTree, output: Any) -> None:
        """Note the outputs of a call, if it chooses rows or reads chosen ones."""
        read, made, name = tensors_among(arguments), tensors_of(output), name_of(func)
        if not any(leaf in self._varying for leaf in read):
            return
        self._lengths |= name in READING
        changed = [args[0]] if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) else []
        for leaf in (*made, *(leaf for leaf in changed if isinstance(leaf, Tensor))):
            self._varying[leaf] = True
        masks = _masks(func, args)
        if masks is not None:
            if any(leaf in self._varying for leaf in masks):
                self._mark(made[:1] if name.startswith(("unique", "_unique")) else made)
        elif self._lengths and self._joins_examples(name, args, arguments):
            self._mark(made)
        elif not name.startswith(REPLACING):
            self._pass_on(func, args, read, made)

    def _pass_on(self, func: Callable[..., Any], args: tuple[Any, ...], read: list[Tensor], made: list[Tensor]) -> None:
        """Mark the outputs of a call that reads chosen rows, unless each example has its own place in them again.

        That is so after a reshape to `[N, …]` (the same number was chosen in every example), and in a sum with a tensor
        `[N, …]`.
        """
        index = tensors_among(args[1:]) if func is Tensor.__getitem__ else []
        sources = index or read  # by an index, the rows of the source are given new places
        chosen = [leaf for leaf in sources if leaf in self._chosen]
        if not chosen:
            return
        ordered = any(self._per_example(leaf) for leaf in sources if leaf not in self._chosen)
        ordered |= name_of(func) in _RESHAPING and not any(self._per_example(leaf) for leaf in chosen)
        self._mark(leaf for leaf in made if not (ordered and self._per_example(leaf)))

    def _joins_examples(self, name: str, args: tuple[Any, ...], arguments: PyTree) -> bool:
        """Return True if a call joins a piece of each example along the first axis, which may differ in length."""
        axis = args[1] if len(args) > 1 else arguments[1].get("dim", 0)
        return name in ("cat", "concat") and axis == 0 and len(tensors_among(arguments)) >= max(3, self._examples)

    def _per_example(self, tensor: Tensor) -> bool:
        return tensor.ndim > 0 and len(tensor) == self._examples

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor in self._chosen

    def _mark(self, tensors: Iterable[Tensor]) -> None:
        for leaf in tensors:
            self._chosen[leaf] = True


_RESHAPING = {"reshape", "view", "unflatten"}


def _masks(func: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor] | None:
    """Return the tensors whose values decide how many rows a call returns; None for a call that chooses none."""
    name = name_of(func)
    if name in CHOOSING or (name == "where" and len(args) == 1):
        return tensors_among(args)
    if name == "repeat_interleave":
        counts = [leaf for leaf in args[1:] if isinstance(leaf, Tensor) and leaf.ndim]
        return counts or None
    if func is not Tensor.__getitem__:
        return None
    index = args[1] if isinstance(args[1], tuple | list) else (args[1],)
    masks = [part for part in index if isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8)]
    return masks if masks and masks[0] is index[0] else None  # behind a slice the rows stay
