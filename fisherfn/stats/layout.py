"""Layout of a model: which parameter is in which block, and why. Printed, it is the coverage report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Size, Tensor

from fisherfn import tree
from fisherfn.errors import StructureError, unknown
from fisherfn.layers import COPIED, ELEMENTWISE, FAMILIES, Family
from fisherfn.stats import report
from fisherfn.stats.steps import Plan, Step
from fisherfn.stats.whole import check_whole
from fisherfn.types import PyTree, Shape, Tree


class Use(NamedTuple):
    """One call of a layer.

    Attributes:
        config: static configuration, as the family reads it.
        output_shape: shape of the output without the axis of the examples.
        biased: True if the block's bias was added.
        axis: axis of the examples.
        dtype: type of the output-gradients: that of the output or of the weight, whichever is more precise.
        repeats: rows per example on that axis, above 1 if examples and positions are merged there.
        outer: how many of these rows are further out than the examples; 2 for the two halves of a `torch.cat`.
        shared: True if the input of the call does not depend on the examples, so that its output meets the batch in a
            later broadcast. Its statistics have the examples on the first axis.
        transposed: True if inputs and output-gradients swap roles: the output layer of a tied embedding.
    """

    config: Any
    output_shape: Size
    biased: bool
    dtype: torch.dtype
    axis: int = 0
    repeats: int = 1
    outer: int = 1
    shared: bool = False
    transposed: bool = False

    def full_shape(self, examples: int) -> tuple[int, ...]:
        """Return the shape of the output for this number of examples."""
        return (*self.output_shape[: self.axis], examples * self.repeats, *self.output_shape[self.axis :])

    def examples_first(self, x: Tensor) -> Tensor:
        """Move the examples of an input or output of the call to the first axis, outermost."""
        x = x.movedim(self.axis, 0) if self.axis else x
        if self.outer == 1:
            return x
        inner = self.repeats // self.outer
        merged: Tensor = x.unflatten(0, (self.outer, -1, inner))
        return merged.transpose(0, 1).flatten(0, 2)


@dataclass(frozen=True)
class Block:
    """A layer as one matrix per group, `[K, d_out, d_in (+1)]`, with the names of its parameters."""

    key: str
    kind: str
    weight: str
    weight_shape: Size
    bias: str | None
    bias_shape: Size
    uses: tuple[Use, ...]
    why: str

    @property
    def family(self) -> Family:
        """The layer family, which converts this kind of layer to `(a, g)`."""
        return FAMILIES[self.kind]

    @property
    def cause(self) -> str:
        """One word for the reason why the parameter is in no layer; empty for a layer."""
        return report.cause(self.why) if self.kind == "fallback" else ""

    @property
    def config(self) -> Any:
        """The static configuration of the layer, with which the family reads the weight."""
        return self.uses[0].config

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the block's parameters."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of the block's matrix: (groups K, d_out, d_in with the bias column)."""
        probe = torch.empty(self.weight_shape, device="meta")
        k, o, i = self.family.to_matrix(probe, self.config).shape
        return k, o, i + (self.bias is not None)

    @property
    def positions(self) -> int:
        """The number of shared positions of the layer, T, in all its uses together."""
        k, o, _ = self.shape
        return sum(max(1, use.repeats * math.prod(use.output_shape) // (k * o)) for use in self.uses)

    def matrix(self, values: Tree) -> Float[Tensor, "k o i"]:
        """Return the block's part of a tree like params as its matrix W, with the bias as the last column."""
        weight = self.family.to_matrix(values[self.weight], self.config)
        if self.bias is None:
            return weight
        bias = values[self.bias].reshape(weight.shape[0], weight.shape[1], 1)
        return torch.cat([weight, bias], -1)

    def tensors(self, matrix: Float[Tensor, "k o i"]) -> Tree:
        """Invert `matrix`: return the block's part of a tree like params."""
        if self.bias is None:
            return {self.weight: self.family.from_matrix(matrix, self.config)}
        weight, bias = matrix.split((matrix.shape[-1] - 1, 1), -1)
        return {self.weight: self.family.from_matrix(weight, self.config), self.bias: bias.reshape(self.bias_shape)}


@dataclass(frozen=True)
class Layout:
    """The blocks of a model, with the shapes found by tracing it.

    `print(layout)` is the coverage report; a notebook shows it as a table.
    """

    blocks: tuple[Block, ...]
    shapes: tuple[tuple[str, Size], ...]
    input_shapes: tuple[Size, ...]
    output_shape: Size
    dtypes: tuple[torch.dtype, ...]
    output_dtype: torch.dtype
    has_context: bool
    context_by_example: tuple[tuple[str, bool], ...] = ()
    """The leaves of the context, each with True if it has one entry per example (dropout noise)."""
    couples: bool = False
    """True if the model mixes the examples of a batch by design (batch norm in training mode)."""
    unused: tuple[str, ...] = ()
    """Parameters that the outputs do not depend on. They are in no block; trees made from matrices have zeros there."""
    uncovered: tuple[tuple[str, str], ...] = ()
    """Parameters that take the plain gradient, each with the reason why no layer covers it. They are in no block."""
    one_by_one: str = ""
    """The reason why the fallback runs the model on one example at a time; empty if it uses one vectorised run."""
    steps: tuple[Step, ...] = ()
    """The calls of the trace that read tensors shared by all examples."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of all parameters, in params order."""
        return tuple(name for name, _ in self.shapes)

    @cached_property
    def outside(self) -> int:
        """The number of entries of parameters that are in no block."""
        shapes = dict(self.shapes)
        return sum(shapes[name].numel() for name in (*self.unused, *dict(self.uncovered)))

    @cached_property
    def layers(self) -> tuple[Block, ...]:
        """The blocks of parameters that belong to a layer."""
        return tuple(block for block in self.blocks if block.kind != "fallback")

    @cached_property
    def fallbacks(self) -> tuple[Block, ...]:
        """The blocks of parameters without a layer."""
        return tuple(block for block in self.blocks if block.kind == "fallback")

    @cached_property
    def plan(self) -> Plan:
        """The steps for tensors shared by all examples, restricted to those that concern a layer."""
        parameters = frozenset(block.weight for block in self.blocks if block.kind in (ELEMENTWISE.name, COPIED.name))
        layers = {block.weight: tuple(use.shared for use in block.uses) for block in self.layers}
        layers = {name: uses for name, uses in layers.items() if any(uses)}
        followed = parameters | layers.keys()
        return Plan(parameters, layers, tuple(step for step in self.steps if step.origins & followed))

    def by_example(self, context: PyTree) -> list[bool]:
        """Return for each leaf of a context True if it has one entry per example.

        Raises:
            StructureError: the leaves differ from those at the build.
        """
        known, given = dict(self.context_by_example), tree.flatten(context)
        if known.keys() != given.keys():
            seeds = ' Dropout needs context["dropout"] = ff.dropout_seeds(N, generator).' if "dropout" in known else ""
            raise StructureError(
                f"the context is not that of the build: missing {sorted(known.keys() - given.keys())[:4]}, unexpected "
                f"{sorted(given.keys() - known.keys())[:4]}.{seeds}"
            )
        return [known[path] for path in given]

    def block(self, key: str) -> Block:
        """Return the block with this key."""
        if key not in self._by_key:
            raise unknown("block", key, list(self._by_key))
        return self._by_key[key]

    @cached_property
    def _by_key(self) -> dict[str, Block]:
        return {block.key: block for block in self.blocks}

    def matrices(self, values: Tree) -> dict[str, Tensor]:
        """Convert a tree like params to one matrix per block."""
        self.validate(values)
        return {block.key: block.matrix(values) for block in self.blocks}

    def tree(self, matrices: Mapping[str, Tensor]) -> Tree:
        """Convert one matrix per block to a tree like params, in params order."""
        tensors: Tree = {}
        for block in self.blocks:
            tensors.update(block.tensors(matrices[block.key]))
        if self.unused or self.uncovered:
            like, shapes = next(iter(tensors.values())), dict(self.shapes)
            tensors |= {name: like.new_zeros(shapes[name]) for name in (*self.unused, *dict(self.uncovered))}
        return {name: tensors[name] for name in self.names}

    def cast(self, values: Tree) -> Tree:
        """Convert a tree like params to the types of the parameters."""
        return {name: values[name].to(dtype) for name, dtype in zip(self.names, self.dtypes, strict=True)}

    def zeros(self, device: torch.device) -> Tree:
        """Return a tree of zeros like params, which stores one number per parameter."""
        kinds = zip(self.shapes, self.dtypes, strict=True)
        return {name: torch.zeros((), dtype=dtype, device=device).expand(shape) for (name, shape), dtype in kinds}

    @cached_property
    def block_shapes(self) -> dict[str, Shape]:
        """The matrix shape of each block."""
        return {block.key: Shape(*block.shape, one_hot=block.family.one_hot) for block in self.blocks}

    def validate(self, values: Tree) -> None:
        """Raise unless `values` has the names and shapes of params, and no tensor is sharded over ranks."""
        if not isinstance(values, Mapping) or set(values) != set(self.names):
            given = set(values) if isinstance(values, Mapping) else {type(values).__name__}
            raise StructureError(
                f"expected a tree like params: missing {sorted(set(self.names) - given)[:4]}, "
                f"unexpected {sorted(given - set(self.names))[:4]}. Pass the same names as at the build."
            )
        check_whole(values)
        tree.check_leaves(values, dict(self.shapes))

    def __str__(self) -> str:
        return report.text(self)

    def _repr_html_(self) -> str:
        return report.html(self)
