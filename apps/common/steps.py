"""The interface of the optimizers of the trainers, `init`, `draw` and `step`, and the parts that they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.func import grad

import fisherfn as ff
from common import ranks

R = TypeVar("R")

Tree = dict[str, Tensor]
Batch = tuple[Tensor, ...]
"""Inputs and targets, then any random numbers that a penalty needs."""

Penalty = Callable[[Tree, Batch, Any], Tensor]
"""Function (params, batch, context) -> a scalar added to the loss; it is part of the gradient, not the curvature."""


class Stepped(NamedTuple):
    """The result of a step; `ff.check(info)` explains a step that failed a check."""

    params: Tree
    state: Any
    context: Any
    info: ff.Info


class Optimizer(NamedTuple):
    """An optimizer for one model.

    Attributes:
        init: params -> the empty state.
        draw: (batch, generator) -> the noise of the step, `()` if it needs none; the only use of randomness.
        step: (params, state, batch, context, noise, index) -> `Stepped`; `index` counts steps from 0 on the host.
        move: (params, state, batch, context, noise, update, invert) -> `Stepped`: the step itself, without a branch on
            a value, so that it can be vmapped over models and numbers.
        cadence: refreshes of the step `index`, for `move`.
        again: state -> a mask, true if the next step refreshes statistics and inverses in any case.
    """

    init: Callable[[Tree], Any]
    draw: Callable[[Batch, torch.Generator], Any]
    step: Callable[[Tree, Any, Batch, Any, Any, int], Stepped]
    move: Callable[[Tree, Any, Batch, Any, Any, bool, bool], Stepped] | None = None
    cadence: Callable[[int], tuple[bool, bool]] = lambda index: (False, False)
    again: Callable[[Any], Tensor] | None = None


Number = float | Tensor
"""A hyperparameter; a tensor may be batched under `torch.vmap`."""


def compiled(step: Callable[..., R], batch_size: int | None) -> Callable[..., R]:
    """Compile a step `(params, state, batch, …)` for batches of one size; None compiles nothing.

    A smaller batch, the last one of an epoch, runs uncompiled: its graphs would double the minutes of compiling.
    """
    if batch_size is None:
        return step
    fast = ff.compile(step)

    def chosen(params: Tree, state: Any, batch: Batch, *more: Any, **named: Any) -> R:
        return (fast if len(batch[0]) == batch_size else step)(params, state, batch, *more, **named)

    return chosen


def uniform(
    init: Callable[[Tree], Any], move: Callable[[Tree, Any, Batch, Any], Stepped], compiled_batch: int | None
) -> Optimizer:
    """Build an optimizer without randomness, whose steps are all of one kind."""
    moved = compiled(move, compiled_batch)

    def step(params: Tree, state: Any, batch: Batch, context: Any, noise: Any, index: int) -> Stepped:
        return moved(params, state, batch, context)

    def flagged(
        params: Tree, state: Any, batch: Batch, context: Any, noise: Any, update: bool, invert: bool
    ) -> Stepped:
        return move(params, state, batch, context)

    return Optimizer(init, _no_draw, step, flagged)


def given(number: Number | None) -> bool:
    """Return True unless a number is None or 0; the value of a tensor is not read."""
    return isinstance(number, Tensor) or bool(number)


def gradient(
    model: Any, likelihood: ff.Likelihood, params: Tree, batch: Batch, context: Any, penalty: Penalty | None = None
) -> tuple[Tree, ff.Info]:
    """Return the gradient of the mean loss and of the penalty, with loss, checks and context."""
    x, y, *_ = batch

    def loss(p: Tree) -> tuple[Tensor, Any]:
        outputs, new_context = model(p, x, context)
        value = likelihood.nll(outputs, y).mean()
        value = value if penalty is None else value + penalty(p, batch, context)
        return value, (value, new_context)

    grads, (value, new_context) = grad(loss, has_aux=True)(params)
    grads, value = ranks.mean(grads, value, x.shape[0] if isinstance(x, Tensor) else 0)
    checks = {"loss": torch.isfinite(value), "gradient": ff.tree.finite(grads)}
    return grads, ff.Info(loss=value, ok=checks, checks=checks, context=new_context)


def descend(params: Tree, direction: Tree, lr: Number, weight_decay: Number) -> Tree:
    """Return the parameters after a step against the direction, with decoupled weight decay."""
    if given(weight_decay):
        direction = ff.tree.add(direction, params, scale=weight_decay)
    return ff.tree.add(params, direction, scale=-lr)


def _no_draw(batch: Batch, generator: torch.Generator) -> tuple[()]:
    return ()
