"""Calls of a run as the build notes them: their shapes, where they have the examples, and which a later run repeats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from torch import Size, Tensor

from fisherfn import tree
from fisherfn.types import PyTree


class Place(NamedTuple):
    """Where a tensor has the examples.

    Attributes:
        axis: counted from the right.
        repeats: rows per example on that axis.
        outer: how many of these are further out than the examples: 1 if the examples are outermost, 2 for the two
            halves of a `torch.cat`.
    """

    axis: int
    repeats: int = 1
    outer: int = 1


Growth: TypeAlias = list[Place | None] | None
"""For each output of a call the place of the examples; None for an output that all examples share. None altogether
where that is not to be found."""


class Traced(NamedTuple):
    """A call of a run: its name, and the shapes of the tensors that it returned and took."""

    name: str
    outputs: tuple[Size, ...]
    inputs: tuple[Size, ...]


class Step(NamedTuple):
    """A call that reads shared tensors.

    Attributes:
        function: its name.
        place: where its output has the examples; None where the output is shared, too.
        origins: the weights that its shared tensors come from.
        inputs: where each of its tensors has the examples, for a call that is run once per example.
    """

    function: str
    place: Place | None
    origins: frozenset[str]
    inputs: tuple[Place | None, ...] = ()


class Plan(NamedTuple):
    """The steps that a run takes for shared tensors.

    Attributes:
        parameters: those that are shared tensors themselves.
        layers: for each layer's weight, which of its uses no example enters.
        steps: the calls, in order.
    """

    parameters: frozenset[str] = frozenset()
    layers: Mapping[str, tuple[bool, ...]] = {}
    steps: tuple[Step, ...] = ()


def traced(func: Callable[..., Any], arguments: PyTree, output: Any) -> Traced:
    """A call as a later run is compared with it."""
    inputs = tuple(leaf.shape for leaf in tensors_among(arguments))
    return Traced(name_of(func), tuple(part.shape for part in tensors_of(output)), inputs)


def name_of(func: Callable[..., Any]) -> str:
    """The name by which a call is known."""
    return getattr(func, "__name__", type(func).__name__)


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors that a call returned."""
    if isinstance(output, Tensor):
        return [output]
    return [part for part in output if isinstance(part, Tensor)] if isinstance(output, (tuple, list)) else []


def tensors_among(*arguments: PyTree) -> list[Tensor]:
    """The tensors among the arguments of a call, in order."""
    return [leaf for leaf in tree.leaves(arguments) if isinstance(leaf, Tensor)]
