"""Modules as pure models: calling one with its parameters and buffers as arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch.func import functional_call

from fisherfn.types import Model, PyTree, Tree


def functional(net: torch.nn.Module) -> tuple[Model, Tree, Tree]:
    """A module as `(model, params, context)`, its buffers being the context.

    `model(params, x, context)` returns the outputs and the new buffers (batch norm's running statistics move in
    training mode); neither the module nor the given context is changed. Several inputs are passed as a tuple.
    Parameters that do not require a gradient stay in the module, frozen. Build with
    `natural_gradient(model, params, x, context=context, …)`; a module without buffers has the empty context `{}`.

    >>> model, params, context = functional(torch.nn.Linear(2, 1))
    >>> outputs, context = model(params, torch.ones(3, 2), context)
    >>> outputs.shape
    torch.Size([3, 1])
    """
    params = {name: p.detach().clone() for name, p in net.named_parameters() if p.requires_grad}
    buffers = {name: b.detach().clone() for name, b in net.named_buffers()}

    def model(params: Tree, x: PyTree, context: Tree) -> tuple[Any, Tree]:
        fresh = {name: b.clone() for name, b in context.items()}  # batch norm writes into its buffers
        inputs = x if isinstance(x, tuple) else (x,)
        return functional_call(net, {**params, **fresh}, inputs), fresh

    return model, params, buffers


def run(model: Model, params: Tree, x: PyTree, context: PyTree) -> tuple[Any, PyTree]:
    """Call the model as the contract says: with the context if there is one. `()` stands for none."""
    if isinstance(context, tuple) and context == ():
        return model(params, x), ()
    outputs, new_context = model(params, x, context)
    return outputs, new_context
