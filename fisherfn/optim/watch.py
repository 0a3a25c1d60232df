r"""The empirical Fisher from the user's own forward and backward pass.

While the module is watched, a zero leaf is added to the output of every layer call. After `loss.backward()` the `.grad`
of this leaf is the output-gradient. Nothing runs twice, and the module keeps no hook. Let $L$ be the loss on which
`backward` was called: the mean over the N watched examples (`reduction="mean"`) or their sum. Then the `g` of a tap is

$$g_n = N\,\frac{\partial L}{\partial s_n} \quad\text{or}\quad g_n = \frac{\partial L}{\partial s_n}.$$
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisherfn.errors import ShapeError, StructureError
from fisherfn.layers import Call
from fisherfn.randomness import draws_globally
from fisherfn.stats import Block, LayerStats, Layout, Stats
from fisherfn.stats.blocks import Use
from fisherfn.stats.chunks import join
from fisherfn.stats.intercept import Intercept
from fisherfn.stats.shared import Followed
from fisherfn.stats.steps import Plan
from fisherfn.stats.swap import versions

REDUCTIONS = ("mean", "sum")


class Seen(NamedTuple):
    """A call of a layer: its input, and the zero leaf added to its output.

    If the input has no example axis, both are those of each example's copy. `versions` counts how often the input had
    been changed in place when the layer read it.
    """

    input: Tensor
    leaf: Tensor
    versions: list[int]

    def kept(self, block: Block) -> Tensor:
        """Return the input; raise if the memory that the layer has read holds other numbers by now."""
        if versions(self.input) != self.versions:
            raise StructureError(
                f"an input of layer {block.key!r} was changed in place between `with watch()` and step(), for example "
                "a buffer that is filled with the next batch, or a parameter that another optimizer has stepped: "
                "change it after step(), or run the net on x.clone()."
            )
        return self.input


class Pass(NamedTuple):
    """One forward pass.

    Attributes:
        calls: the calls of each layer by weight name.
        reduction: whether the loss is a mean over examples or a sum.
        scale: the factor that the gradient scaler has put on the loss.
        layout: the layers for the shape of its examples.
        known: True if this is the shape of its inputs; otherwise it is that of the first build.
        examples: the number of its examples, or None if only its layers tell.
    """

    calls: Mapping[str, Sequence[Seen]]
    reduction: str
    scale: float
    layout: Layout
    known: bool
    examples: int | None

    @property
    def used(self) -> bool:
        """True if there was a backward pass."""
        return any(seen.leaf.grad is not None for calls in self.calls.values() for seen in calls)

    @property
    def moves(self) -> bool:
        """True if the loss of the pass had a gradient that is not zero."""
        leaves = (seen.leaf.grad for calls in self.calls.values() for seen in calls)
        return any(grad is not None and bool(grad.any()) for grad in leaves)


class Watched:
    """A recorder for `Intercept`: keeps the layer calls of a running module whose parameters are leaves of autograd."""

    def __init__(self, params: Mapping[str, Tensor], begun: Callable[[Tensor], None]) -> None:
        """Create a recorder; `begun` is called in the backward pass by every leaf, before its gradient is stored."""
        self._params, self._begun = dict(params), begun
        self._seen: dict[str, dict[int, Seen]] = {}

    def run(self, plan: Plan) -> Intercept:
        """Return the mode in which the module runs."""
        return Intercept(self._params, taps={}, shared=Followed(plan), recorder=self)

    @property
    def calls(self) -> dict[str, list[Seen]]:
        """The uses of each layer, in order."""
        return {name: [uses[use] for use in sorted(uses)] for name, uses in self._seen.items()}

    def admit(self, func: Any, args: Any, kwargs: Any, followed: Followed | None) -> None:
        """Admit every call of the user's own pass, with dropout from the global generator, unless copies would differ.

        Raises:
            StructureError: random numbers for a tensor that all examples share.
        """
        if followed is not None and draws_globally(func, args, kwargs) and followed.among(args, kwargs):
            raise StructureError(
                f"the model calls {func.__name__} on a tensor that all examples share (a table of positions, a "
                "weight), whose copies for each example would be masked in different ways while watched: pass the "
                "batch to step((x, y)) instead, or call net.eval()."
            )

    def tapped(self, name: str, use: int, x: Tensor, output: Tensor, call: Call | None) -> Tensor:
        """Add a leaf to the output of a layer, and note the call."""
        dtype = torch.promote_types(output.dtype, self._params[name].dtype)
        leaf = torch.zeros((), dtype=dtype, device=output.device).expand(output.shape).requires_grad_()
        leaf.register_hook(self._begun)
        self._seen.setdefault(name, {})[use] = Seen(x.detach(), leaf, versions(x))
        return output + leaf.to(output.dtype)


def statistics(passes: Sequence[Pass]) -> Stats:
    """Join the watched passes to the statistics of one batch.

    Raises:
        StructureError: a pass had no backward pass, or the module did not run exactly once in it.
        ShapeError: shapes differ from the build.
    """
    sizes = [_examples(each) for each in passes]
    if any(each.layout != passes[0].layout for each in passes):
        raise ShapeError(
            "the passes watched before this step have examples of different shapes (sequences of other lengths?): take "
            "a step after each of them, or pad them to one length."
        )
    return join([_part(each, size, sum(sizes)) for each, size in zip(passes, sizes, strict=True)])


def _examples(each: Pass) -> int:
    """Return the number of examples of a pass."""
    for block in each.layout.layers:
        found = len(each.calls.get(block.weight, ()))
        if found != len(block.uses):
            raise StructureError(
                f"layer {block.key!r} was used {found} times while watched, {len(block.uses)} at the build: run the "
                "net exactly once in each `with watch()`, on inputs that take the same path as at the build, neither "
                "compiled nor through a copy."
            )
    if not each.used:
        raise StructureError(
            "the watched pass had no backward pass: call loss.backward() before step(), on a loss of the outputs "
            "that the net returned inside `with watch()`."
        )
    if each.examples is not None:
        return each.examples
    if not each.known and any(use.repeats > 1 for block in each.layout.layers for use in block.uses):
        raise StructureError(
            "the net merges examples and positions, and was not called itself while watched, so that the number of "
            "examples is unknown: call the module that the optimizer was given, net(x), with inputs like those of the "
            "build, or pass them, watch(x)."
        )
    block = each.layout.layers[0]
    return int(each.calls[block.weight][0].input.shape[block.uses[0].axis]) // block.uses[0].repeats


def _part(each: Pass, examples: int, total: int) -> Stats:
    factor = (total if each.reduction == "mean" else 1) / each.scale
    layers = {block.key: _layer(block, each, examples, factor) for block in each.layout.blocks}
    nothing = torch.full((), torch.nan)  # neither the loss nor the outputs are known
    return Stats(nothing, nothing.reshape(1), (), layers, {}, each.layout, losses=nothing.reshape(1))


def _layer(block: Block, each: Pass, examples: int, factor: float) -> LayerStats:
    calls = list(zip(block.uses, each.calls[block.weight], strict=True))
    inputs = tuple(use.examples_first(seen.kept(block)) for use, seen in calls)
    grads = tuple(factor * use.examples_first(_gradient(block, use, seen, examples)) for use, seen in calls)
    return LayerStats(inputs, tuple(g.unsqueeze(0) for g in grads), grads)


def _gradient(block: Block, use: Use, seen: Seen, examples: int) -> Tensor:
    if seen.leaf.shape != use.full_shape(examples):
        raise ShapeError(
            f"layer {block.key!r} had outputs {list(seen.leaf.shape)} while watched, expected "
            f"{list(use.full_shape(examples))}, as at the build for {examples} examples: call the module that the "
            "optimizer was given, net(x), inside watch, or pass its inputs, watch(x)."
        )
    # a use that the loss does not depend on has none
    return torch.zeros_like(seen.leaf) if seen.leaf.grad is None else seen.leaf.grad.detach().to(use.dtype)
