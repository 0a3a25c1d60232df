r"""One matrix as embedding and output layer: $x = W e_j$ at the input, $s = W^\top h$ at the output, W of `[E, V]`.

The output layer's gradient with respect to this matrix is $\sum_t h_t \delta_t^\top$, with $\delta$ its
output-gradient: input and output-gradient swap roles, so its rows are $a = \delta$ and its columns $g = h$.
Output-gradients differ between samples, but rows must not. Each sample therefore gets its own positions, at which the
columns of all other samples are zero. The per-example gradients are exact, and no `[N, V, E]` is formed.

The product does not change if a row is scaled by c and its column by 1/c. We choose c so that the columns of both uses
have the same mean square; otherwise Kronecker methods would multiply the large inputs of one use by those of the other.

The input of the first use is `[N, *T]` integers, that of the second `[N, *T, E]`; the weight is `[V, E]`.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Size, Tensor

from fisherfn import rows as structures
from fisherfn.layers import embedding
from fisherfn.layers.base import Family
from fisherfn.layers.embedding import EMBEDDING
from fisherfn.layers.linear import LINEAR, columns

KINDS = {EMBEDDING.name, LINEAR.name}
"""The names of the families of the two uses."""


def rows(x: Tensor, config: Any) -> structures.Rows:
    """Return the rows of the embedding, or those of the output layer before the roles are swapped."""
    return embedding.rows(x, config) if isinstance(config, embedding.Config) else LINEAR.rows(x, config)


def swapped_rows(delta: Float[Tensor, "1 s n t v"], scale: Tensor | float) -> Float[Tensor, "1 n st v"]:
    """Return the output layer's rows in the embedding's matrix: its output-gradients, sample after sample."""
    return delta.movedim(1, 2).flatten(2, 3) * scale


def swapped_columns(h: Float[Tensor, "1 n t e"], draws: int, scale: Tensor | float) -> Float[Tensor, "1 s n st e"]:
    """Return the output layer's columns in the embedding's matrix: its inputs, at the positions of each sample."""
    if draws == 1:
        return (h / scale).unsqueeze(1)
    own = torch.eye(draws, dtype=h.dtype, device=h.device)
    return torch.einsum("sr,knte->ksnrte", own, h / scale).flatten(3, 4)


def balance(h: Float[Tensor, "..."], g: Float[Tensor, "s ..."]) -> Float[Tensor, ""]:
    """Return the scale c: the output layer's inputs h / c get the mean square of the embedding's output-gradients g."""
    return ratio(*squares(h, g))


def squares(h: Float[Tensor, "..."], g: Float[Tensor, "s ..."]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the mean squares of the output layer's inputs and of the embedding's output-gradients, summed over s."""
    return h.square().mean(), g.square().sum(0).mean()


def ratio(inputs: Float[Tensor, ""], grads: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return the scale of two mean squares; 1 if one of them is zero."""
    usable = (inputs > 0) & (grads > 0)
    return torch.where(usable, inputs / torch.where(usable, grads, 1.0), 1.0).sqrt()


def to_matrix(weight: Float[Tensor, "v e"], config: Any) -> Float[Tensor, "1 e v"]:
    return weight.mT.unsqueeze(0)


def from_matrix(matrix: Float[Tensor, "1 e v"], config: Any) -> Float[Tensor, "v e"]:
    return matrix.squeeze(0).mT


def weight_gradient(x: Tensor, g: Tensor, config: Any, shape: Size) -> Float[Tensor, "v e"]:
    """Compute the weight gradient of one use: by index for the embedding, as a product for the output layer."""
    if isinstance(config, embedding.Config):
        columns_of = columns(g.unsqueeze(0), config).squeeze(1)
        return from_matrix(structures.outer(columns_of, structures.cast(rows(x, config), g.dtype)), config)
    return g.reshape(-1, shape[0]).mT @ x.reshape(-1, shape[1])


TIED = Family(
    "tied embedding", (), lambda function, args, kwargs: None, rows, columns, to_matrix, from_matrix, weight_gradient
)
