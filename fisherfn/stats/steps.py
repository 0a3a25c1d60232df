"""Records of the calls of a run: their shapes, their axes of examples, and the steps that later runs repeat."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from torch import Size, Tensor

from fisherfn import tree
from fisherfn.types import PyTree


class Place(NamedTuple):
    """The position of the examples in a tensor.

    Attributes:
        axis: axis of the examples, counted from the right.
        repeats: rows per example on that axis.
        outer: how many of these rows are further out than the examples: 1 if the examples are outermost, 2 for the two
            halves of a `torch.cat`.
    """

    axis: int
    repeats: int = 1
    outer: int = 1


Growth: TypeAlias = list[Place | None] | None
"""The place of the examples in each output of a call, None for an output that all examples share. None instead of the
list if the places cannot be found."""


class Traced(NamedTuple):
    """A call of a run: its name, and the shapes of its output and input tensors."""

    name: str
    outputs: tuple[Size, ...]
    inputs: tuple[Size, ...]


class Step(NamedTuple):
    """A call that reads shared tensors.

    Attributes:
        function: name of the function.
        place: position of the examples in the output; None if the output is shared, too.
        origins: names of the weights from which the shared tensors were computed.
        inputs: position of the examples in each input tensor, for a call that is run once per example.
    """

    function: str
    place: Place | None
    origins: frozenset[str]
    inputs: tuple[Place | None, ...] = ()


class Plan(NamedTuple):
    """The steps of a run that concern shared tensors.

    Attributes:
        parameters: names of the parameters that are shared tensors themselves.
        layers: for each layer's weight, one flag per use: True if its input is shared by all examples.
        steps: the calls, in order.
    """

    parameters: frozenset[str] = frozenset()
    layers: Mapping[str, tuple[bool, ...]] = {}
    steps: tuple[Step, ...] = ()


def traced(func: Callable[..., Any], arguments: PyTree, output: Any) -> Traced:
    """Return the record of a call, with which the call of a later run is compared."""
    inputs = tuple(leaf.shape for leaf in tensors_among(arguments))
    return Traced(name_of(func), tuple(part.shape for part in tensors_of(output)), inputs)


def name_of(func: Callable[..., Any]) -> str:
    """Return the name of a function, or of its type if it has none."""
    return getattr(func, "__name__", type(func).__name__)


def tensors_of(output: Any) -> list[Tensor]:
    """Return the tensors that a call returned."""
    if isinstance(output, Tensor):
        return [output]
    return [part for part in output if isinstance(part, Tensor)] if isinstance(output, (tuple, list)) else []


def tensors_among(*arguments: PyTree) -> list[Tensor]:
    """Return the tensors among the arguments of a call, in order."""
    return [leaf for leaf in tree.leaves(arguments) if isinstance(leaf, Tensor)]
