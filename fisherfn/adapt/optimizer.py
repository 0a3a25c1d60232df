r"""The natural gradient without tuning: step size, momentum and damping from the quadratic model of each batch.

$$\delta = -\alpha \hat F^{-1} \nabla h + \mu\, \delta_0, \qquad \theta \leftarrow \theta + \delta$$

with δ₀ the previous update. One step, in order:

1. Statistics and the preconditioned gradient $\hat F^{-1} \nabla h$, as in `ng.step`. Just before inverses are
   refreshed, λ follows the reduction ratio ρ of the steps since the last refresh (damping.py).
2. α and μ minimise the quadratic model of the batch, with the exact Fisher (quadratic.py).
3. The step is tried on the examples of that model (trial.py). If it increases their loss, it is rejected: the
   parameters do not change, and λ doubles, immediately in the model and at the next refresh in the inverses. A step
   with a given learning rate or momentum was not fitted to these examples: only an increase beyond two standard
   errors counts.
4. The next batch looks back (look_back.py). If its loss is higher than that of the batch before by more than sampling
   explains, and δ₀ is the reason, δ₀ is undone. The next batch consists of other examples, so this catches errors that
   step 3 cannot see. A step after which many parameters have no gradient at all is undone too, because dead units do
   not recover.

Three rules choose the step. "model" is the above. "clip" uses a fixed learning rate and momentum within the KL bound
(`kl_clip`), for noisy classifiers, whose batches say little about α. "line_search" uses the best of a grid of step
sizes by the loss itself, for the exact natural gradient, for which the model would always give (α, μ) = (1, 0). It
takes "clip" for classes, too.

All values are tensors and all decisions masks: the optimizer vmaps (each member has its own α, μ and λ), compiles and
resumes.

Source: Martens & Grosse 2015, sections 6 and 7.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import tree
from fisherfn.adapt.clip import clip_factor
from fisherfn.adapt.damping import LEAST, REJECTED, ULP, followed, reduction_ratio, rounding, within_noise
from fisherfn.adapt.look_back import Seen, alive, kept_context
from fisherfn.adapt.scales import Scales
from fisherfn.adapt.state import Adapted, AdaptiveState
from fisherfn.adapt.trial import Examples, Tried, along
from fisherfn.errors import expect
from fisherfn.natgrad import NaturalGradient
from fisherfn.state import State, detached
from fisherfn.stats import Batch, Stats, pair
from fisherfn.types import Info, PyTree, Tree

Rule: TypeAlias = Literal["model", "clip", "line_search"]
RULES: tuple[Rule, ...] = ("model", "clip", "line_search")

LEARNING_RATE, MOMENTUM = 1.0, 0.9
"""The values of "auto" for the rule "clip"."""


@dataclass(frozen=True)
class Adaptive:
    """An optimizer for a natural gradient, made by `ff.adaptive`; its attributes are that function's arguments."""

    ng: NaturalGradient
    lr: float | Tensor | None
    momentum: float | Tensor | None
    damping: float | Tensor | None
    rule: Rule
    kl_bound: float | Tensor | None
    ema: float | Tensor
    weight_decay: float | Tensor
    model_examples: int | None
    average: float | None
    look_back: bool

    def init(self, params: Tree) -> AdaptiveState:
        """Return the initial state."""
        self.ng.layout.validate(params)
        start = 1.0 if self.damping is None else self.damping
        curvature = self.ng.init(params, damping=start, ema=self.ema)
        zero = torch.zeros((), dtype=torch.float64, device=curvature.damping.device)
        state = AdaptiveState(
            curvature, tree.zeros_like(params), zero, zero, torch.zeros_like(curvature.count), zero + 1,
            torch.zeros_like(curvature.damping), zero + torch.inf, zero, zero + 1, zero.bool().expand(len(params)),
            zero.bool(),
            () if self.average is None else {name: detached(p, p) for name, p in params.items()},
            torch.zeros_like(curvature.count),
        )  # fmt: skip
        # no tensor twice, and none of the caller's: a compiled step would need another graph for the first step
        return tree.map(torch.clone, state)

    def step(
        self,
        params: Tree,
        state: AdaptiveState,
        batch: Batch,
        *,
        update: bool = True,
        invert: bool = True,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        context: PyTree = None,
        chunk_size: int | None = None,
        lr_scale: float | Tensor | dict[str, Any] = 1.0,
    ) -> tuple[Tree, AdaptiveState, Info]:
        """Take one step and return (new params, new state, info); `info.adapted` holds the choices.

        If any check fails (`info.ok`), params and state are returned unchanged.

        Args:
            params: parameters with the structure given to `ff.natural_gradient`.
            state: from `init` or the last step.
            batch: inputs and targets.
            update: whether to take curvature statistics.
            invert: whether to refresh the inverses.
            generator: generator of the labels of "mc"; or pass the random numbers themselves as `noise`.
            noise: random numbers from `ng.noise`.
            context: the context, for models with one; the new one is `info.context`.
            chunk_size: examples per chunk of the statistics, to limit memory.
            lr_scale: factor on the step that the model chose, or on a given learning rate, for schedules; or one factor
                per parameter, by name. 0 stops parameters at once (looking back may still undo their last update).

        Raises:
            StructureError: a state of another optimizer, or `lr_scale` with other names; see `ng.stats` for the others.
            HyperparameterError: a negative `lr_scale`.
        """
        expect(state, AdaptiveState, "state", "pass what opt.init(params) or opt.step returned")
        state.check_average(self.average is not None)
        stats = self.ng.stats(
            params, batch, generator=generator if update else None, noise=noise if update else None, context=context,
            curvature=update, chunk_size=chunk_size,
        )  # fmt: skip
        nat, curvature, info = self.ng.step_from(
            state.curvature, stats, stats if update else None, invert=invert, inner=self.rule == "clip",
            damping=lambda new: self._damping(state, new),
        )  # fmt: skip
        # without coupling, nat is zero exactly where a layer's gradient is, which then need not be formed
        here = alive(stats.grads if self.ng.method.couples else nat)
        seen = Seen.of(self.ng.likelihood, stats, pair(batch)[1], here)
        scales = Scales.of(lr_scale, params)
        nat, previous = scales.directions(nat, state.update)
        before = state
        if update:
            units = torch.where(state.first_curvature == 0, self.ng.mean_curvature(curvature), state.first_curvature)
            state = state._replace(first_curvature=units)
        if invert:
            zero = torch.zeros_like(state.actual)
            state = state._replace(
                predicted=zero, actual=zero, steps=torch.zeros_like(state.steps), shrink=zero + 1, rejected=zero.bool()
            )
        # along the direction of a line search the loss need not fall on a part of the batch
        wanted = stats.examples if self.rule == "line_search" else self.model_examples
        examples = Examples.of(self.ng, batch, context, wanted, stats)
        tried = self._try(params, state._replace(update=previous), curvature, nat, info, examples, scales)
        back = torch.zeros_like(state.rejected)
        if self.look_back:
            undone = partial(tree.add, params, before.update, scale=-1.0)
            back = seen.undoes(state, stats, lambda: -examples.change(undone(), tried.losses)[0])
        info = info._replace(loss=stats.loss, context=kept_context(back, context, stats.context))
        return self._decide(params, before, state, curvature, tried, back, seen.remembered(state), info, stats)

    # ------------------------------------------------------------------------------------------------ 1. the damping

    def _damping(self, state: AdaptiveState, updated: State) -> Float[Tensor, ""]:
        """Return λ for the next refresh of inverses."""
        if self.damping is not None:
            return updated.damping
        unit = self.ng.mean_curvature(updated)
        first = torch.where(state.first_curvature == 0, unit, state.first_curvature)
        return followed(updated.damping, state, first, unit, rounding(self.ng.layout, state.loss.device))

    # ------------------------------------------------------------------------------------------------- 2. the length

    def _try(
        self,
        params: Tree,
        state: AdaptiveState,
        curvature: State,
        nat: Tree,
        info: Info,
        examples: Examples,
        scales: Scales,
    ) -> Tried:
        """Choose a step and take it on trial."""
        rate, momentum = self._given(state, info, scales.largest)
        fitted = rate is None and momentum is None
        if rate is not None and momentum is not None:
            update = along(nat, state.update, rate, momentum)
            model = examples.model(params, [update])
            weights = torch.ones_like(model.slope)
        elif self.rule == "line_search":
            model = examples.model(params, [nat])
            weights = examples.searched(params, nat) * scales.largest
            rate, momentum = -weights[0], torch.zeros_like(weights[0])
            update = along(nat, None, rate, momentum)
        else:
            model = examples.model(params, [nat, state.update])
            weights = model.minimiser(curvature.damping.double(), (None if rate is None else -rate, momentum))
            if fitted:
                weights = weights * scales.largest
            elif rate is None:  # a given one is scaled already
                weights = torch.stack([weights[0] * scales.largest, weights[1]])
            rate, momentum = -weights[0], weights[1]
            update = along(nat, state.update, rate, momentum)
        new = tree.add(params, update)
        change, error, loss = examples.change(new, model.losses)
        exact = fitted and rounding(self.ng.layout, loss.device) == ULP
        return Tried(
            new, update, rate, momentum, model.value(weights), change, error, model.losses, loss, exact, scales
        )  # fmt: skip

    def _given(self, state: AdaptiveState, info: Info, lr_scale: float | Tensor) -> tuple[Any, Any]:
        """Return the fixed learning rate and momentum as tensors, or None if the model chooses them."""
        like = state.actual
        rate, momentum = self._rate(state, lr_scale), self.momentum
        if self.rule == "clip" and momentum is None:
            momentum = MOMENTUM
        if rate is not None and self.kl_bound is not None:
            rate = rate * clip_factor(info.inner, lr=rate.to(info.inner), kl_bound=self.kl_bound)
        return rate, None if momentum is None else torch.as_tensor(momentum, dtype=like.dtype).to(like)

    def _rate(self, state: AdaptiveState, lr_scale: float | Tensor) -> Any:
        """Return the fixed learning rate without the KL bound, or None."""
        lr = LEARNING_RATE if self.lr is None and self.rule == "clip" else self.lr
        return None if lr is None else torch.as_tensor(lr).to(state.actual) * lr_scale * state.shrink

    # ------------------------------------------------------------------------------------------------- 3. the verdict

    def _decide(
        self,
        params: Tree,
        before: AdaptiveState,
        state: AdaptiveState,
        curvature: State,
        tried: Tried,
        back: Tensor,
        seen: Seen,
        info: Info,
        stats: Stats,
    ) -> tuple[Tree, AdaptiveState, Info]:
        """Accept the step, reject it, or undo the one before.

        `before` is the state before the step; `state` has the refreshes of this step.
        """
        ratio = reduction_ratio(tried.actual, tried.predicted)
        ok = {key: mask | back for key, mask in info.ok.items()}
        sound = torch.stack(list(ok.values())).all()
        noise = within_noise(tried.before, tried.actual, rounding(self.ng.layout, stats.loss.device))
        rises = (tried.actual > tried.tolerance(seen.mass)) & ~noise
        rejected = (back | rises | ~torch.isfinite(tried.actual)) & sound
        accepted = sound & ~rejected

        result = tree.choose(
            accepted,
            lambda: tried.params,
            lambda: tree.choose(back, lambda: tree.add(params, state.update, scale=-1.0), lambda: params),
        )
        # a fixed momentum would repeat a bad δ₀, so it is dropped; a free momentum is left to the model
        drops = rejected if self.rule == "clip" or self.momentum is not None else back
        update = tree.choose(
            accepted,
            lambda: tried.update,
            lambda: tree.choose(drops, lambda: tree.zeros_like(state.update), lambda: state.update),
        )
        # decoupled: not part of the model, and ρ was measured before it
        if isinstance(self.weight_decay, Tensor) or self.weight_decay:
            # a given rate decays as it is, whatever the KL bound leaves of the step
            rate = self._rate(state, tried.scales.largest) if self.lr is not None else tried.learning_rate
            rate = torch.where(accepted, rate, 0.0)
            result = tried.scales.decayed(result, params, rate, self.weight_decay)
        least = (LEAST * state.first_curvature).to(curvature.damping)  # λ may be zero
        raised = torch.where(rejected, torch.maximum(REJECTED * curvature.damping, least), curvature.damping)
        zero = torch.zeros_like(tried.actual)
        numbers = {
            "first_curvature": state.first_curvature,
            # after a rejection the inverses have another λ, and ρ says nothing about the new one
            "predicted": torch.where(accepted, state.predicted + tried.predicted, zero),
            "actual": torch.where(accepted, state.actual + tried.actual, zero),
            "steps": torch.where(accepted, state.steps + 1, 0),
            "shrink": torch.where(rejected, 0.5 * state.shrink, state.shrink),
            "loss": torch.where(back, torch.inf, seen.loss),
            "spread": torch.where(back, zero, seen.spread),
            "mass": seen.mass,
            "alive": accepted & seen.alive,
            "rejected": rejected | state.rejected,
        }
        kept = {name: torch.where(sound, value, getattr(before, name)) for name, value in numbers.items()}
        update, kept = detached((update, kept), stats.loss)
        new = state._replace(curvature=curvature._replace(damping=raised), update=update, **kept)
        if self.average is not None:
            new = new.averaged(result, self.average, sound, stats.loss)
        adapted = Adapted(tried.learning_rate, tried.momentum, raised, ratio, rejected)
        return result, new, info._replace(ok=ok, adapted=adapted)
