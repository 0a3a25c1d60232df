"""Modules as pure models: calling one with its parameters and buffers as arguments."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.func import functional_call

from fisherfn.errors import expect
from fisherfn.layers import Elementary, SeededDropout, drops, need_seeds
from fisherfn.types import Model, PyTree, Tree


def functional(net: torch.nn.Module) -> tuple[Model, Tree, Tree]:
    """A module as `(model, params, context)`, its buffers being the context.

    `model(params, x, context)` returns the outputs and the new buffers (batch norm's running statistics move in
    training mode); neither the module nor the given context is changed. Several inputs are passed as a tuple.
    Parameters that do not require a gradient stay in the module, frozen. Build with
    `natural_gradient(model, params, x, context=context, …)`; a module without buffers has the empty context `{}`.

    Dropout in training mode draws nothing by itself: its noise is in the context too, for the N examples of a step
    `context | {"dropout": ff.dropout_seeds(N, generator)}`.

    >>> model, params, context = functional(torch.nn.Linear(2, 1))
    >>> outputs, context = model(params, torch.ones(3, 2), context)
    >>> outputs.shape
    torch.Size([3, 1])
    """
    expect(net, torch.nn.Module, "net", "pass a torch.nn.Module; a function of params and x is a model already")
    params = {name: p.detach().clone() for name, p in net.named_parameters() if p.requires_grad}
    buffers = {name: b.detach().clone() for name, b in net.named_buffers()}

    def model(params: Tree, x: PyTree, context: Tree) -> tuple[Any, Tree]:
        fresh = {name: context[name].clone() for name in buffers}  # batch norm writes into its buffers
        inputs = x if isinstance(x, tuple) else (x,)
        with SeededDropout(need_seeds(context)) if drops(net) or "dropout" in context else contextlib.nullcontext():
            outputs = functional_call(net, {**params, **fresh}, inputs)
        return outputs, {**context, **fresh}

    return model, params, buffers


def run(model: Model, params: Tree, x: PyTree, context: PyTree) -> tuple[Any, PyTree]:
    """Call the model, composite calls as elementary ones: in all of the library's runs, or results would differ."""
    with Elementary():
        return call(model, params, x, context)


def call(model: Model, params: Tree, x: PyTree, context: PyTree) -> tuple[Any, PyTree]:
    """Call the model as the contract says: with the context if there is one. `()` stands for none.

    For a caller that is in an `Elementary` mode already.
    """
    if isinstance(context, tuple) and context == ():
        return model(params, x), ()
    outputs, new_context = model(params, x, context)
    return outputs, new_context
