"""Runs of single examples: for gradients of parameters that no layer covers, and for Jacobians of the outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vjp, vmap

from fisherfn import tree
from fisherfn.stats.functional import run
from fisherfn.stats.layout import Layout
from fisherfn.types import Model, PyTree, Tree


def each_alone(
    compute: Callable[..., PyTree],
    layout: Layout,
    x: PyTree,
    context: PyTree,
    *more: Tensor,
    chunk_size: int | None = None,
) -> PyTree:
    """Return `compute(x_n, context_n, *more_n)` of every example, stacked on the first axis.

    Inputs and context are those of a batch of one example: leaves of the context with one entry per example are sliced,
    the others are passed whole. All examples share one run under `torch.vmap`, or `chunk_size` at a time; if the layout
    says that the model does not allow this, they are run one after another.
    """
    leaves, by_example = tree.leaves(context), layout.by_example(context)
    own = [leaf for leaf, mine in zip(leaves, by_example, strict=True) if mine]

    def single(x_n: PyTree, own_n: list[Tensor], *more_n: Tensor) -> PyTree:
        each = iter(own_n)
        of_one = [next(each).unsqueeze(0) if mine else leaf for leaf, mine in zip(leaves, by_example, strict=True)]
        one = tree.map(lambda leaf: leaf.unsqueeze(0), x_n)
        return compute(one, tree.replace_leaves(context, of_one), *more_n)

    if layout.one_by_one:
        examples = range(tree.leaves(x)[0].shape[0])
        alone = [single(*tree.map(lambda leaf, n=n: leaf[n], (x, own, *more))) for n in examples]
        return tree.map(lambda *parts: torch.stack(parts), *alone)
    return vmap(single, chunk_size=chunk_size)(x, own, *more)


def example_gradients(
    model: Model,
    layout: Layout,
    params: Tree,
    names: Sequence[str],
    x: PyTree,
    context: PyTree,
    cotangents: Float[Tensor, "r n *d"],
) -> dict[str, Float[Tensor, "r n *shape"]]:
    """Compute per-example gradients of some parameters for each row of cotangents, by runs on single examples."""
    chosen = {name: params[name] for name in names}

    def single(x_n: PyTree, context_n: PyTree, cots_n: Tensor) -> Tree:
        def forward(sub: Tree) -> Tensor:
            outputs: Tensor = run(model, {**params, **sub}, x_n, context_n)[0]
            return outputs.squeeze(0)

        _, pull = vjp(forward, chosen)  # type: ignore[misc]
        # row by row: under a second vmap, torch's backward of some functions (prelu) is wrong
        rows: Tree = tree.map(lambda *each: torch.stack(each), *(pull(cot)[0] for cot in cots_n))
        return rows

    gradients: Tree = each_alone(single, layout, x, context, cotangents.movedim(1, 0))
    return tree.map(lambda g: g.movedim(0, 1), gradients)
