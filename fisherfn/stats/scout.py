"""Search for the calls that read tensors shared by all examples, by comparing two runs.

The second run has one example more than the first. An output whose shape is the same in both is shared, too. If it grew
along one axis, the shared tensor meets the batch in this call. Each step is tried immediately: if torch refuses it, the
weights from which its shared tensors come get a fallback.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Size, Tensor

from fisherfn import tree
from fisherfn.layers import broadcasts, changes_input, spreads, works_in_place
from fisherfn.stats.reads import values_read
from fisherfn.stats.shared import Copies, Ledger, Shared, origins_of, spread
from fisherfn.stats.steps import Growth, Place, Step, Traced, name_of, tensors_among, tensors_of
from fisherfn.types import PyTree


class Scout(Ledger):
    """Find the steps for shared tensors: compare a run with an earlier run of one example less, call by call."""

    def __init__(self, before: Sequence[Traced], examples: int) -> None:
        super().__init__()
        self._before, self._examples = before, examples
        self._place = -1
        self._inputs: Sequence[Size] | None = None
        """The shapes of the current call's inputs in the earlier run; None if unknown."""
        self._in_layer = False
        """True if the current call is a layer, which is never run once per example."""
        self.steps: list[Step] = []
        self.failed: dict[str, str] = {}
        """The name of the call that cannot be followed, for each weight whose shared tensors it reads."""
        self._stale: dict[int, Shared] = {}
        """Shared tensors that were changed through another tensor with the same storage."""
        self.copied: dict[str, str] = {}
        """The name of the call run once per example, for each weight whose shared tensors meet the batch in it."""

    @property
    def saw_the_same_calls(self) -> bool:
        """True if both runs made the same calls; a cache that the first one fills (masks, positions) hides some."""
        return self._place == len(self._before) - 1

    def growth(self, func: Callable[..., Any], arguments: PyTree, output: Any) -> Growth:
        """Compare the next call with the earlier run, and return how its outputs grow."""
        self._place += 1
        self._inputs = None
        if self._place >= len(self._before):
            return None
        name, shapes, input_shapes = self._before[self._place]
        outputs, inputs = tensors_of(output), tensors_among(arguments)
        if name != name_of(func) or len(shapes) != len(outputs):
            self._place = len(self._before)  # the runs differ: no later call can be compared
            return None
        if len(inputs) == len(input_shapes):
            self._inputs = input_shapes
        return self._places(shapes, outputs)

    def _places(self, shapes: Sequence[Size], tensors: Sequence[Tensor]) -> Growth:
        """Find the axis in which each tensor is longer than in the earlier run."""
        found: list[Place | None] = []
        for old, new in zip(shapes, tensors, strict=True):
            if old == new.shape:
                found.append(None)
                continue
            axes = [axis for axis, (a, b) in enumerate(zip(old, new.shape, strict=False)) if a != b]
            if len(old) != new.ndim or len(axes) != 1:
                return None
            length, longer = old[axes[0]], new.shape[axes[0]]
            if length * (self._examples + 1) != longer * self._examples:
                return None
            place = Place(axes[0] - new.ndim, length // self._examples)
            found.append(place if place.repeats == 1 else place._replace(outer=self.outer(new, place)))
        return found

    def outer(self, x: Tensor, place: Place) -> int:
        """Return how many of each example's rows are further out than the examples.

        The last example is a copy of the first, so its rows are found by their equal values.
        """
        rows = x.detach().movedim(place.axis, 0).flatten(1) if x.ndim > 1 else x.detach().unsqueeze(-1)
        rows = rows.nan_to_num() if rows.is_floating_point() else rows.double()
        for outer in (n for n in range(1, place.repeats + 1) if place.repeats % n == 0):
            each = rows.unflatten(0, (outer, self._examples + 1, -1))
            first, last = each[:, 0], each[:, -1]
            if bool((first - last).norm() <= 1e-3 * first.norm()):
                return outer
        return 1

    def note_parameters(self, arguments: PyTree, names: Mapping[int, str], besides: tuple[Any, ...] = ()) -> None:
        """Record the parameters among the arguments of a call: all examples share them."""
        for leaf in tree.leaves(arguments):
            if id(leaf) in names and not any(leaf is other for other in besides):
                self.add(leaf, frozenset([names[id(leaf)]]), partial(spread, leaf))

    def look(
        self,
        func: Callable[..., Any],
        args: Any,
        kwargs: Any,
        output: Any,
        growth: Growth,
        names: Mapping[int, str],
        besides: tuple[Any, ...] = (),
    ) -> None:
        """Record what a call does with shared tensors: a step, or a failure if it cannot be followed."""
        if not tensors_of(output) and not changes_input(func):
            return  # the call returned a shape or a number
        read = values_read(func, args, kwargs)
        self.note_parameters(read, names, besides)
        for leaf in tree.leaves(read):
            if id(leaf) in self._stale:
                self.fail(self._stale[id(leaf)].origins, name_of(func))
        shared = self.among(read)
        shared = {key: entry for key, entry in shared.items() if not any(entry.tensor is other for other in besides)}
        if not shared:
            return
        self._in_layer = bool(besides)
        origins = origins_of(shared)
        try:
            if growth is None:
                raise ValueError("examples not found")
            if all(each is None for each in growth):
                self._derived(func, args, kwargs, output, shared)
                self.steps.append(Step(name_of(func), None, origins))
            else:
                (place,) = growth
                self.steps.append(self._met(func, args, kwargs, output, shared, place))
        except Exception:  # for any error of torch, the parameter gets a fallback
            self.fail(origins, name_of(func))

    def add_layer(
        self, func: Callable[..., Any], weight: str, shared: dict[int, Shared], output: Tensor, copies: Copies
    ) -> None:
        """Record the output of a layer whose input is shared by all examples, if it can be copied per example."""
        super().add_layer(func, weight, shared, output, copies)
        origins = origins_of(shared)
        if shared:
            self.steps.append(Step(name_of(func), None, origins))
        try:
            if copies(2).shape[1:] != output.shape:
                raise ValueError("copies of another shape")
        except Exception:  # as above
            self.fail(origins | {weight}, name_of(func))

    def fail(self, origins: frozenset[str], cause: str) -> None:
        """Record that these weights need a fallback, because of a call of this name."""
        for name in origins:
            self.failed.setdefault(name, cause)

    def _derived(self, func: Any, args: Any, kwargs: Any, output: Any, shared: dict[int, Shared]) -> None:
        if works_in_place(func, args, kwargs):
            self._changes(args[0], output)
        self.derive(func, args, kwargs, shared, output)
        for part in tensors_of(output):
            if self.entries[id(part)].copies(2).shape[1:] != part.shape:
                raise ValueError("copies of another shape")

    def _changes(self, x: Any, output: Any) -> None:
        """Stop following other tensors whose storage an in-place call changes: their copies would keep old values."""
        if output is not x or not self.is_shared(x):
            raise ValueError("a tensor changed in place by a shared one")
        for key, entry in list(self.entries.items()):
            if entry.tensor is not x and entry.tensor.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
                self._stale[key] = self.entries.pop(key)

    def _met(
        self, func: Any, args: Any, kwargs: Any, output: Any, shared: dict[int, Shared], place: Place | None
    ) -> Step:
        if place is None or (changes_input(func) and self.is_shared(args[0])):
            raise ValueError("a shared tensor changed in place")
        if not (broadcasts(func) or spreads(func)):
            return self._met_by_copies(func, args, kwargs, output, shared, place)
        if changes_input(func):
            args = (args[0].clone(), *args[1:])
        if self.meet(func, args, kwargs, shared, place).shape != output.shape:
            raise ValueError("copies of another shape")
        return Step(name_of(func), place, origins_of(shared))

    def _met_by_copies(
        self, func: Any, args: Any, kwargs: Any, output: Tensor, shared: dict[int, Shared], place: Place
    ) -> Step:
        """Return the step of a call that is run once per example; raise unless this reproduces the call's output."""
        inputs = None if self._inputs is None else self._places(self._inputs, tensors_among(args, kwargs))
        if self._in_layer or inputs is None or changes_input(func) or kwargs.get("out") is not None:
            raise ValueError("no call that can be run once per example")
        step = Step(name_of(func), place, origins_of(shared), tuple(inputs))
        found = self.meet(func, args, kwargs, shared, place, step.inputs)
        a, b = found.nan_to_num(), output.nan_to_num()
        noise = torch.finfo(output.dtype).eps ** 0.5 * b.norm()
        if a.shape != b.shape or bool((a - b).norm() > noise):
            raise ValueError("a call that mixes examples")
        for name in step.origins:
            self.copied.setdefault(name, step.function)
        return step
