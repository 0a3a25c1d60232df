"""Network in, statistics out: one forward, and a backward to activations only for each kind of label.

A single `vjp` with respect to zero taps is shared by the loss gradient and all Fisher draws; no weight gradient is
formed. Parameters without a layer get per-example gradients by `vmap`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vjp, vmap

from fisherfn import tree
from fisherfn.errors import EmptyBatchError, ShapeError, StructureError
from fisherfn.stats.functional import run
from fisherfn.stats.intercept import Intercept, Taps
from fisherfn.stats.labels import fisher_cotangents, loss_cotangent
from fisherfn.stats.layout import Block, Layout
from fisherfn.types import Model, PyTree, Tap, Tree


class LayerStats(NamedTuple):
    """A layer's raw statistics, one tensor a use. `()` where they were not asked for."""

    inputs: tuple[Tensor, ...]
    """`[N, …]`, as the layer saw them (a convolution's are not unfolded)."""
    grads: tuple[Tensor, ...]
    """`[S, N, …]`: output-gradients of the Fisher's draws."""
    loss_grads: tuple[Tensor, ...]
    """`[N, …]`: output-gradients of the data's loss, `N · ∂(mean loss)/∂output`."""


@dataclass(frozen=True)
class Stats:
    """What one batch says: loss, gradient and curvature statistics. A pytree; the layout is its static part."""

    loss: Float[Tensor, ""]
    """Mean negative log-likelihood over the batch."""
    outputs: Tensor
    context: PyTree
    layers: dict[str, LayerStats]
    checks: dict[str, Tensor]
    layout: Layout

    @property
    def examples(self) -> int:
        return int(self.outputs.shape[0])

    @property
    def taps(self) -> dict[str, Tap]:
        """Every block's tap of the Fisher's draws. Prefer `tap(key)` where one at a time will do."""
        return {block.key: self.tap(block.key) for block in self.layout.blocks}

    @property
    def grads(self) -> Tree:
        """The gradient of the mean loss, formed from the taps at each call: keep it if you need it twice."""
        return self.layout.tree({block.key: gradient(self.loss_tap(block.key)) for block in self.layout.blocks})

    def tap(self, key: str) -> Tap:
        """The block's tap of the Fisher's draws.

        Raises:
            StructureError: these statistics were made with `curvature=False`.
        """
        stats = self.layers[key]
        if not stats.grads:
            raise StructureError(
                f"block {key!r} has no Fisher draws: these statistics were made with curvature=False. "
                "Call ng.stats without it to update the curvature."
            )
        return make_tap(self.layout.block(key), stats.inputs, stats.grads)

    def loss_tap(self, key: str) -> Tap:
        """The block's tap of the data's own targets: one draw, whose mean over examples is the gradient."""
        stats = self.layers[key]
        return make_tap(self.layout.block(key), stats.inputs, tuple(g.unsqueeze(0) for g in stats.loss_grads))


def _flatten(stats: Stats) -> tuple[list[Any], Layout]:
    return [stats.loss, stats.outputs, stats.context, stats.layers, stats.checks], stats.layout


tree.register(Stats, _flatten, lambda children, layout: Stats(*children, layout))


def gradient(tap: Tap) -> Float[Tensor, "k o i"]:
    """The mean over examples of `Σ_s Σ_t g aᵀ`: the gradient, when the tap is a loss tap."""
    k, s, n, t, o = tap.g.shape
    g = tap.g.sum(1) if s > 1 else tap.g.squeeze(1)
    a = tap.a.to(g.dtype)
    return g.reshape(k, n * t, o).mT @ a.reshape(k, n * t, -1) / n


def make_tap(block: Block, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> Tap:
    """Raw statistics as `(a, g)`: uses are concatenated along the shared positions, the bias is a column of `a`."""
    rows = [
        _with_bias(block, use.biased, block.family.rows(x, use.facts))
        for use, x in zip(block.uses, inputs, strict=True)
    ]
    columns = [block.family.columns(g, use.facts) for use, g in zip(block.uses, grads, strict=True)]
    if len(rows) == 1:
        return Tap(rows[0], columns[0])
    return Tap(torch.cat(rows, 2), torch.cat(columns, 3))


def _with_bias(block: Block, biased: bool, a: Float[Tensor, "k n t i"]) -> Tensor:
    if block.bias is None:
        return a
    return torch.cat([a, a.new_full((*a.shape[:-1], 1), float(biased))], -1)


class Sources(NamedTuple):
    """Everything that turns outputs into labels: what `ng.stats` passes down to each chunk."""

    likelihood: object
    fisher: str
    curvature: bool


def collect(
    model: Model,
    layout: Layout,
    params: Tree,
    x: PyTree,
    y: Tensor,
    context: PyTree,
    noise: Tensor | None,
    labels: Sources,
) -> Stats:
    """Statistics of one batch (or chunk)."""
    outputs, pull, inputs, new_context = tapped_run(model, layout, params, x, context)
    loss_cot, nll = loss_cotangent(labels.likelihood, outputs, y)
    cots = None
    if labels.curvature and labels.fisher != "empirical":
        cots = fisher_cotangents(labels.likelihood, outputs, labels.fisher, noise)
    loss_grads = pull(loss_cot)
    grads = _pull_all(pull, cots)
    if layout.fallbacks:
        every = loss_cot.unsqueeze(0) if cots is None else torch.cat([loss_cot.unsqueeze(0), cots])
        singles = example_gradients(model, params, [b.weight for b in layout.fallbacks], x, context, every)
        ones = outputs.new_ones(outputs.shape[0])
        inputs |= {name: (ones,) for name in singles}
        loss_grads |= {name: (g[0],) for name, g in singles.items()}
        grads |= {name: (g[1:],) for name, g in singles.items()} if cots is not None else {}
    if labels.curvature and cots is None:
        grads = {name: tuple(g.unsqueeze(0) for g in per_use) for name, per_use in loss_grads.items()}
    layers = {b.key: LayerStats(inputs[b.weight], grads.get(b.weight, ()), loss_grads[b.weight]) for b in layout.blocks}
    loss = nll.mean()
    checks = {
        "inputs": _finite_inputs(x),
        "targets": _valid(labels.likelihood, outputs, y),
        "loss": torch.isfinite(loss),
    }
    return Stats(loss, outputs, new_context, layers, checks, layout)


def tapped_run(
    model: Model, layout: Layout, params: Tree, x: PyTree, context: PyTree
) -> tuple[Tensor, Callable[[Tensor], Taps], Taps, PyTree]:
    """One forward: outputs, the pullback to every layer's output, the layers' raw inputs and the new context."""

    def forward(taps: Taps) -> tuple[Tensor, tuple[Taps, PyTree]]:
        with Intercept(params, taps) as mode:
            outputs, new_context = run(model, params, x, context)
        seen = {name: tuple(record.call.input for record in records) for name, records in mode.records.items()}
        return outputs, (seen, new_context)

    taps = _zero_taps(layout, tree.leaves(params)[0], tree.leaves(x)[0].shape[0])
    outputs, pull, (inputs, new_context) = vjp(forward, taps, has_aux=True)
    for block in layout.layers:
        if len(inputs.get(block.weight, ())) != len(block.uses):
            raise StructureError(
                f"layer {block.key!r} was used {len(inputs.get(block.weight, ()))} times, {len(block.uses)} at the build: "
                "the model's path depends on its input. Build with inputs that take the same path."
            )
    return outputs, lambda cotangent: pull(cotangent.to(outputs.dtype))[0], inputs, new_context


def example_gradients(
    model: Model, params: Tree, names: Sequence[str], x: PyTree, context: PyTree, cotangents: Float[Tensor, "r n *d"]
) -> dict[str, Float[Tensor, "r n *shape"]]:
    """Per-example gradients of some parameters for each row of cotangents, by `vmap` over single-example runs."""
    chosen = {name: params[name] for name in names}

    def single(x_n: PyTree, cots_n: Tensor) -> Tree:
        def forward(sub: Tree) -> Tensor:
            outputs, _ = run(model, {**params, **sub}, tree.map(lambda leaf: leaf.unsqueeze(0), x_n), context)
            return outputs.squeeze(0)

        _, pull = vjp(forward, chosen)
        return vmap(lambda cot: pull(cot)[0])(cots_n)  # type: ignore[no-any-return]

    return vmap(single, in_dims=(0, 1), out_dims=1)(x, cotangents)  # type: ignore[no-any-return]


def join(parts: Sequence[tuple[int, Stats]]) -> Stats:
    """Statistics of chunks, each with its number of examples, as those of the whole batch."""
    sizes, chunks = zip(*parts, strict=True)
    first = chunks[0]
    if len(chunks) == 1:
        return first  # type: ignore[no-any-return]
    total = sum(sizes)
    loss = sum(size / total * chunk.loss for size, chunk in parts)
    layers = {
        key: LayerStats(
            *(_cat([chunk.layers[key][field] for chunk in chunks], axis) for field, axis in enumerate((0, 1, 0)))
        )
        for key in first.layers
    }
    checks = {name: torch.stack([chunk.checks[name] for chunk in chunks]).all() for name in first.checks}
    outputs = torch.cat([chunk.outputs for chunk in chunks])
    return Stats(loss, outputs, chunks[-1].context, layers, checks, first.layout)


def _cat(parts: Sequence[tuple[Tensor, ...]], axis: int) -> tuple[Tensor, ...]:
    return tuple(torch.cat(use, axis) for use in zip(*parts, strict=True))


def _zero_taps(layout: Layout, like: Tensor, examples: int) -> Taps:
    zero = like.new_zeros(())
    return {
        block.weight: tuple(zero.expand(examples, *use.output_shape) for use in block.uses) for block in layout.layers
    }


def _pull_all(pull: Callable[[Tensor], Taps], cots: Tensor | None) -> Taps:
    if cots is None:
        return {}
    if cots.shape[0] == 1:  # one plain backward is cheaper than a vmapped one
        return {name: tuple(g.unsqueeze(0) for g in uses) for name, uses in pull(cots[0]).items()}
    return vmap(pull)(cots)  # type: ignore[no-any-return]


def _finite_inputs(x: PyTree) -> Tensor:
    return tree.finite([leaf for leaf in tree.leaves(x) if leaf.is_floating_point()])


def _valid(likelihood: object, outputs: Tensor, y: Tensor) -> Tensor:
    valid = getattr(likelihood, "valid", None)
    if valid is not None:
        return valid(outputs, y)  # type: ignore[no-any-return]
    return torch.isfinite(y).all() if isinstance(y, Tensor) and y.is_floating_point() else torch.tensor(True)


def check_batch(layout: Layout, x: PyTree, y: PyTree) -> int:
    """Raise unless the batch fits the trace; returns its number of examples."""
    inputs = tree.leaves(x)
    shapes = tuple(leaf.shape[1:] for leaf in inputs)
    if shapes != layout.input_shapes or any(leaf.ndim == 0 for leaf in inputs):
        raise ShapeError(
            f"the batch's examples have shape {[tuple(s) for s in shapes]}, traced with "
            f"{[tuple(s) for s in layout.input_shapes]}. Reshape the inputs, or build natural_gradient with such examples."
        )
    sizes = {
        leaf.shape[0] for leaf in [*inputs, *(leaf for leaf in tree.leaves(y) if isinstance(leaf, Tensor))] if leaf.ndim
    }
    if len(sizes) != 1:
        raise ShapeError(f"inputs and targets differ in their number of examples: {sorted(sizes)}.")
    examples = sizes.pop()
    if examples == 0:
        raise EmptyBatchError("the batch has no examples: its mean does not exist. Skip empty batches.")
    return int(examples)
