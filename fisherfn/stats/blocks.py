"""Blocks: a layer of the model as one matrix per group, with the calls that use it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Size, Tensor

from fisherfn.layers import EMBEDDING, FAMILIES, LINEAR, TIED, Family
from fisherfn.stats import report
from fisherfn.types import Tree


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


class LayerCall(NamedTuple):
    """Family, configuration and bias of a layer's call, which every run must have in common with the build."""

    kind: str
    config: Any
    bias: str | None


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
    def calls(self) -> tuple[LayerCall, ...]:
        """The calls of the layer, in order."""
        kinds = [
            (LINEAR if use.transposed else EMBEDDING).name if self.kind == TIED.name else self.kind for use in self.uses
        ]
        return tuple(
            LayerCall(kind, use.config, self.bias if use.biased else None)
            for kind, use in zip(kinds, self.uses, strict=True)
        )

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
