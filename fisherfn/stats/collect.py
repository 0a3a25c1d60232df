"""Network in, statistics out: one forward, and a backward to activations only for each kind of label.

A single `vjp` with respect to zero taps is shared by the loss gradient and all Fisher draws; no weight gradient is
formed. Parameters without a layer get per-example gradients by `vmap`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vjp, vmap

from fisherfn import tree
from fisherfn.errors import EmptyBatchError, ShapeError, StructureError, expect
from fisherfn.stats.border import border
from fisherfn.stats.functional import call, run
from fisherfn.stats.intercept import Intercept, Taps
from fisherfn.stats.labels import fisher_cotangents, loss_cotangent
from fisherfn.stats.layout import Layout
from fisherfn.stats.shared import Followed
from fisherfn.stats.statistics import LayerStats, Stats
from fisherfn.types import Model, PyTree, Tree


class Sources(NamedTuple):
    """Everything that turns outputs into labels: what `ng.stats` passes down to each chunk."""

    likelihood: object
    fisher: str
    curvature: bool


@border()
def collect(
    model: Model,
    layout: Layout,
    params: Tree,
    x: PyTree,
    y: Any,
    noise: Tensor | None,
    context: PyTree,
    labels: Sources,
) -> Stats:
    """Statistics of one batch (or chunk)."""
    outputs, pull, inputs, new_context = tapped_run(model, layout, params, x, context)
    loss_cot, nll = loss_cotangent(labels.likelihood, outputs, y)
    cots = _fisher_rows(labels, outputs, y, loss_cot, noise)
    loss_grads, grads = pull(loss_cot), _pull_all(pull, cots)
    plain = {name: loss_grads.pop(name)[0] / outputs.shape[0] for name, _ in layout.uncovered}
    if layout.fallbacks:
        names = [block.weight for block in layout.fallbacks]
        singles = example_gradients(model, layout, params, names, x, context, torch.cat([loss_cot.unsqueeze(0), cots]))
        inputs |= dict.fromkeys(names, (outputs.new_ones(outputs.shape[0]),))
        loss_grads |= {name: (g[0],) for name, g in singles.items()}
        grads |= {name: (g[1:],) for name, g in singles.items()}
    if labels.curvature and labels.fisher == "empirical":  # the data's own targets: the same backward serves
        grads = {name: tuple(g.unsqueeze(0) for g in uses) for name, uses in loss_grads.items()}
    if not labels.curvature:
        grads = dict.fromkeys(loss_grads, ())
    layers = {b.key: LayerStats(inputs[b.weight], grads[b.weight], loss_grads[b.weight]) for b in layout.blocks}
    loss = nll.mean()
    checks = {
        "inputs": tree.finite_inputs(
            [loss.new_zeros(()), *(leaf for leaf in tree.leaves(x) if leaf.is_floating_point())]
        ),
        "targets": _valid(labels.likelihood, outputs, y),
        "loss": torch.isfinite(loss),
    }
    if plain:
        checks["gradient"] = tree.finite(plain)
    return Stats(loss, outputs, new_context, layers, checks, layout, plain)


def tapped_run(
    model: Model, layout: Layout, params: Tree, x: PyTree, context: PyTree, uncoupled: bool = False
) -> tuple[Tensor, Callable[[Tensor], Taps], Taps, PyTree]:
    """One forward: outputs, the pullback to every layer's output, the layers' raw inputs and the new context.

    The pullback also gives the gradient of the parameters that take the plain one, summed over the examples.
    Inputs and output-gradients come with the examples first, wherever the layer has them.
    """
    examples = tree.leaves(x)[0].shape[0]

    # one flat list of tensors goes through vjp: walking trees of them costs a small net as much as its layers
    def forward(*primals: Tensor) -> tuple[Tensor, tuple[list[Tensor], PyTree]]:
        shared, taps = Followed(layout.plan), primals[: len(zeros)]
        values = {**params, **dict(zip(plain, primals[len(zeros) :], strict=True))}
        with Intercept(values, _by_layer(layout, taps), uncoupled, shared) as mode:
            outputs, new_context = call(model, values, x, context)
        shared.finish()
        return outputs, (_inputs(layout, mode, examples), new_context)

    plain = [name for name, _ in layout.uncovered]
    zeros = _zero_taps(layout, tree.leaves(params)[0], examples)
    primals = (*zeros, *(params[name] for name in plain))
    outputs, pull, (inputs, new_context) = vjp(forward, *primals, has_aux=True)  # type: ignore[misc]

    def pull_examples_first(cotangent: Tensor) -> Taps:
        pulled = pull(cotangent.to(outputs.dtype))
        summed = {name: (g,) for name, g in zip(plain, pulled[len(zeros) :], strict=True)}
        return _examples_first(layout, pulled[: len(zeros)]) | summed

    return outputs, pull_examples_first, _examples_first(layout, inputs), new_context


def _inputs(layout: Layout, mode: Intercept, examples: int) -> list[Tensor]:
    """What every layer saw at every use."""
    for block in layout.layers:
        uses = len(mode.records.get(block.weight, ()))
        if uses != len(block.uses):
            raise StructureError(
                f"layer {block.key!r} was used {uses} times, {len(block.uses)} at the build: the model's path depends "
                "on its input. Build with inputs that take the same path."
            )
    return [record.input(examples) for block in layout.layers for record in mode.records[block.weight]]


def _by_layer(layout: Layout, flat: Sequence[Tensor]) -> Taps:
    """Tensors in the order of layers and their uses, by weight."""
    each = iter(flat)
    return {block.weight: tuple(next(each) for _ in block.uses) for block in layout.layers}


def _examples_first(layout: Layout, flat: Sequence[Tensor]) -> Taps:
    uses = (use for block in layout.layers for use in block.uses)
    return _by_layer(layout, [use.examples_first(x) for use, x in zip(uses, flat, strict=True)])


def example_gradients(
    model: Model,
    layout: Layout,
    params: Tree,
    names: Sequence[str],
    x: PyTree,
    context: PyTree,
    cotangents: Float[Tensor, "r n *d"],
) -> dict[str, Float[Tensor, "r n *shape"]]:
    """Per-example gradients of some parameters for each row of cotangents, by runs on single examples.

    These are one run under `torch.vmap`, or one after another where the layout says that the model has no such run.
    """
    chosen = {name: params[name] for name in names}
    leaves, by_example = tree.leaves(context), layout.by_example(context)

    def single(x_n: PyTree, own_n: list[Tensor], cots_n: Tensor) -> Tree:
        own = iter(own_n)
        of_one = [next(own).unsqueeze(0) if mine else leaf for leaf, mine in zip(leaves, by_example, strict=True)]

        def forward(sub: Tree) -> Tensor:
            one = tree.map(lambda leaf: leaf.unsqueeze(0), x_n)
            outputs: Tensor = run(model, {**params, **sub}, one, tree.replace_leaves(context, of_one))[0]
            return outputs.squeeze(0)

        _, pull = vjp(forward, chosen)  # type: ignore[misc]
        # row by row: under a second vmap torch's backward of some functions (prelu) is wrong
        rows: Tree = tree.map(lambda *each: torch.stack(each), *(pull(cot)[0] for cot in cots_n))
        return rows

    own = [leaf for leaf, mine in zip(leaves, by_example, strict=True) if mine]
    if layout.one_by_one:
        alone = [tree.map(lambda leaf, n=n: leaf[n], (x, own)) for n in range(cotangents.shape[1])]
        each = [single(x_n, own_n, cotangents[:, n]) for n, (x_n, own_n) in enumerate(alone)]
        one_by_one: Tree = tree.map(lambda *parts: torch.stack(parts, 1), *each)
        return one_by_one
    gradients: Tree = vmap(single, in_dims=(0, 0, 1), out_dims=1)(x, own, cotangents)
    return gradients


def _zero_taps(layout: Layout, like: Tensor, examples: int) -> list[Tensor]:
    uses = (use for block in layout.layers for use in block.uses)
    return [like.new_zeros((), dtype=use.dtype).expand(use.full_shape(examples)) for use in uses]


def _fisher_rows(labels: Sources, outputs: Tensor, y: Any, loss_cot: Tensor, noise: Tensor | None) -> Tensor:
    """Cotangents beside the loss's own, `[S, N, …]`: none where the loss's serves, or where none are wanted."""
    if not labels.curvature or labels.fisher == "empirical":
        return loss_cot.new_empty((0, *loss_cot.shape))
    return fisher_cotangents(labels.likelihood, outputs, y, labels.fisher, noise)


def _pull_all(pull: Callable[[Tensor], Taps], cots: Tensor) -> Taps:
    if cots.shape[0] == 0:
        return {}
    if cots.shape[0] == 1:  # one plain backward is cheaper than a vmapped one
        return {name: tuple(g.unsqueeze(0) for g in uses) for name, uses in pull(cots[0]).items()}
    pulled: Taps = vmap(pull)(cots)
    return pulled


def _valid(likelihood: object, outputs: Tensor, y: Any) -> Tensor:
    valid: Callable[[Tensor, Any], Tensor] | None = getattr(likelihood, "valid", None)
    if valid is not None:
        return valid(outputs, y)
    return tree.finite(
        [outputs.new_zeros(()), *(t for t in tree.leaves(y) if torch.is_tensor(t) and t.is_floating_point())]
    )


def check_batch(layout: Layout, x: PyTree, y: PyTree, context: PyTree = None) -> int:
    """Raise unless the batch (and what the context has for each example) fits the trace; its number of examples."""
    inputs = tree.leaves(x)
    for leaf in inputs:
        expect(leaf, Tensor, "an input", "pass tensors with a leading axis of examples")
    shapes = tuple(leaf.shape[1:] for leaf in inputs)
    if shapes != layout.input_shapes or any(leaf.ndim == 0 for leaf in inputs):
        raise ShapeError(
            f"the batch's examples have shape {[tuple(s) for s in shapes]}, traced with "
            f"{[tuple(s) for s in layout.input_shapes]}. Reshape the inputs, or build natural_gradient with their like."
        )
    sizes = {
        leaf.shape[0] for leaf in [*inputs, *(leaf for leaf in tree.leaves(y) if isinstance(leaf, Tensor))] if leaf.ndim
    }
    pairs = [] if context is None else zip(tree.leaves(context), layout.by_example(context), strict=True)
    own = {leaf.shape[0] for leaf, mine in pairs if mine}
    if len(sizes) == 1 and not own <= sizes:
        raise ShapeError(
            f"the context has entries for {sorted(own)} examples (dropout noise?), the batch has {sorted(sizes)}: draw "
            "them for this batch."
        )
    if len(sizes) != 1:
        raise ShapeError(f"inputs and targets differ in their number of examples: {sorted(sizes)}.")
    examples = sizes.pop()
    if examples == 0:
        raise EmptyBatchError("the batch has no examples: its mean does not exist. Skip empty batches.")
    return int(examples)
