"""The state of the pure functions for one module, held between the steps of an existing loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fisherfn import tree
from fisherfn.adapt import START, AdaptiveState, Cadence, adaptive
from fisherfn.errors import BATCH_CHECKS, StructureError, expect_number, unknown
from fisherfn.natgrad import NaturalGradient
from fisherfn.optim.copies import Copies
from fisherfn.optim.network import Network
from fisherfn.optim.options import Options
from fisherfn.optim.ranks import alone, dropout, spread
from fisherfn.optim.saved import Saved
from fisherfn.optim.watch import REDUCTIONS, Pass, Watched, statistics
from fisherfn.state import State
from fisherfn.stats import Stats, pair
from fisherfn.stats.path import check_calls
from fisherfn.types import Info, Model, PyTree, Tree

Outcome: TypeAlias = tuple[Tree, State, Info]
"""The natural gradient, the new state and the info, as `ng.step` returns them."""


class Curvature(Copies, Saved):
    """The natural gradient of a module, built at the first batch, with its state, cadence and random generator.

    A copy works on the copied net; watched statistics that were not used yet stay with the original.
    """

    def __init__(self, net: nn.Module, options: Options, *, adaptive: dict[str, Any] | None = None) -> None:
        """Create the curvature; `adaptive` has the arguments of `ff.adaptive`, if steps are adaptive."""
        self.network = Network(net)
        self._options, self._adaptive = options, adaptive
        self._damping = 1.0 if isinstance(options.damping, str) else options.damping
        self._cadence = options.cadence(Cadence.fixed(5, 10) if adaptive is None else Cadence())
        self._generator, self.scaler = options.random(), options.scaler
        self.steps = 0
        self.ng: NaturalGradient | None = None
        self._kind: Any = None
        self._state: State | None = None
        self._rest: AdaptiveState | None = None
        self._saved: dict[str, Tensor] = {}
        self._passes: list[Pass] = []
        self._by_kind: dict[Any, NaturalGradient] = {}
        self._steps_of: dict[int, Callable[..., Any]] = {}

    def build(self, x: PyTree) -> NaturalGradient:
        """Find the layers with these inputs, once per example shape and mode of the net; the state is shared."""
        if self.ng is None:
            x = _finite(_inputs(x))
            with self.network.alone_in_autocast():
                ng = self.network.build(
                    lambda model, params, context: self._options.build(model, params, x, context), x
                )
                ng = spread(ng, compiled=bool(self._options.compile))
                self._hold(self._restored(ng, self._saved))
            self.ng, self._saved, self.network.unused = ng, {}, frozenset(ng.layout.unused)
            self._by_kind[self.network.kind(x)] = ng
        kind = self.network.kind(_inputs(x))
        if kind not in self._by_kind:
            self._by_kind[kind] = self._for_shape(self.ng, _finite(_inputs(x)))
        self._kind = kind
        return self._by_kind[kind]

    def _for_shape(self, ng: NaturalGradient, x: PyTree) -> NaturalGradient:
        def make(model: Model, params: Tree, context: Tree) -> NaturalGradient:
            return replace(ng, model=model).for_shape(params, x, context=context)

        with self.network.alone_in_autocast():
            return self.network.build(make, x)

    @property
    def latest(self) -> NaturalGradient:
        """The natural gradient for the shape of the last batch: labels per example differ between shapes."""
        return self._by_kind.get(self._kind, self.ready())

    def ready(self) -> NaturalGradient:
        """Return the natural gradient, which exists after the first batch."""
        if self.ng is None:
            raise StructureError(
                "the layers are not known before the first batch: pass example_inputs=x to the constructor, call "
                "watch(x) the first time, or take a step with a batch before."
            )
        return self.ng

    @property
    def state(self) -> State:
        """The state, which exists after the first batch."""
        self.ready()
        assert self._state is not None
        return self._state

    @property
    def _damping_path(self) -> str:
        """The name of λ in the saved form."""
        return "damping" if self._adaptive is None else "curvature/damping"

    @property
    def damping(self) -> float:
        """The damping λ."""
        saved = self._saved.get(self._damping_path)
        known = saved if self._state is None else self._state.damping
        return self._damping if known is None else float(known)

    @damping.setter
    def damping(self, value: float) -> None:
        expect_number("damping", value, lambda v: v >= 0, "must be >= 0")
        if self._state is not None:
            self._state = self._state._replace(damping=torch.full_like(self._state.damping, float(value)))
            if self._rest is not None:
                self._rest = self._rest._replace(curvature=self._state)
        elif self._saved:
            saved = self._saved[self._damping_path]
            self._saved[self._damping_path] = torch.full_like(saved, float(value))
        elif self._options.damping == "auto":
            raise StructureError(
                f"the damping is measured at the first batch, which would replace {value}: set it after that batch, or "
                "pass damping= to the constructor."
            )
        elif self._adaptive is not None:
            self._adaptive["damping"] = value
        self._damping = value

    # -------------------------------------------------------------------------------------------------- the step

    @property
    def updates(self) -> bool:
        """True if the next step computes statistics."""
        return self._cadence(self.steps).update or self._again()

    @property
    def inverts(self) -> bool:
        """True if the next step refreshes the inverses."""
        return self._cadence(self.steps).invert or self._again()

    def _again(self) -> bool:
        """Return True if the last step was rejected; then everything is refreshed at once."""
        return self._rest is not None and bool(self._rest.rejected)

    def adapted(self, batch: Any, lr_scale: float | dict[str, float]) -> tuple[Tree, AdaptiveState, Info]:
        """Return the parameters after an adaptive step on a batch."""
        x, y = pair(batch)
        ng, x = self.build(x), _inputs(x)
        assert self._adaptive is not None and self._rest is not None
        if self._options.compile:  # a number would be a part of the graph
            lr_scale = tree.map(lambda scale: torch.tensor(scale, dtype=torch.float64), lr_scale)
        return self._step(  # type: ignore[no-any-return]
            ng, adaptive(ng, **self._adaptive).step, self._rest, (x, y), chunk_size=self._options.chunk_size,
            lr_scale=lr_scale,
        )  # fmt: skip

    def _step(self, ng: NaturalGradient, step: Callable[..., Any], state: Any, batch: Any, **more: Any) -> Any:
        """Run a step of this natural gradient, compiled if so chosen: once per shape of the inputs."""
        if id(ng) not in self._steps_of:
            self._steps_of[id(ng)] = self._options.compiled(step)
        with self.network.alone_in_autocast():
            context = self.network.context(batch[0], self._generator, dropout(ng))
            random: dict[str, Any] = {"generator": self._generator}
            if self._options.compile:  # a graph cannot sample
                samples = self.updates and self._options.fisher == "mc"
                random = {"noise": ng.noise(batch, self._generator) if samples else None}
            return self._steps_of[id(ng)](
                self.network.values(), state, batch, update=self.updates, invert=self.inverts, context=context,
                **random, **more,
            )  # fmt: skip

    def _measured(self, ng: NaturalGradient) -> Callable[[State], Tensor] | None:
        """Return a function that measures λ once, at the first refresh of the inverses, if no λ was given."""
        if self._options.damping != "auto" or self.steps:
            return None
        return lambda new: START * ng.mean_curvature(new)

    def of_batch(self, batch: Any, *, inner: bool) -> Outcome:
        """Compute the natural gradient of a batch, with gradient and curvature from one forward pass."""
        x, y = pair(batch)
        ng, x = self.build(x), _inputs(x)
        return self._step(ng, ng.step, self.state, (x, y), inner=inner, chunk_size=self._options.chunk_size)  # type: ignore[no-any-return]

    def of_gradients(self, grads: Tree, stats: Stats | None, *, inner: bool) -> Outcome:
        """Compute the natural gradient from an existing gradient, and from statistics if they are due."""
        ng, state = self.ready(), self.state
        with self.network.alone_in_autocast():
            return ng.step_from(state, grads, stats, invert=self.inverts, inner=inner, damping=self._measured(ng))

    def statistics(self, x: PyTree, y: Any, *, fisher: str | None = None, likelihood: Any = None) -> Stats:
        """Collect statistics of a batch, optionally with another Fisher or likelihood than the build's."""
        ng, x = self.build(x), _inputs(x)
        ng = ng if likelihood is None else replace(ng, likelihood=likelihood)
        with self.network.alone_in_autocast():
            context = self.network.context(x, self._generator, dropout(ng))
            return ng.stats(
                self.network.values(), (x, y), fisher=fisher, generator=self._generator, context=context,
                chunk_size=self._options.chunk_size,
            )  # fmt: skip

    def commit(self, state: State | AdaptiveState, context: PyTree = ()) -> None:
        """Store the result of a step, and the buffers of its context."""
        if isinstance(state, AdaptiveState):
            self._rest, state = state, state.curvature
        elif self._rest is not None:
            self._rest = self._rest._replace(curvature=state)
        self._state, self.steps = state, self.steps + 1
        if isinstance(context, dict):
            self.network.move_buffers(context)

    # ------------------------------------------------------------------------------------------------- the watch

    @contextlib.contextmanager
    def watch(self, inputs: PyTree, reduction: str) -> Iterator[None]:
        """Record one forward pass of the net, if the next step computes statistics."""
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
        grads = [p.grad for p in self.network.parameters().values() if p.grad is not None]
        erased = self._passes and not any(grad.any() for grad in grads) and any(each.moves for each in self._passes)
        if not grads or erased:
            self.forget(used=True)  # zero_grad dropped their batch
        if not self.updates:
            yield
            return
        seen = Watched(self.network.parameters())
        with seen.run(layout.plan) as mode:
            yield
        check_calls(layout, mode)
        scale = float(self.scaler.get_scale()) if self.scaler is not None else 1.0
        self._passes.append(Pass(seen.calls, reduction, scale))

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
            return statistics(self.ready().layout, self._passes)

    def forget(self, *, used: bool = False) -> None:
        """Drop the watched passes: all of them, or those with a backward pass."""
        self._passes = [each for each in self._passes if used and not each.used]


def _inputs(x: PyTree) -> PyTree:
    """Return several inputs as a tuple (data loaders turn it into a list) or as a dict."""
    return tree.plain(tuple(x) if isinstance(x, list) else x)


def _finite(x: PyTree) -> PyTree:
    """Raise unless the inputs are finite, because layers cannot be found with NaN."""
    floats = [leaf for leaf in tree.leaves(x) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not bool(tree.finite_inputs(floats)):
        error, text = BATCH_CHECKS["inputs"]
        raise error(
            f"{text}. This is the first batch of this shape, with which layers are found: or pass example_inputs=x."
        )
    return x
