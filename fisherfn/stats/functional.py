"""Modules as pure models, which take their parameters and buffers as arguments."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fisherfn import tree
from fisherfn.decompositions import Elementary
from fisherfn.errors import StructureError, expect
from fisherfn.randomness import Draw, SeededDropout, Sizes, draws_of, drops, require_seeds
from fisherfn.stats.swap import Strays, Swap, unwrapped, versions
from fisherfn.stats.whole import check_apart, check_whole
from fisherfn.types import Model, PyTree, Tree, single


def functional(net: torch.nn.Module) -> tuple[Model, Tree, Tree]:
    """Convert a module to `(model, params, context)`; the context holds its buffers.

    `model(params, x, context)` returns the outputs and the new buffers (batch norm's running statistics change in
    training mode, buffers may be assigned). Neither the module nor the given context is changed. Attributes that the
    forward sets on the module (activations, counters) are dropped. Pass several inputs as a tuple, `net(*x)`, or as a
    dict, `net(**x)`; a forward that takes no such names gets the dict itself. If the output is an object with
    `.logits`, the model returns these. Parameters that do not require a gradient stay frozen in the module. Build with
    `natural_gradient(model, params, x, context=context, …)`; a module without buffers has the empty context `{}`.

    Dropout in training mode takes its noise from the context, too: pass
    `context | {"dropout": ff.dropout_seeds(N, generator)}` for the N examples of a step.

    >>> model, params, context = functional(torch.nn.Linear(2, 1))
    >>> outputs, context = model(params, torch.ones(3, 2), context)
    >>> outputs.shape
    torch.Size([3, 1])
    """
    expect(net, torch.nn.Module, "net", "pass a torch.nn.Module; a function of params and x is a model already")
    check_net(net)
    params = {name: p.detach().clone() for name, p in net.named_parameters() if p.requires_grad}
    buffers = {name: b.detach().clone() for name, b in net.named_buffers()}
    draws: dict[Any, list[Draw]] = {}  # properties of the net, found once for each shape of the inputs
    looked = set[Any]()  # likewise

    def model(params: Tree, x: PyTree, context: Tree) -> tuple[Any, Tree]:
        fresh = {name: context[name].clone() for name in buffers}  # batch norm writes into its buffers
        swap, args, kwargs = Swap(net, {**params, **fresh}), *_arguments(net, x)
        seeded: SeededDropout | None = None
        # shapes and modes decide which path a run takes and which random numbers it samples
        shapes = tuple(leaf.shape[1:] if isinstance(leaf, Tensor) else None for leaf in tree.leaves(x))
        if drops(net) or "dropout" in context:
            seeds = require_seeds(context)
            key = shapes, tuple(mode_of(module) for module in net.modules())
            if key not in draws:
                draws[key] = _draws(net, {**params, **fresh}, x, seeds)
            seeded = SeededDropout(seeds, draws[key])
        first = shapes not in looked and not torch.compiler.is_compiling()
        with seeded or contextlib.nullcontext(), swap(), Strays(swap.strays()) if first else contextlib.nullcontext():
            outputs = unwrapped(net)(*args, **kwargs)
            moved = swap.buffers(fresh)
        looked.add(shapes)
        if seeded is not None:
            seeded.finish()
        logits = None if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
        return logits if isinstance(logits, Tensor) else outputs, {**context, **moved}

    return model, params, buffers


def mode_of(module: torch.nn.Module) -> tuple[Any, ...]:
    """Return what decides which path a module takes: whether it trains, and whether it drops anything."""
    rates = (vars(module).get(name) for name in ("p", "dropout"))
    return module.training, *(rate != 0 for rate in rates if isinstance(rate, float | int))


def _draws(net: torch.nn.Module, values: Tree, x: PyTree, seeds: Tensor) -> list[Draw]:
    """Find the axis of the examples in each dropout of a run, by two runs on copies of the first example.

    The result is empty if the examples are not on the first axis of the inputs, or if the net does not run on copies.
    """
    found = []
    with Elementary().alone(), torch.no_grad(), torch.random.fork_rng(devices=[]):  # hidden from any trace
        leaves = tree.leaves(x)
        if not all(isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == len(seeds) for leaf in leaves):
            return []
        for n in (2, 3):
            args, kwargs = _arguments(net, tree.map(lambda leaf, n=n: torch.cat([leaf[:1]] * n), x))
            sizes, swap = Sizes(), Swap(net, {name: value.clone() for name, value in values.items()})
            try:
                with sizes.alone(), swap():
                    unwrapped(net)(*args, **kwargs)
            except Exception:  # the actual run raises the error
                return []
            found.append(sizes.shapes)
    return draws_of(*found) if len(found[0]) == len(found[1]) else []


def check_net(net: torch.nn.Module) -> None:
    """Raise `StructureError` for a net that cannot be run with other parameters: a scripted or an empty lazy one."""
    scripted = [name for name, module in net.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    if scripted:
        raise StructureError(
            f"the module {scripted[0] or 'net'!r} was made by torch.jit, and cannot be run with other parameters: pass "
            "the module that it was scripted or traced from (torch.compile is fine)."
        )
    check_whole(dict(net.named_parameters()))
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if torch.nn.parameter.is_lazy(tensor):
            raise StructureError(
                f"{name!r} of a lazy module has no shape yet: run the net once, net(x), before passing it to fisherfn."
            )
    check_apart(dict(net.named_parameters()))


def _arguments(net: torch.nn.Module, x: PyTree) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of the net: several inputs for a tuple, and for a dict if the forward takes its names."""
    if not isinstance(x, Mapping):
        return (x if isinstance(x, tuple) else (x,)), {}
    try:
        inspect.signature(unwrapped(net).forward).bind(**x)
    except TypeError:
        return (x,), {}
    return (), dict(x)


def run(model: Model, params: Tree, x: PyTree, context: PyTree) -> tuple[Any, PyTree]:
    """Call the model with composite calls decomposed, as all runs of the library do so that their results agree."""
    with Elementary():
        return call(model, params, x, context)


class Eager:
    """Have compiled functions run as they are written while any thread is inside: all threads share the setting."""

    def __init__(self) -> None:
        self._lock, self._inside, self._stance = threading.Lock(), 0, contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._stance.enter_context(torch.compiler.set_stance("force_eager"))

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._stance.close()


EAGER = Eager()


def check_model(model: Any, context: PyTree) -> None:
    """Raise `StructureError` unless a model is a function of parameters, inputs and the context, if there is one."""
    if isinstance(model, torch.nn.Module):
        raise StructureError(
            f"the model is a module, {type(model).__name__}: pass the function of its parameters, with them and its "
            "buffers, model, params, context = ff.functional(net)."
        )
    if not callable(model):
        raise StructureError(f"model cannot be {type(model).__name__}: pass a function (params, x) -> outputs.")
    if isinstance(context, tuple) and context == ():
        if not _takes(model, 2) and _takes(model, 3):
            raise StructureError("the model takes a context, and none was given: pass context= to the build.")
    elif not _takes(model, 3) and _takes(model, 2):
        raise StructureError(
            "a context was given, and the model takes none: let it be a function (params, x, context) -> (outputs, "
            "context), or leave out context=."
        )


def _takes(model: Model, arguments: int) -> bool:
    """Return True if a function can be called with so many arguments, or does not say with how many."""
    try:
        signature = inspect.signature(model)
    except (ValueError, TypeError):
        return True
    try:
        signature.bind(*range(arguments))
    except TypeError:
        return False
    return True


def call(model: Model, params: Tree, x: PyTree, context: PyTree) -> tuple[Any, PyTree]:
    """Call the model, with the context if there is one; `()` stands for none.

    Outputs in half precision are converted to float32, since losses and their changes have the outputs' type. The
    caller must already be in an `Elementary` mode.
    """
    before = versions(x)
    found: Any
    # functions that the model has compiled run as they are written, so that a trace sees their layers
    with contextlib.nullcontext() if torch.compiler.is_compiling() else EAGER:
        found = model(params, x) if isinstance(context, tuple) and context == () else model(params, x, context)
    if isinstance(context, tuple) and context == ():
        outputs, new_context = found, ()
    else:
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            raise StructureError(
                f"with a context the model must return (outputs, new context), got {type(found).__name__}: return "
                "(outputs, context), also where the context does not change."
            )
        outputs, new_context = found
    if versions(x) != before:
        raise StructureError(
            "the model changes its inputs in place (x += 1, x.clamp_(), or inplace=True in its first layers), and a "
            "step runs it more than once on the same inputs. Write x = x + 1, or let the forward begin with "
            "x = x.clone()."
        )
    if isinstance(outputs, Tensor) and outputs.is_floating_point():
        outputs = single(outputs)
    return outputs, new_context
