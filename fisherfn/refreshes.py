"""New states from old ones: the empty state, updates of the factors, and inversions, of all blocks or of some."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisherfn.base import Estimated
from fisherfn.errors import expect_number, expect_positive
from fisherfn.state import State, detached, if_ok, info_of
from fisherfn.stats import Stats
from fisherfn.types import Info, Tree
from fisherfn.views import Views
from fisherfn.which import Which, chosen


@dataclass(frozen=True)
class Refreshes(Views):
    """A model with its likelihood and a method: pure functions that return new states."""

    def init(self, params: Tree, *, damping: float | Tensor = 1e-3, ema: float | Tensor = 0.95) -> State:
        """Return the empty state: before the first `invert`, preconditioning gives grad/λ.

        Args:
            params: the parameters, with the names and shapes of the build.
            damping: λ ≥ 0, in the units of the Fisher of the mean NLL. A tensor may be batched under `torch.vmap`.
            ema: weight of the old factors, in [0, 1); update k uses min(1 − 1/k, ema) for batches of equal size.

        Raises:
            HyperparameterError: a number outside its range, or a tensor with dimensions. Tensors whose values cannot be
                read (under `torch.vmap`, on a GPU) are checked by `info.ok`.
        """
        self.layout.validate(params)
        expect_number("damping", damping, lambda v: v >= 0, "must be >= 0")
        expect_number("ema", ema, lambda v: 0 <= v < 1, "must lie in [0, 1)")
        dtype, device = self.layout.precision, next(iter(params.values())).device
        λ = torch.as_tensor(damping, dtype=dtype, device=device)
        factors, inverses = self.method.init(self.layout.block_shapes, dtype, device, λ)
        count = torch.zeros((), dtype=torch.int64, device=device)
        ema = torch.as_tensor(ema, dtype=dtype, device=device)
        examples, blocks = torch.zeros((), dtype=dtype, device=device), len(self.layout.blocks)
        return State(λ, ema, count, examples, factors, inverses, count.repeat(blocks), examples.repeat(blocks))

    def update(
        self,
        state: State,
        stats: Stats,
        *,
        weight: float | Tensor | None = None,
        only: Collection[str] | None = None,
        inverting: bool | Collection[str] = True,
    ) -> tuple[State, Info]:
        """Update the running average of the factors from `stats`; if any check fails, return the input state.

        With `only`, or statistics of some blocks, these are updated, and the others keep their factors. With an empty
        set the state is returned as it is.

        Args:
            state: the current state.
            stats: statistics of a batch.
            weight: weight of these statistics relative to those of other updates; None: their number of examples.
            only: keys of blocks; None: all that have statistics.
            inverting: whether `invert` follows, or for which blocks. Otherwise E-KFAC keeps its basis, which saves most
                of the time.

        Raises:
            StructureError: no block has such a key or no statistics, or the method couples the blocks.
            HyperparameterError: a weight that is not positive; for tensors see `init`.
        """
        self._check_state(state)
        self._check_stats(stats)
        if weight is not None:
            expect_positive("weight", weight)
        which = self._which((stats.sampled or True) if only is None else only)  # statistics of no block raise
        state = state.complete(self.layout.block_shapes)
        new, result = self._updated(state, stats, which, self._which(inverting), weight=weight)
        checks = {**stats.checks, "statistics": result.ok}
        info = self._info(checks, loss=stats.loss, context=stats.context, diagnostics=result.diagnostics)
        return if_ok(info, new, state), info

    def invert(self, state: State, *, only: Collection[str] | None = None) -> tuple[State, Info]:
        """Recompute the damped inverses from the factors; if any check fails, return the input state.

        With `only`, the blocks with these keys are inverted, and the others keep their inverses. With an empty set the
        state is returned as it is.

        Raises:
            StructureError: no block has such a key, or the method couples the blocks.
        """
        self._check_state(state)
        new, result = self._inverted(state, True if only is None else self._which(only))
        info = self._info({"factorisation": result.ok}, diagnostics=result.diagnostics)
        return if_ok(info, new, state), info

    # ---------------------------------------------------------------------------------------------------------

    def _updated(
        self, state: State, stats: Stats, which: Which, inverting: Which = True, weight: float | Tensor | None = None
    ) -> tuple[State, Estimated]:
        """Return the updated state, valid or not, and the result of the method's update with its masks."""
        if which is False:  # an empty set of blocks
            return state, self._others_pass(Estimated(state.factors, {}, {}), state)
        blocks = self.layout.block_shapes
        counted, rho = state.counted(float(stats.examples) if weight is None else weight, blocks, which)
        if isinstance(which, bool):
            result = self.method.update(state.factors, stats.lazy_taps, rho, inverting)
            return counted._replace(factors=detached(result.factors, stats.loss)), result
        taps = {key: stats.lazy_tap(key) for key in blocks if key in which}
        result = self.method.update({key: state.factors[key] for key in taps}, taps, rho, inverting)
        factors = state.factors | detached(result.factors, stats.loss)
        return counted._replace(factors=factors), self._others_pass(result, state)

    def _info(self, checks: dict[str, Any], **measured: Any) -> Info:
        return info_of(self.layout.block_shapes, checks, **measured)

    @property
    def _coupled(self) -> str:
        return self.method.name if self.method.couples else ""

    def _which(self, invert: bool | Collection[str]) -> Which:
        return invert if isinstance(invert, bool) else chosen(invert, self.layout.block_shapes, self._coupled)

    def _inverted(self, state: State, which: Which = True) -> tuple[State, Estimated]:
        """Return the state with new inverses, valid or not, and the result of the method's inversion with its masks."""
        if which is False:
            return state, self._others_pass(Estimated(state.inverses, {}, {}), state)
        if isinstance(which, bool):
            result = self.method.invert(state.factors, state.damping)
            return state._replace(inverses=result.factors), result
        result = self.method.invert({key: state.factors[key] for key in state.factors if key in which}, state.damping)
        return state._replace(inverses=state.inverses | result.factors), self._others_pass(result, state)

    def _others_pass(self, result: Estimated, state: State) -> Estimated:
        """Return a result for some blocks with masks for all: those that keep what they have are valid."""
        passed = dict.fromkeys(self.layout.block_shapes, torch.ones_like(state.count, dtype=torch.bool))
        return result._replace(ok=passed | result.ok)
