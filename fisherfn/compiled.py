"""Compiled steps: a pure function of trees is traced once per kind of call and then runs as a single graph.

`torch.compile` does not support the function mode that intercepts the layers. A trace does: a step is a pure function
without branches on values, so its operations on tensors are always the same, and torch compiles the trace.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx

from fisherfn import tree, value_reads
from fisherfn.errors import MissingPackageError, NoiseError, StructureError

P = ParamSpec("P")
R = TypeVar("R")


class _Given(NamedTuple):
    """A leaf of the result that is the n-th tensor of the arguments."""

    place: int


class _Made(NamedTuple):
    """A leaf of the result that is the graph's n-th output."""

    place: int


class _Graph(NamedTuple):
    """One kind of call: its compiled trace, and the sources of the leaves of its result."""

    run: Callable[..., Sequence[Tensor]]
    leaves: Sequence[Any]
    like: Any
    overwrites: bool  # the next run writes into the tensors that this one returned


def compile(fn: Callable[P, R], **options: Any) -> Callable[P, R]:
    """Compile a pure function, such as a step, into a single graph for each kind of call.

    Calls are of one kind if their tensors agree in shape, strides, type and device, and everything else (flags,
    numbers, names, autocast) is equal. A number that changes from step to step should therefore be a tensor. What the
    function reads from elsewhere (an attribute of a module, its dropout rates) stays as in the first call of the kind.
    That call takes seconds to minutes. Inside `torch.vmap` and other transforms the function runs uncompiled, so
    compile the outermost function.

    Args:
        fn: a pure function from trees to a tree, such as `ng.step` or a whole training step around it. Its operations
            must not depend on the values of its tensors: no `if`, `.item()`, `.tolist()`, `.numpy()`, `nonzero`, or a
            mask as an index. Its result is not differentiable.
        options: arguments of `torch.compile`. Without a C++ compiler, `backend="eager"` runs the trace as it is. On a
            GPU, `mode="reduce-overhead"` replays the step as a CUDA graph, which saves the launch of each kernel; the
            result is copied, so that the next step does not overwrite it.

    Raises:
        NoiseError: an argument is a generator, which a graph cannot use.
        StructureError: an argument cannot be hashed, or the function reads the values of tensors.
        MissingPackageError: there is no C++ compiler.

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
        devices = {tensor.device.type for tensor in tensors} - {"meta"}
        low = [(one, torch.get_autocast_dtype(one)) for one in devices if torch.is_autocast_enabled(one)]
        kind = kind, frozenset(low)  # a trace has the casts of autocast
        with torch.no_grad():
            if _look_up(graphs, kind) is None:
                graphs[kind] = _traced(fn, (args, kwargs), tensors, options)
            graph = graphs[kind]
            made = _run(graph, tensors)
        sources: dict[type, Sequence[Tensor]] = {_Given: tensors, _Made: made}
        leaves = [sources[type(leaf)][leaf.place] if type(leaf) in sources else leaf for leaf in graph.leaves]
        return tree.replace_leaves(graph.like, leaves)  # type: ignore[no-any-return]

    return compiled


def _run(graph: _Graph, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Run a graph; the first run compiles it."""
    try:
        if not graph.overwrites:
            return graph.run(*tensors)
        if any(tensor.is_cuda for tensor in tensors):
            torch.compiler.cudagraph_mark_step_begin()  # otherwise torch waits for the old results to be dropped
        return [leaf.clone() for leaf in graph.run(*tensors)]
    except RuntimeError as error:
        if "compiler" not in str(error).lower() or "found" not in str(error):
            raise
        raise MissingPackageError(
            "torch found no C++ compiler, which a compiled step needs: install one (g++ or clang++; another one by the "
            'environment variable CXX), or run uncompiled. backend="eager" runs the trace without compiling it.'
        ) from error


def _look_up(graphs: dict[Hashable, _Graph], kind: Hashable) -> _Graph | None:
    try:
        return graphs.get(kind)
    except TypeError as error:
        raise StructureError(
            f"an argument of a compiled function cannot be hashed ({error}): pass trees of tensors, "
            "flags, numbers and names."
        ) from None


def _traced(fn: Callable[..., Any], given: Any, tensors: Sequence[Tensor], options: dict[str, Any]) -> _Graph:
    """Trace and compile the graph of calls like this one."""
    if any(isinstance(leaf, torch.Generator) for leaf in tree.leaves(given)):
        raise NoiseError(
            "a compiled function cannot use a generator: sample before the call, "
            "and pass noise=ng.noise(batch, generator)."
        )
    leaves: list[Any] = []
    like: list[Any] = []

    def flat(*inputs: Tensor) -> list[Tensor]:
        of = {id(tensor): traced for tensor, traced in zip(tensors, inputs, strict=True)}
        args, kwargs = tree.replace_leaves(given, [of.get(id(leaf), leaf) for leaf in tree.leaves(given)])
        with value_reads.refused(inputs):
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
        # rows in order, as in an initial state: with other strides the next call would be of another kind
        return [leaf.contiguous() if leaf.ndim <= 3 else leaf for leaf in made.values()]

    graph = make_fx(flat)(*tensors)
    if options.get("backend") == "eager":  # tracing the trace again would take twice as long as the first time
        return _Graph(graph, leaves, like[0], overwrites=False)
    # a CUDA graph has a fixed place in memory for its outputs; these options ask for one
    cuda_graph = (
        options.get("mode") in ("reduce-overhead", "max-autotune")
        or options.get("backend") == "cudagraphs"
        or "triton.cudagraphs" in options.get("options", {})
    )
    run = torch.compile(graph, dynamic=False, fullgraph=True, **options)
    return _Graph(run, leaves, like[0], overwrites=cuda_graph)
