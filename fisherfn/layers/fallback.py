"""The layer of last resort: a parameter that no family claims, with its per-example gradient as `g` and `a = 1`.

The raw "input" is a column of ones, the raw "output-gradient" the per-example gradient `[S, N, *shape]`. A small
parameter is one dense block (K = 1, d_out = its size); a large one has a block per entry (K = its size, d_out = 1).
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Size, Tensor

from fisherfn.layers.base import Family

DENSE_UP_TO = 256
"""The size of the largest parameter with one dense block: its factor costs as much as a layer of this width."""


class Config(NamedTuple):
    shape: Size

    @property
    def dense(self) -> bool:
        return self.shape.numel() <= DENSE_UP_TO

    @property
    def form(self) -> str:
        """The form of the parameter's blocks, for the report."""
        return "one dense block" if self.dense else "a block for each entry"


Facts = Config
"""The name of `Config` in layouts saved before 0.1.0."""


def rows(ones: Float[Tensor, " n"], config: Config) -> Float[Tensor, "k n 1 1"]:
    groups = 1 if config.dense else config.shape.numel()
    return ones.reshape(1, -1, 1, 1).expand(groups, -1, 1, 1)


def columns(g: Float[Tensor, "s n *shape"], config: Config) -> Float[Tensor, "k s n 1 o"]:
    flat = g.reshape(1, g.shape[0], g.shape[1], 1, -1)
    return flat if config.dense else flat.transpose(0, 4)


def to_matrix(parameter: Float[Tensor, "*shape"], config: Config) -> Float[Tensor, "k o 1"]:
    return parameter.reshape(1, -1, 1) if config.dense else parameter.reshape(-1, 1, 1)


def from_matrix(matrix: Float[Tensor, "k o 1"], config: Config) -> Float[Tensor, "*shape"]:
    return matrix.reshape(config.shape)


FALLBACK = Family("fallback", (), lambda function, args, kwargs: None, rows, columns, to_matrix, from_matrix)
