"""Compiled steps: a pure function of trees, traced once for each kind of call and from then on run as one graph.

`torch.compile` cannot look into the function mode that sees the layers. A trace can: a step is a pure function without
branches on values, so what it does to tensors is always the same, and torch compiles the trace.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx

from fisherfn import tree
from fisherfn.errors import NoiseError, StructureError

P = ParamSpec("P")
R = TypeVar("R")


class _Given(NamedTuple):
    """A leaf of the result that is the n-th tensor of the arguments."""

    place: int


class _Made(NamedTuple):
    """A leaf of the result that is the graph's n-th output."""

    place: int


class _Graph(NamedTuple):
    """One kind of call: its compiled trace, and where the leaves of its result come from."""

    run: Callable[..., Sequence[Tensor]]
    leaves: Sequence[Any]
    like: Any


def compile(fn: Callable[P, R], **options: Any) -> Callable[P, R]:
    """The same function, faster: traced at its first call of each kind, compiled by torch, and run as one graph.

    Calls are of one kind where their tensors agree in shape, strides, type and device, and all else (flags, numbers,
    names) is equal: a number that changes from step to step should be a tensor. The first call of a kind takes from
    seconds to minutes. Inside `torch.vmap` and the like it is the function itself: compile what is outermost.

    Args:
        fn: a pure function of trees to a tree, as `ng.step`, or a whole training step around it. What it does may not
            depend on the values of tensors; what it returns is not differentiable.
        options: go to `torch.compile`. Where there is no C++ compiler, `backend="eager"` runs the trace as it is.

    Raises:
        NoiseError: called with a generator, from which a graph cannot draw.
        StructureError: called with something that cannot be hashed; a function that looks at the values of tensors.

    >>> double = compile(lambda tree, *, times: {name: times * leaf for name, leaf in tree.items()}, backend="eager")
    >>> double({"w": torch.ones(2)}, times=2)
    {'w': tensor([2., 2.])}
    """
    graphs: dict[Hashable, _Graph] = {}

    @functools.wraps(fn)
    def compiled(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch._C._functorch.maybe_current_level() is not None or get_proxy_mode() is not None:
            return fn(*args, **kwargs)
        tensors, kind = tree.split((args, kwargs))
        with torch.no_grad():
            if _look_up(graphs, kind) is None:
                graphs[kind] = _traced(fn, (args, kwargs), tensors, options)
            graph = graphs[kind]
            made = graph.run(*tensors)
        sources: dict[type, Sequence[Tensor]] = {_Given: tensors, _Made: made}
        leaves = [sources[type(leaf)][leaf.place] if type(leaf) in sources else leaf for leaf in graph.leaves]
        return tree.replace_leaves(graph.like, leaves)  # type: ignore[no-any-return]

    return compiled


def _look_up(graphs: dict[Hashable, _Graph], kind: Hashable) -> _Graph | None:
    try:
        return graphs.get(kind)
    except TypeError as error:
        raise StructureError(
            f"a compiled function was called with something that cannot be hashed ({error}): pass trees of tensors, "
            "and flags, numbers and names beside them."
        ) from None


def _traced(fn: Callable[..., Any], given: Any, tensors: Sequence[Tensor], options: dict[str, Any]) -> _Graph:
    """The graph of calls like this one."""
    if any(isinstance(leaf, torch.Generator) for leaf in tree.leaves(given)):
        raise NoiseError(
            "a compiled function cannot draw from a generator: draw before it, "
            "and pass noise=ng.noise(batch, generator)."
        )
    leaves: list[Any] = []
    like: list[Any] = []

    def flat(*inputs: Tensor) -> list[Tensor]:
        of = {id(tensor): traced for tensor, traced in zip(tensors, inputs, strict=True)}
        args, kwargs = tree.replace_leaves(given, [of.get(id(leaf), leaf) for leaf in tree.leaves(given)])
        result = fn(*args, **kwargs)
        position = {id(traced): index for index, traced in enumerate(inputs)}
        made: dict[int, Tensor] = {}
        for leaf in tree.leaves(result):
            if id(leaf) in position:
                leaves.append(_Given(position[id(leaf)]))
            elif isinstance(leaf, Tensor):
                made.setdefault(id(leaf), leaf)
                leaves.append(_Made(list(made).index(id(leaf))))
            else:
                leaves.append(leaf)
        like.append(tree.map(lambda leaf: None, result))
        return list(made.values())

    try:
        graph = make_fx(flat)(*tensors)
    except RuntimeError as error:
        if "tracing tensor" not in str(error):
            raise
        raise StructureError(
            "a compiled function looks at the value of a tensor (an `if`, float() or .item()): a graph does the same "
            "whatever the values. Keep it in tensors (torch.where), or do it outside, as ff.check(info)."
        ) from error
    return _Graph(torch.compile(graph, dynamic=False, fullgraph=True, **options), leaves, like[0])
