"""The state of the pure functions for one module, held between the steps of an existing loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fisherfn import tree
from fisherfn.adapt import START, AdaptiveState, Cadence, adaptive
from fisherfn.distributed import DataParallel
from fisherfn.errors import BATCH_CHECKS, StructureError, expect_number
from fisherfn.natgrad import NaturalGradient
from fisherfn.optim.copies import Copies
from fisherfn.optim.network import Network
from fisherfn.optim.options import Options
from fisherfn.optim.passes import Passes, form_of
from fisherfn.optim.ranks import agree_on_inputs, anywhere, dropout, several, spread
from fisherfn.optim.saved import Saved
from fisherfn.optim.scaling import Scaling
from fisherfn.optim.watch import Pass
from fisherfn.state import State
from fisherfn.stats import Stats, pair
from fisherfn.stats.probe import finite
from fisherfn.stats.swap import versions
from fisherfn.types import Info, Model, PyTree, Tree

Outcome: TypeAlias = tuple[Tree, State, Info]
"""The natural gradient, the new state and the info, as `ng.step` returns them."""


class Curvature(Copies, Saved, Passes):
    """The natural gradient of a module, built at the first batch, with its state, cadence and random generator.

    A copy works on the copied net; watched statistics that were not used yet stay with the original.
    """

    def __init__(self, net: nn.Module, options: Options, *, adaptive: dict[str, Any] | None = None) -> None:
        """Create the curvature; `adaptive` has the arguments of `ff.adaptive`, if steps are adaptive."""
        self.network = Network(net)
        self._options, self._adaptive = options, adaptive
        self._damping = 1.0 if isinstance(options.damping, str) else options.damping
        self._cadence = options.cadence(Cadence.fixed(5, 10) if adaptive is None else Cadence())
        self._generator, self.scaling = options.random(), Scaling(options.scaler)
        self.steps = 0
        self.ng: NaturalGradient | None = None
        self._kind: Any = None
        self._state: State | None = None
        self._rest: AdaptiveState | None = None
        self._saved: dict[str, Tensor] = {}
        self._form: Any = None
        self._passes: list[Pass] = []
        self._task = -1
        self._written: list[int] = []
        self._by_kind: dict[Any, NaturalGradient] = {}
        self._steps_of: dict[Any, Callable[..., Any]] = {}

    def build(self, x: PyTree) -> NaturalGradient:
        """Find the layers with these inputs, once per example shape and mode of the net; the state is shared."""
        x = _inputs(x)
        kind = self.network.kind(x)
        if not agree_on_inputs(kind[0], kind in self._by_kind or finite(x)):
            error, text = BATCH_CHECKS["inputs"]
            raise error(
                f"{text}. This is the first batch of this shape, with which layers are found: or pass example_inputs=x."
            )
        if self.ng is None:
            with self.network.alone_in_autocast():
                ng = self.network.build(
                    lambda model, params, context: self._options.build(model, params, x, context), x
                )
            self._form = form_of(x)
            self._start(ng, kind, self._saved)
        elif several() and not isinstance(self.ng, DataParallel):  # built before the process group
            first = next((known for known, each in self._by_kind.items() if each is self.ng), None)
            self._start(self.ng, first, tree.flatten(self.held()))
        if kind not in self._by_kind:
            self._by_kind[kind] = self._for_shape(self.ready(), x)
        self._kind = kind
        return self._by_kind[kind]

    def _start(self, ng: NaturalGradient, kind: Any, saved: dict[str, Tensor]) -> None:
        """Hold a natural gradient of all processes, and its state: a saved one, or the empty one."""
        with self.network.alone_in_autocast():
            ng = spread(ng, saved, compiled=bool(self._options.compile))
            self._hold(self._restored(ng, saved))
        self.ng, self._saved, self.network.unused = ng, {}, frozenset(ng.layout.unused)
        self._by_kind, self._steps_of = {kind: ng}, {}

    def _for_shape(self, ng: NaturalGradient, x: PyTree) -> NaturalGradient:
        def make(model: Model, params: Tree, context: Tree) -> NaturalGradient:
            return replace(ng, model=model).for_shape(params, x, context=context)

        with self.network.alone_in_autocast():
            return self.network.build(make, x)

    @property
    def latest(self) -> NaturalGradient:
        """The natural gradient for the shape of the last batch for which `build` was called."""
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
    def inverts(self) -> bool:
        """True if the next step refreshes the inverses."""
        return self._cadence(self.steps).invert or self._again()

    def _again(self) -> bool:
        """Return True if the last step was rejected; then everything is refreshed at once."""
        return self._rest is not None and bool(self._rest.rejected)

    def adapted(self, batch: Any, lr_scale: float | dict[str, float]) -> tuple[Tree, AdaptiveState, Info]:
        """Return the parameters after an adaptive step on a batch, for which `build` was called."""
        x, y = pair(batch)
        ng, x = self.latest, _inputs(x)
        assert self._adaptive is not None and self._rest is not None
        rest = self._rest.unseen() if anywhere(self.changed()) else self._rest  # all ranks look back, or none
        if self._options.compile:  # a number would be a part of the graph
            lr_scale = tree.map(lambda scale: torch.tensor(scale, dtype=torch.float64), lr_scale)
        return self._step(  # type: ignore[no-any-return]
            ng, adaptive(ng, **self._adaptive).step, rest, (x, y), chunk_size=self._options.chunk_size,
            lr_scale=lr_scale,
        )  # fmt: skip

    def _step(self, ng: NaturalGradient, step: Callable[..., Any], state: Any, batch: Any, **more: Any) -> Any:
        """Run a step of this natural gradient, compiled if so chosen: once per shape of the inputs."""
        with self.network.alone_in_autocast():
            key = id(ng), self.network.constants()
            if key not in self._steps_of:
                self._steps_of[key] = self._options.compiled(step)
            context = self.network.context(batch[0], self._generator, dropout(ng))
            random: dict[str, Any] = {"generator": self._generator}
            if self._options.compile:  # a graph cannot sample
                samples = self.updates and self._options.fisher == "mc"
                random = {"noise": ng.noise(batch, self._generator) if samples else None}
            return self._steps_of[key](
                self.network.values(), state, batch, update=self.updates, invert=self.inverts, context=context,
                **random, **more,
            )  # fmt: skip

    def _measured(self, ng: NaturalGradient) -> Callable[[State], Tensor] | None:
        """Return a function that measures λ once, at the first refresh of the inverses, if no λ was given."""
        if self._options.damping != "auto" or self.steps:
            return None
        return lambda new: START * ng.mean_curvature(new)

    def of_batch(self, batch: Any, *, inner: bool) -> Outcome:
        """Compute the natural gradient of a batch, for which `build` was called, from one forward pass."""
        x, y = pair(batch)
        ng, x = self.latest, _inputs(x)
        return self._step(ng, ng.step, self.state, (x, y), inner=inner, chunk_size=self._options.chunk_size)  # type: ignore[no-any-return]

    def of_gradients(self, grads: Tree, stats: Stats | None, *, inner: bool) -> Outcome:
        """Compute the natural gradient from an existing gradient, and from statistics if they are due."""
        ng, state = self.ready(), self.state
        with self.network.alone_in_autocast():
            return ng.step_from(state, grads, stats, invert=self.inverts, inner=inner, damping=self._measured(ng))

    def statistics(self, x: PyTree, y: Any, *, fisher: str | None = None, likelihood: Any = None) -> Stats:
        """Collect statistics of a batch, for which `build` was called, optionally with another Fisher or likelihood."""
        ng, x = self.latest, _inputs(x)
        ng = ng if likelihood is None else replace(ng, likelihood=likelihood)
        with self.network.alone_in_autocast():
            context = self.network.context(x, self._generator, dropout(ng))
            return ng.stats(
                self.network.values(), (x, y), fisher=fisher, generator=self._generator, context=context,
                chunk_size=self._options.chunk_size,
            )  # fmt: skip

    def commit(self, state: State | AdaptiveState, context: PyTree = ()) -> None:
        """Store the result of a step, whose parameters are written, and the buffers of its context."""
        if isinstance(state, AdaptiveState):
            self._rest, state = state, state.curvature
        elif self._rest is not None:
            # the last update is that of another step; what a rejected step asked for is done
            rest = self._rest.unseen()
            self._rest = rest._replace(curvature=state, rejected=torch.zeros_like(rest.rejected))
        self._state, self.steps = state, self.steps + 1
        if isinstance(context, dict):
            self.network.move_buffers(context)
        self._written = versions(self.network.values())
        torch.clear_autocast_cache()  # has casts of the old weights until autocast ends


def _inputs(x: PyTree) -> PyTree:
    """Return several inputs as a tuple (data loaders turn it into a list) or as a dict."""
    return tree.plain(tuple(x) if isinstance(x, list) else x)
