"""Gradients of single examples, for parameters that no layer covers: by runs of one example each, under `vmap`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vjp, vmap

from fisherfn import tree
from fisherfn.stats.functional import run
from fisherfn.stats.layout import Layout
from fisherfn.types import Model, PyTree, Tree


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
