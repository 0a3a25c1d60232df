"""Temporary replacement of a module's parameters and buffers, which leaves the module unchanged.

Each slot (an entry of a module's parameters or buffers) is filled once, found by the tensor that it holds: a submodule
under two names has one set of slots, and a tied tensor fills all of its slots. Changes made by the run are undone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fisherfn import tree
from fisherfn.errors import StructureError
from fisherfn.stats.reads import values_read
from fisherfn.stats.steps import tensors_among
from fisherfn.types import PyTree, Tree

_TABLES = ("_parameters", "_buffers", "_modules")


class Swap:
    """A module with replaced parameters and buffers; `buffers()` reads the buffers after the run."""

    def __init__(self, net: nn.Module, values: Mapping[str, Tensor]) -> None:
        self._modules: dict[nn.Module, str] = {}
        self._slots: list[tuple[dict[str, Any], str, str]] = []
        self._filled: set[tuple[int, str]] = set()
        self._values = values
        self._replaced: dict[int, str] = {}
        names: dict[int, str] = {}  # the first of several names, as in `named_parameters` and `named_buffers`
        for path, module in net.named_modules():
            self._modules[module] = path
            for table in (module._parameters, module._buffers):
                for key, tensor in table.items():
                    if tensor is None:
                        continue
                    name = names.setdefault(id(tensor), f"{path}.{key}" if path else key)
                    self._filled.add((id(table), key))
                    if name in values:
                        self._slots.append((table, key, name))
                        if table is module._parameters:
                            self._replaced[id(tensor)] = name

    def strays(self) -> dict[int, str]:
        """Return the names of the replaced parameters, by identity: a run that reads one of them reads an old one."""
        with torch._C.DisableTorchFunction():  # an enclosing trace would see attributes as calls
            given = {id(leaf) for value in self._values.values() for leaf in (value, value._base)}
        return {place: name for place, name in self._replaced.items() if place not in given}

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Fill the slots, and on exit undo all changes of the modules' attributes."""
        before = [(module, dict(vars(module)), [dict(vars(module)[t]) for t in _TABLES]) for module in self._modules]
        try:
            for table, key, name in self._slots:
                table[key] = self._values[name]
            for module in self._modules:
                _see_through(module)
            yield
        finally:
            for module, attributes, tables in before:
                # the tables are the same objects as before: the run may have changed their entries
                for name, entries in zip(_TABLES, tables, strict=True):
                    attributes[name].clear()
                    attributes[name].update(entries)
                own = vars(module)
                own.clear()
                own.update(attributes)

    def buffers(self, names: Mapping[str, Tensor]) -> Tree:
        """Return the buffers after the run, which may have changed them in place or assigned them.

        Raises:
            StructureError: a buffer did not exist before the run.
        """
        assigned: dict[str, Tensor] = {}
        for table, key, name in self._slots:
            tensor = table.get(key)
            if name in names and tensor is not None and tensor is not self._values[name]:
                assigned[name] = tensor.detach()
        self._none_born()
        return {name: assigned.get(name, self._values[name]) for name in names}

    def _none_born(self) -> None:
        for module in self._modules:
            for key, tensor in module._buffers.items():
                if tensor is not None and (id(module._buffers), key) not in self._filled:
                    path = f"{self._modules[module]}.{key}".lstrip(".")
                    raise StructureError(
                        f"the buffer {path!r} is made by the first forward, but a step can only change buffers that "
                        "exist: run the net once, net(x), before it is passed to fisherfn."
                    )


def _see_through(module: nn.Module) -> None:
    """Replace wrappers made by `torch.compile` and `DataParallel` by the modules inside, which the library traces."""
    for key, child in module._modules.items():
        if child is not None:
            module._modules[key] = unwrapped(child)
    if vars(module).get("_compiled_call_impl") is not None:
        vars(module)["_compiled_call_impl"] = None
    weights: list[str] = vars(module).get("_flat_weights_names", [])
    if weights and isinstance(module, nn.RNNBase):
        vars(module)["_flat_weights"] = [getattr(module, name, None) for name in weights]


def unwrapped(net: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of `torch.compile`, `DataParallel` and `DistributedDataParallel`."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while (inner := net._modules.get("module" if isinstance(net, parallel) else "_orig_mod")) is not None:
        net = inner
    return net


class Strays(TorchFunctionMode):
    """Refuse calls that read a replaced parameter by another reference: an attribute, a list, or a view of it."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names = names

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        tensors = tensors_among(values_read(func, args, kwargs or {}))
        with torch._C.DisableTorchFunction():  # an enclosing trace would see attributes as calls
            read = [self._names.get(id(leaf)) or self._names.get(id(leaf._base)) for leaf in tensors]
        stray = next((one for one in read if one is not None), None)
        if stray is not None and any(isinstance(leaf, Tensor) for leaf in tree.leaves(output)):  # not just a shape
            raise StructureError(
                f"the forward reads the parameter {stray!r} by another reference (an attribute, a list or a view that "
                "__init__ made), which would keep its old value: read it from its module, in the forward."
            )
        return output


def versions(inputs: PyTree) -> list[int]:
    """Return how often each tensor was changed in place; inference tensors, which have no counter, are left out."""
    tensors = [leaf for leaf in tree.leaves(inputs) if isinstance(leaf, Tensor)]
    return [leaf._version for leaf in tensors if not leaf.is_inference()]
