"""Layout of a model: which parameter is in which block, and why. Printed, it is the coverage report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, reduce

import torch
from torch import Size, Tensor

from fisherfn import tree
from fisherfn.errors import StructureError, unknown
from fisherfn.layers import COPIED, ELEMENTWISE
from fisherfn.stats import report
from fisherfn.stats.blocks import Block, LayerCall, Use
from fisherfn.stats.steps import Plan, Step
from fisherfn.stats.whole import check_whole
from fisherfn.types import PyTree, Shape, Tree, at_least_single

__all__ = ["Block", "Layout", "Use"]
"""Names of this module in layouts saved before 0.1.0."""


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
    context_unclear: tuple[str, ...] = ()
    """Leaves of the context of which a build with one example cannot tell whether they have one entry per example."""
    couples: bool = False
    """True if the model mixes the examples of a batch by design (batch norm in training mode)."""
    unused: tuple[str, ...] = ()
    """Parameters that the outputs do not depend on. They are in no block; trees made from matrices have zeros there."""
    unread: tuple[str, ...] = ()
    """Those of the unused parameters that no call of the trace reads."""
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
    def precision(self) -> torch.dtype:
        """The type of states and statistics: that of the most precise parameters, at least float32."""
        return reduce(torch.promote_types, self.dtypes, torch.float32)

    @cached_property
    def mixed(self) -> bool:
        """True if some parameters are less precise than states and statistics, in which half precision is float32."""
        return any(at_least_single(dtype) != self.precision for dtype in self.dtypes)

    @cached_property
    def layers(self) -> tuple[Block, ...]:
        """The blocks of parameters that belong to a layer."""
        return tuple(block for block in self.blocks if block.kind != "fallback")

    @cached_property
    def fallbacks(self) -> tuple[Block, ...]:
        """The blocks of parameters without a layer."""
        return tuple(block for block in self.blocks if block.kind == "fallback")

    @cached_property
    def calls(self) -> tuple[tuple[str, str, tuple[LayerCall, ...]], ...]:
        """Key, weight and calls of the layers whose parameters only these calls read."""
        return tuple((b.key, b.weight, b.calls) for b in self.layers if b.kind not in (ELEMENTWISE.name, COPIED.name))

    @cached_property
    def owned(self) -> frozenset[str]:
        """The parameters that only calls of their layers read."""
        keys = {key for key, _, _ in self.calls}
        return frozenset(name for block in self.layers if block.key in keys for name in block.names)

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
        """Convert a tree like params to one matrix per block, all in one type if the parameters have several."""
        self.validate(values)
        matrices = {block.key: block.matrix(values) for block in self.blocks}
        if not self.mixed:
            return matrices
        return {key: W.to(torch.promote_types(W.dtype, self.precision)) for key, W in matrices.items()}

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
        """Raise unless `values` has the names and shapes of params, and no tensor is sharded over ranks.

        Parameters may have another type than at the build: the model then runs in that type, and statistics, gradients
        and states have the types of the build.
        """
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
