"""Runs of the model that give statistics: one of the whole batch with taps, and one per example.

A single `vjp` with respect to zero taps serves the loss gradient and all Fisher samples; no weight gradient is
formed. Parameters without a layer get per-example gradients by `vmap`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vjp, vmap

from fisherfn import tree
from fisherfn.errors import StructureError
from fisherfn.stats.functional import call, run
from fisherfn.stats.intercept import Intercept, Taps
from fisherfn.stats.layout import Layout
from fisherfn.stats.shared import Followed
from fisherfn.types import Model, PyTree, Tree


def tapped_run(
    model: Model, layout: Layout, params: Tree, x: PyTree, context: PyTree, uncoupled: bool = False
) -> tuple[Tensor, Callable[[Tensor], Taps], Taps, PyTree]:
    """Run the model once; return outputs, the pullback to the layers' outputs, the layers' raw inputs, the new context.

    The pullback also returns the gradient, summed over the examples, of parameters that take the plain gradient.
    Inputs and output-gradients have the examples on the first axis, whichever axis the layer has them on.
    """
    examples = tree.leaves(x)[0].shape[0]

    # vjp gets one flat list of tensors: traversing trees of them takes as long as the layers of a small net
    def forward(*primals: Tensor) -> tuple[Tensor, tuple[list[Tensor], PyTree]]:
        shared, taps = Followed(layout.plan), primals[: len(zeros)]
        values = {**params, **dict(zip(plain, primals[len(zeros) :], strict=True))}
        with Intercept(values, _by_layer(layout, taps), uncoupled, shared) as mode:
            outputs, new_context = call(model, values, x, context)
        shared.finish()
        return outputs, (_inputs(layout, mode, examples), new_context)

    plain = [name for name, _ in layout.uncovered]
    like, uses = tree.leaves(params)[0], (use for block in layout.layers for use in block.uses)
    zero = cache(lambda dtype: like.new_zeros((), dtype=dtype))
    zeros = [zero(use.dtype).expand(use.full_shape(examples)) for use in uses]
    primals = (*zeros, *(params[name] for name in plain))
    outputs, pull, (inputs, new_context) = vjp(forward, *primals, has_aux=True)  # type: ignore[misc]

    def pull_examples_first(cotangent: Tensor) -> Taps:
        pulled = pull(cotangent.to(outputs.dtype))
        summed = {name: (g,) for name, g in zip(plain, pulled[len(zeros) :], strict=True)}
        return _examples_first(layout, pulled[: len(zeros)]) | summed

    return outputs, pull_examples_first, _examples_first(layout, inputs), new_context


def pull_all(pull: Callable[[Tensor], Taps], cotangents: Float[Tensor, "s n *d"]) -> Taps:
    """Pull several cotangents back, `[S, N, …]` to `[S, …]` per tap; without cotangents the result is empty."""
    if cotangents.shape[0] == 0:
        return {}
    if cotangents.shape[0] == 1:  # one plain backward is cheaper than a vmapped one
        return {name: tuple(g.unsqueeze(0) for g in uses) for name, uses in pull(cotangents[0]).items()}
    pulled: Taps = vmap(pull)(cotangents)
    return pulled


def _inputs(layout: Layout, mode: Intercept, examples: int) -> list[Tensor]:
    """Return the inputs of every use of every layer; raise if a layer was not used as often as at the build."""
    for block in layout.layers:
        uses = len(mode.records.get(block.weight, ()))
        if uses != len(block.uses):
            raise StructureError(
                f"layer {block.key!r} was used {uses} times, {len(block.uses)} at the build: the model's path depends "
                "on its input. Build with inputs that take the same path."
            )
    return [record.input(examples) for block in layout.layers for record in mode.records[block.weight]]


def _by_layer(layout: Layout, flat: Sequence[Tensor]) -> Taps:
    """Group tensors, given in the order of layers and their uses, by the name of the weight."""
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
    """Compute per-example gradients of some parameters for each row of cotangents, by runs on single examples.

    All examples share one run under `torch.vmap`; if the layout says that the model does not allow this, they are run
    one after another.
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
        # row by row: under a second vmap, torch's backward of some functions (prelu) is wrong
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
