"""Outputs of a model linearised in its parameters: their covariance, for parameters with a given covariance.

n example, c and d outputs, k group, o output, i input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jacrev, vmap

from fisherfn import tree
from fisherfn.stats.batch import checked_context, count_examples
from fisherfn.stats.border import border
from fisherfn.stats.functional import run
from fisherfn.stats.layout import Layout
from fisherfn.stats.singles import each_alone
from fisherfn.types import Model, PyTree, Tree

Covariances: TypeAlias = Mapping[str, Callable[[Float[Tensor, "k o i"]], Float[Tensor, "k o i"]]]
"""The product of each block's covariance with a matrix of the block."""


@border()
def output_covariances(
    model: Model,
    layout: Layout,
    params: Tree,
    covariances: Covariances,
    x: PyTree,
    context: PyTree,
    chunk_size: int | None,
) -> tuple[Tensor, Float[Tensor, "n c d"]]:
    """Return the outputs of each example, flat, and their covariance `J Σ Jᵀ` in float64.

    Each example is run alone, with its own entries of the context (dropout seeds).

    Raises:
        StructureError, ShapeError: examples or a context that differ from the build, or another number of entries.
        ModelError: a model that does not run on single examples (batch norm in training mode).
    """
    x, context = tree.plain(x), checked_context(layout, context)
    count_examples(layout, x, (), context)

    def of_one(x_n: PyTree, context_n: PyTree) -> tuple[Tensor, Tensor]:
        def outputs(p: Tree) -> tuple[Tensor, Tensor]:
            flat = run(model, p, x_n, context_n)[0].flatten()
            return flat, flat

        J, found = jacrev(outputs, has_aux=True)(params)
        rows = vmap(layout.matrices)({name: leaf.double() for name, leaf in J.items()})
        images = {key: vmap(covariance)(rows[key]) for key, covariance in covariances.items()}
        return found, torch.stack([rows[key].flatten(1) @ images[key].flatten(1).mT for key in images]).sum(0)

    return each_alone(of_one, layout, x, context, chunk_size=chunk_size)  # type: ignore[no-any-return]
