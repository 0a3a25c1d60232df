r"""One matrix as embedding and output layer: $x = W e_j$ at the input, $s = W^\top h$ at the output, W of `[E, V]`.

The output layer's gradient in this matrix is $\sum_t h_t \delta_t^\top$ with $\delta$ its output-gradient: input and
output-gradient have changed places. So its rows are $a = \delta$ and its columns $g = h$. An output-gradient differs
from draw to draw and a row may not, so each draw's positions are positions of their own, at which the columns of every
other draw are zero. The per-example gradients are exact, and no `[N, V, E]` is formed.

A product is the same if a row is scaled by c and its column by 1/c. c makes the columns of both uses equally long on
average; without it, Kronecker methods would multiply the one's large inputs with the other's large inputs.

Input of the first use `[N, *T]` of integers, of the second `[N, *T, E]`; weight `[V, E]`.
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
"""The families of the two uses."""


def rows(x: Tensor, config: Any) -> structures.Rows:
    """The rows of the embedding; those of the output layer before the change of places."""
    return embedding.rows(x, config) if isinstance(config, embedding.Config) else LINEAR.rows(x, config)


def swapped_rows(delta: Float[Tensor, "1 s n t v"], scale: Tensor | float) -> Float[Tensor, "1 n st v"]:
    """Rows of the output layer in the embedding's matrix: its output-gradients, position by position of each draw."""
    return delta.movedim(1, 2).flatten(2, 3) * scale


def swapped_columns(h: Float[Tensor, "1 n t e"], draws: int, scale: Tensor | float) -> Float[Tensor, "1 s n st e"]:
    """Columns of the output layer in the embedding's matrix: its inputs, each at the positions of its own draw."""
    if draws == 1:
        return (h / scale).unsqueeze(1)
    own = torch.eye(draws, dtype=h.dtype, device=h.device)
    return torch.einsum("sr,knte->ksnrte", own, h / scale).flatten(3, 4)


def balance(h: Float[Tensor, "..."], g: Float[Tensor, "s ..."]) -> Float[Tensor, ""]:
    """The scale c: inputs h of the output layer against output-gradients g of the embedding, in the mean square."""
    squares = h.square().mean(), g.square().sum(0).mean()
    usable = (squares[0] > 0) & (squares[1] > 0)
    ratio = torch.where(usable, squares[0] / torch.where(usable, squares[1], 1.0), 1.0)
    return ratio.sqrt()


def to_matrix(weight: Float[Tensor, "v e"], config: Any) -> Float[Tensor, "1 e v"]:
    return weight.mT.unsqueeze(0)


def from_matrix(matrix: Float[Tensor, "1 e v"], config: Any) -> Float[Tensor, "v e"]:
    return matrix.squeeze(0).mT


def weight_gradient(x: Tensor, g: Tensor, config: Any, shape: Size) -> Float[Tensor, "v e"]:
    """Each use's in its own way: the one by index, the other as a product."""
    if isinstance(config, embedding.Config):
        columns_of = columns(g.unsqueeze(0), config).squeeze(1)
        return from_matrix(structures.outer(columns_of, structures.cast(rows(x, config), g.dtype)), config)
    return g.reshape(-1, shape[0]).mT @ x.reshape(-1, shape[1])


TIED = Family(
    "tied embedding", (), lambda function, args, kwargs: None, rows, columns, to_matrix, from_matrix, weight_gradient
)
