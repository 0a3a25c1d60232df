"""The passes of the user's own loop that a curvature watches, between its steps."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fisherfn.adapt import Cadence
from fisherfn.errors import StructureError, unknown
from fisherfn.natgrad import NaturalGradient
from fisherfn.optim.network import Network, examples
from fisherfn.optim.ranks import alone
from fisherfn.optim.scaling import Scaling
from fisherfn.optim.watch import REDUCTIONS, Pass, Watched, statistics
from fisherfn.stats import Layout, Stats
from fisherfn.stats.path import check_calls
from fisherfn.stats.swap import unwrapped
from fisherfn.types import PyTree

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional arguments and keyword arguments of a call."""


class Passes:
    """Watches forward passes of a module until the next step, which takes their statistics."""

    network: Network
    scaling: Scaling
    build: Callable[[PyTree], NaturalGradient]
    ready: Callable[[], NaturalGradient]
    steps: int
    _again: Callable[[], bool]
    _cadence: Cadence
    _form: Any
    _passes: list[Pass]
    _task: int

    @property
    def updates(self) -> bool:
        """True if the next step computes statistics."""
        return self._cadence(self.steps).update or self._again()

    @contextlib.contextmanager
    def watch(self, inputs: PyTree, reduction: str) -> Iterator[None]:
        """Record one forward pass of the net, if the next step computes statistics; else only its input shapes."""
        if reduction not in REDUCTIONS:
            raise unknown("reduction", reduction, REDUCTIONS)
        alone("a watched pass")
        layout = (self.ready() if inputs is None else self.build(inputs)).layout
        if layout.fallbacks:
            names = ", ".join(repr(block.weight) for block in layout.fallbacks[:4])
            raise StructureError(
                f"{names} belong to no layer, and one backward pass does not give their per-example gradients: pass "
                'the batch to step((x, y)) instead of watching, or build with uncovered="gradient" (plain gradients).'
            )
        self._forget_erased(layout)
        calls: list[Arguments] = []
        if not self.updates:
            with noted(self.network.net, calls):
                yield
            self._called(calls)
            return
        seen = Watched(self.network.parameters(), lambda _: self._begun(layout))
        with noted(self.network.net, calls), seen.run(layout.plan) as mode:
            yield
        x = self._called(calls)
        layout = layout if x is None else self.build(x).layout
        check_calls(layout, mode)
        known = inputs is not None or x is not None
        self._passes.append(
            Pass(seen.calls, reduction, self.scaling.factor, layout, known, None if x is None else examples(x))
        )

    def _called(self, calls: list[Arguments]) -> PyTree:
        """Find the layers for the inputs of the only call, and return these; None if they are unknown."""
        x = inputs_of(self.network.net, calls[0], self._form) if len(calls) == 1 else None
        if x is not None:
            self.build(x)
        return x

    def _begun(self, layout: Layout) -> None:
        """Forget erased passes when a backward pass begins: each of its leaves calls this, and the first one counts."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task = task
            self._forget_erased(layout)

    def _forget_erased(self, layout: Layout) -> None:
        """Forget the passes whose gradients `zero_grad` has erased, to drop their batch."""
        params = self.network.parameters()
        grads = [grad for block in layout.layers if (grad := params[block.weight].grad) is not None]
        if not self._passes or any(grad.any() for grad in grads):
            return
        if any(each.moves for each in self._passes) or not grads:
            self.forget(used=True)

    def taken(self) -> Stats | None:
        """Return the statistics of all passes since the last step, and forget the passes; None if none are due."""
        try:
            return self._watched() if self.updates else None
        finally:
            self.forget()

    def _watched(self) -> Stats:
        if not self._passes:
            raise StructureError(
                "this step needs statistics, and none were collected: pass the batch, step((x, y)), or run the net in "
                "`with watch():` and call loss.backward() before."
            )
        with torch.no_grad():
            return statistics(self._passes)

    def forget(self, *, used: bool = False) -> None:
        """Drop the watched passes: all of them, or those with a backward pass."""
        self._passes = [each for each in self._passes if used and not each.used]


@contextlib.contextmanager
def noted(net: nn.Module, calls: list[Arguments]) -> Iterator[None]:
    """Append the arguments of the net's calls to a list, by a hook that is removed at the end."""
    handle = unwrapped(net).register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True, prepend=True
    )
    try:
        yield
    finally:
        handle.remove()


def form_of(x: PyTree) -> Any:
    """Return the form of inputs: the names of a dict, or the number of positional arguments."""
    return tuple(x) if isinstance(x, Mapping) else len(x) if isinstance(x, tuple) else 1


def inputs_of(net: nn.Module, call: Arguments, form: Any) -> PyTree:
    """Return the inputs of a call in the form of those of the build; None if it has others."""
    args, kwargs = call
    try:
        bound = inspect.signature(unwrapped(net).forward).bind(*args, **kwargs)
    except TypeError:  # a hook of the net changes the arguments
        return None
    if isinstance(form, int):
        found = bound.args[:form]
        return None if len(found) < form else found if form > 1 else found[0]
    given = args[0] if args and isinstance(args[0], Mapping) else {**bound.arguments, **kwargs}
    return {name: given[name] for name in form} if given.keys() >= set(form) else None
