"""Refusal of calls that read the values of the arguments of a trace.

A trace records operations on tensors. A number, a list or a shape that Python computes from the values of an argument
enters the graph as a constant, and every later call would get that of the first one. `make_fx` itself notices `.item()`
only. Values that do not depend on the arguments, such as those of a constant mask, may be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from fisherfn import tree
from fisherfn.errors import StructureError

READERS: dict[Any, Sequence[int]] = {
    Tensor.tolist: (0,),
    Tensor.numpy: (0,),
    Tensor.__array__: (0,),
    Tensor.__dlpack__: (0,),
    torch.tensor_split: (1,),
    Tensor.tensor_split: (1,),
    torch.ctc_loss: (2, 3),
}
"""Calls that read values without an operation on tensors, and the places of the arguments whose values they read."""

BY_VALUE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Tags of operations whose Python result or whose shape depends on values."""

MASKS = (torch.bool, torch.uint8)


@contextmanager
def refused(given: Iterable[Tensor]) -> Iterator[None]:
    """Raise `StructureError` in every call that reads a value computed from the `given` tensors of a trace."""
    dependent = _Dependent(given)
    with dependent, _Readers(dependent):
        yield


class _Dependent(TorchDispatchMode):
    """Follow which tensors depend on the given ones, and refuse operations on their values."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found = WeakIdKeyDictionary()
        self._add(given)

    def __contains__(self, x: object) -> bool:
        while isinstance(x, Tensor) and is_functorch_wrapped_tensor(x):
            x = get_unwrapped(x)
        return isinstance(x, Tensor) and x in self._found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tree.leaves((args, kwargs))
        read = given if BY_VALUE & set(func.tags) else []
        if func is torch.ops.aten.index.Tensor:  # the number of rows that a mask selects
            read = [index for index in args[1] if isinstance(index, Tensor) and index.dtype in MASKS]
        if read and any(leaf in self for leaf in read):
            raise _error(func.overloadpacket.__name__)
        if read and not any(leaf in self for leaf in given):
            with disable_proxy_modes_tracing():
                return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if any(leaf in self for leaf in given):
            self._add(tree.leaves(result))
            self._add(given if func._schema.is_mutable else ())
        return result

    def _add(self, leaves: Iterable[Any]) -> None:
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                self._found[leaf] = True


class _Readers(TorchFunctionMode):
    """Refuse calls of `READERS` on dependent tensors."""

    def __init__(self, dependent: _Dependent) -> None:
        super().__init__()
        self._dependent = dependent

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        places = READERS.get(func, ())
        if any(leaf in self._dependent for place in places for leaf in args[place : place + 1]):
            raise _error(func.__name__)
        return func(*args, **(kwargs or {}))


def _error(name: str) -> StructureError:
    name = "item" if name == "_local_scalar_dense" else name.strip("_")
    return StructureError(
        f"a compiled function reads the value of a tensor, by {name} (an `if` or float() is an item); a graph cannot "
        "depend on values: later calls would get that of the first. Use tensor operations (torch.where), or read the "
        "value outside, as ff.check(info) does."
    )
