r"""The empirical Fisher from the user's own forward and backward.

While watched, every layer call of the module gets a zero leaf added to its output; after `loss.backward()` the leaf's
`.grad` is the output-gradient. No hook is set, and nothing runs twice. With the loss that `backward` was called on
being $L$, the mean over the N watched examples (`reduction="mean"`) or their sum, a tap's `g` is

$$g_n = N\,\frac{\partial L}{\partial s_n} \quad\text{or}\quad g_n = \frac{\partial L}{\partial s_n}.$$
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor

from fisherfn.errors import ShapeError, StructureError
from fisherfn.stats import Block, LayerStats, Layout, Stats
from fisherfn.stats.chunks import join
from fisherfn.stats.intercept import Intercept
from fisherfn.stats.layout import Use
from fisherfn.stats.shared import Followed
from fisherfn.stats.steps import Plan

REDUCTIONS = ("mean", "sum")


class Seen(NamedTuple):
    """A layer's call: its input, the zero leaf that was added to its output, and what its family noted.

    `shared`: no example entered the call, so `input` and `leaf` are those of each example's copy.
    """

    input: Tensor
    leaf: Tensor
    facts: Any
    shared: bool


class Pass(NamedTuple):
    """One forward: every layer's calls by the weight's name, and what turns a leaf's `.grad` into `∂L/∂s`."""

    calls: Mapping[str, Sequence[Seen]]
    reduction: str
    scale: float

    @property
    def used(self) -> bool:
        """Whether a backward went through."""
        return any(seen.leaf.grad is not None for calls in self.calls.values() for seen in calls)


class Watch(Intercept):
    """Notes the layer calls of a module that runs by itself, its parameters being leaves of autograd."""

    def __init__(self, params: Mapping[str, Tensor], plan: Plan) -> None:
        self._seen: dict[str, dict[int, Seen]] = {}
        super().__init__(dict(params), taps={}, shared=Followed(plan))

    @property
    def calls(self) -> dict[str, list[Seen]]:
        """All uses of each layer, in order."""
        return {name: [uses[use] for use in sorted(uses)] for name, uses in self._seen.items()}

    def _refuse(self, func: Any, args: Any, kwargs: Any) -> None:
        """Nothing: the pass is the user's own, dropout from the global generator included."""

    def _tapped(self, name: str, use: int, x: Tensor, output: Tensor) -> Tensor:
        dtype = torch.promote_types(output.dtype, self._params[name].dtype)
        leaf = torch.zeros((), dtype=dtype, device=output.device).expand(output.shape).requires_grad_()
        records = self.records.get(name, [])
        shared = use >= len(records) or records[use].copies is not None
        facts = None if shared else records[use].call.facts
        self._seen.setdefault(name, {})[use] = Seen(x.detach(), leaf, facts, shared)
        return output + leaf.to(output.dtype)


def statistics(layout: Layout, passes: Sequence[Pass]) -> Stats:
    """All watched passes as the statistics of one batch: their examples side by side.

    Raises:
        StructureError: no backward went through a pass, or the module did not run once in it.
        ShapeError: other shapes than at the build.
    """
    sizes = [_examples(layout, each) for each in passes]
    layouts = [_as_seen(layout, each) for each in passes]
    if any(other != layouts[0] for other in layouts):
        raise ShapeError(
            "the passes watched before this step have examples of different shapes (sequences of other lengths?): make "
            "a step after each of them, or pad them to one length."
        )
    layout = layouts[0]
    return join([(n, _part(layout, each, sum(sizes))) for n, each in zip(sizes, passes, strict=True)])


def _as_seen(layout: Layout, each: Pass) -> Layout:
    """The layout for the example shapes of a pass: those of the build, or others (longer sequences) where one can tell.

    Rows that examples and positions share do not say how many of them are examples.
    """
    blocks = []
    for block in layout.blocks:
        seen = zip(block.uses, each.calls[block.weight], strict=True)
        uses = tuple(
            use if call.shared else use._replace(facts=call.facts, output_shape=_of_example(use, call))
            for use, call in seen
        )
        blocks.append(replace(block, uses=uses))
    changed = any(new.uses != old.uses for new, old in zip(blocks, layout.blocks, strict=True))
    merged = any(use.repeats > 1 for block in layout.blocks for use in block.uses)
    return replace(layout, blocks=tuple(blocks)) if changed and not merged else layout


def _of_example(use: Use, seen: Seen) -> Size:
    shape = seen.leaf.shape
    return Size((*shape[: use.axis], *shape[use.axis + 1 :]))


def _examples(layout: Layout, each: Pass) -> int:
    """How many examples a pass had."""
    for block in layout.layers:
        found = len(each.calls.get(block.weight, ()))
        if found != len(block.uses):
            raise StructureError(
                f"layer {block.key!r} was used {found} times while watched, {len(block.uses)} at the build: run the "
                "net once in each `with watch()`, on inputs that take the build's path, neither compiled nor through a "
                "copy of it."
            )
    if not each.used:
        raise StructureError(
            "no backward went through the watched pass: call loss.backward() before step(), on a loss of the outputs "
            "that the net gave inside `with watch()`."
        )
    block = layout.layers[0]
    return int(each.calls[block.weight][0].input.shape[block.uses[0].axis]) // block.uses[0].repeats


def _part(layout: Layout, each: Pass, total: int) -> Stats:
    factor = (total if each.reduction == "mean" else 1) / each.scale
    layers = {block.key: _layer(block, each, factor) for block in layout.blocks}
    nothing = torch.full((), torch.nan)  # neither the loss nor the outputs were seen
    return Stats(nothing, nothing.reshape(1), (), layers, {}, layout)


def _layer(block: Block, each: Pass, factor: float) -> LayerStats:
    calls = list(zip(block.uses, each.calls[block.weight], strict=True))
    inputs = tuple(use.examples_first(seen.input) for use, seen in calls)
    grads = tuple(factor * use.examples_first(_gradient(block, use, seen)) for use, seen in calls)
    return LayerStats(inputs, tuple(g.unsqueeze(0) for g in grads), grads)


def _gradient(block: Block, use: Use, seen: Seen) -> Tensor:
    found = _of_example(use, seen)
    if found != use.output_shape:
        raise ShapeError(
            f"layer {block.key!r} gave outputs {list(found)} an example while watched, {list(use.output_shape)} at the "
            "build: watch batches of the same example shape."
        )
    # a use that the loss does not depend on has none
    return torch.zeros_like(seen.leaf) if seen.leaf.grad is None else seen.leaf.grad.detach()
