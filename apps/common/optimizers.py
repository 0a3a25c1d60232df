"""Pure optimizers: sgd with momentum, Adam, and the natural gradient, all as `init` / `draw` / `step`.

A step is a function from (params, state, batch, …) to new ones, so that whole runs can be vmapped and resumed.

All of them share these conventions:
- the loss is the mean over examples of the NLL summed over outputs (docs/conventions.md); learning rates are in its
  units;
- weight decay is decoupled: `params ← params − lr · (direction + weight_decay · params)`, after momentum and clip;
- the KL clip scales the preconditioned gradient before it enters the momentum buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fisherfn as ff
from common.steps import (
    Batch,
    Number,
    Optimizer,
    Penalty,
    Stepped,
    Tree,
    compiled,
    descend,
    given,
    gradient,
    uniform,
)


def sgd(
    model: Any,
    likelihood: ff.Likelihood,
    *,
    lr: Number,
    momentum: Number = 0.9,
    nesterov: bool = False,
    weight_decay: Number = 0.0,
    penalty: Penalty | None = None,
    compiled_batch: int | None = None,
) -> Optimizer:
    """Stochastic gradient descent: `v ← μ v + ∇`, then along v (or `∇ + μ v`, Nesterov's look-ahead)."""

    def move(params: Tree, velocity: Tree, batch: Batch, context: Any) -> Stepped:
        grads, info = gradient(model, likelihood, params, batch, context, penalty)
        velocity = ff.tree.add(grads, velocity, scale=momentum)
        direction = ff.tree.add(grads, velocity, scale=momentum) if nesterov else velocity
        return Stepped(descend(params, direction, lr, weight_decay), velocity, info.context, info)

    return uniform(ff.tree.zeros_like, move, compiled_batch)


class AdamState(NamedTuple):
    """Running moments of the gradient and the number of steps."""

    first: Tree
    second: Tree
    count: Tensor  # type: ignore[assignment]  # shadows the tuple's own method


def adam(
    model: Any,
    likelihood: ff.Likelihood,
    *,
    lr: Number,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    penalty: Penalty | None = None,
    compiled_batch: int | None = None,
) -> Optimizer:
    """Adam (Kingma & Ba 2015, algorithm 1), with decoupled weight decay."""

    def init(params: Tree) -> AdamState:
        count = torch.zeros((), dtype=torch.int64, device=next(iter(params.values())).device)
        return AdamState(ff.tree.zeros_like(params), ff.tree.zeros_like(params), count)

    def move(params: Tree, state: AdamState, batch: Batch, context: Any) -> Stepped:
        grads, info = gradient(model, likelihood, params, batch, context, penalty)
        count = state.count + 1
        first = ff.tree.map(lambda m, g: torch.lerp(g, m, betas[0]), state.first, grads)
        second = ff.tree.map(lambda v, g: torch.lerp(g * g, v, betas[1]), state.second, grads)
        steps = count.to(next(iter(params.values())).dtype)  # a power of an integer tensor would be float32
        bias_1, bias_2 = 1 - betas[0] ** steps, 1 - betas[1] ** steps
        direction = ff.tree.map(lambda m, v: (m / bias_1) / ((v / bias_2).sqrt() + eps), first, second)
        return Stepped(
            descend(params, direction, lr, weight_decay), AdamState(first, second, count), info.context, info
        )

    return uniform(init, move, compiled_batch)


class NaturalState(NamedTuple):
    """The state of the curvature and the momentum buffer."""

    curvature: ff.State
    velocity: Tree


def natural(
    ng: ff.NaturalGradient,
    *,
    lr: Number,
    damping: Number,
    kl_bound: Number | None = 0.1,
    momentum: Number = 0.9,
    ema: Number = 0.95,
    weight_decay: Number = 0.0,
    cadence: ff.Cadence = ff.Cadence.fixed(5, 10),  # noqa: B008  # immutable
    fisher_batch_size: int | None = None,
    penalty: Penalty | None = None,
    compiled_batch: int | None = None,
) -> Optimizer:
    """The natural gradient with KL clip and momentum: `v ← μ v + clip(F̂⁻¹∇)`, then along v.

    Args:
        ng: model, likelihood and method.
        lr: learning rate.
        damping: λ, in the units of the Fisher of the mean NLL.
        kl_bound: κ of `ff.kl_clip`, in nats per example; None or 0 for no clip.
        momentum: μ.
        ema: weight of the old factors.
        weight_decay: decoupled weight decay.
        cadence: steps that compute statistics and refresh inverses.
        fisher_batch_size: examples for the statistics, the first of each (shuffled) batch; None for all.
        penalty: added to the loss; its gradient is preconditioned with the rest.
        compiled_batch: batch size of compiled steps, one graph each with and without statistics and inverses.
    """
    follow = _clipped_momentum(lr, kl_bound, momentum)

    def init(params: Tree) -> NaturalState:
        return NaturalState(ng.init(params, damping=damping, ema=ema), ff.tree.zeros_like(params))

    def draw(batch: Batch, generator: torch.Generator) -> Any:
        return ng.noise(_head(batch, fisher_batch_size), generator) if ng.fisher_kind == "mc" else ()

    def move(
        params: Tree, state: NaturalState, batch: Batch, context: Any, labels: Tensor | None, update: bool, invert: bool
    ) -> Stepped:
        whole = fisher_batch_size is None and penalty is None  # gradient and statistics come from the same pass
        grads: Tree | ff.Stats
        stats: ff.Stats | None = None
        if penalty is None:
            noise = labels if whole else None
            grads = stats = ng.stats(params, batch, noise=noise, context=context, curvature=update and whole)
            seen = ff.Info(loss=grads.loss, context=grads.context)
        else:
            grads, seen = gradient(ng.model, ng.likelihood, params, batch, context, penalty)
        if update and not whole:
            part = _head(batch, fisher_batch_size)
            stats = ng.stats(params, part, noise=labels, context=_head_context(context, len(part[0])))
        nat, curvature, info = ng.step_from(
            state.curvature, grads, stats if update else None, invert=invert, inner=given(kl_bound)
        )
        if penalty is not None:  # an infinite penalty may have a finite gradient
            curvature = ff.tree.select(seen.checks["loss"], curvature, state.curvature)
        info = _joined(info, seen)
        velocity = follow(nat, info.inner, state.velocity)
        return Stepped(
            descend(params, velocity, lr, weight_decay), NaturalState(curvature, velocity), info.context, info
        )

    def flagged(
        params: Tree, state: NaturalState, batch: Batch, context: Any, noise: Any, update: bool, invert: bool
    ) -> Stepped:
        return move(params, state, batch, context, _labels(noise, update), update, invert)

    moved = compiled(move, compiled_batch)

    def step(params: Tree, state: NaturalState, batch: Batch, context: Any, noise: Any, index: int) -> Stepped:
        update, invert = cadence(index)
        return moved(params, state, batch, context, _labels(noise, update), update, invert)

    return Optimizer(init, draw, step, flagged, cadence)


def adaptive(opt: ff.Adaptive, cadence: ff.Cadence, *, compiled_batch: int | None = None) -> Optimizer:
    """The adaptive natural gradient, `ff.adaptive`, as an optimizer of the trainers.

    After a rejected step, statistics and inverses are refreshed at once.
    """

    def stepped(step: Any, params: Tree, state: ff.AdaptiveState, batch: Batch, context: Any, noise: Any,
                update: bool, invert: bool) -> Stepped:  # fmt: skip
        labels = _labels(noise, update)
        new, state, info = step(params, state, batch[:2], update=update, invert=invert, noise=labels, context=context)
        return Stepped(new, state, info.context, info)

    moved = compiled(opt.step, compiled_batch)

    def draw(batch: Batch, generator: torch.Generator) -> Any:
        return opt.ng.noise(batch[:2], generator) if opt.ng.fisher_kind == "mc" else ()

    def step(params: Tree, state: ff.AdaptiveState, batch: Batch, context: Any, noise: Any, index: int) -> Stepped:
        again = bool(state.rejected)
        update, invert = (flag or again for flag in cadence(index))
        return stepped(moved, params, state, batch, context, noise, update, invert)

    return Optimizer(opt.init, draw, step, partial(stepped, opt.step), cadence, lambda state: state.rejected)


class ImplicitState(NamedTuple):
    """The last solution, which is the start of the next one, and the momentum buffer."""

    solution: Tree
    velocity: Tree


def implicit(
    ng: ff.NaturalGradient,
    *,
    lr: Number,
    damping: Number,
    kl_bound: Number | None = 0.1,
    momentum: Number = 0.9,
    weight_decay: Number = 0.0,
    iterations: int = 20,
    compiled_batch: int | None = None,
) -> Optimizer:
    """The exact natural gradient by conjugate gradients through the model, starting from the last solution.

    The arguments are those of `natural`; `iterations` counts conjugate-gradient steps.
    """
    follow = _clipped_momentum(lr, kl_bound, momentum)

    def init(params: Tree) -> ImplicitState:
        return ImplicitState(ff.tree.zeros_like(params), ff.tree.zeros_like(params))

    def move(params: Tree, state: ImplicitState, batch: Batch, context: Any) -> Stepped:
        grads, info = gradient(ng.model, ng.likelihood, params, batch, context)
        F = ng.implicit_fisher(params, batch[0], batch[1], context=context)
        solution, residual = F.solve(grads, damping, iterations=iterations, start=state.solution)
        velocity = follow(solution, ff.tree.dot(grads, solution), state.velocity)
        ok = {**info.ok, "residual": torch.isfinite(residual)}
        info = info._replace(ok=ok, diagnostics={"residual": {"all": residual}})
        return Stepped(
            descend(params, velocity, lr, weight_decay), ImplicitState(solution, velocity), info.context, info
        )

    return uniform(init, move, compiled_batch)


def _labels(noise: Any, update: bool) -> Tensor | None:
    return noise if isinstance(noise, Tensor) and update else None


def _clipped_momentum(lr: Number, kl_bound: Number | None, momentum: Number) -> Callable[[Tree, Any, Tree], Tree]:
    """Return a function (nat, ⟨∇, nat⟩, velocity) -> `μ v + clip(nat)`."""

    def follow(nat: Tree, inner: Any, velocity: Tree) -> Tree:
        bounded = ff.kl_clip(nat, inner, lr=lr, kl_bound=kl_bound) if given(kl_bound) else nat
        return ff.tree.add(bounded, velocity, scale=momentum)

    return follow


def _joined(info: ff.Info, seen: ff.Info) -> ff.Info:
    """Return the info of a step with loss, context and checks of its gradient."""
    checks = {name: mask & info.checks.get(name, mask) for name, mask in seen.checks.items()}
    return info._replace(loss=seen.loss, context=seen.context, ok=info.ok | seen.ok, checks=info.checks | checks)


def _head(batch: Batch, size: int | None) -> Batch:
    x, y, *_ = batch
    return x[:size], y[:size]


def _head_context(context: Any, size: int) -> Any:
    return context | {"dropout": context["dropout"][:size]} if "dropout" in context else context
