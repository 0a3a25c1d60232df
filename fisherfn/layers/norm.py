r"""Batch normalisation: the affine part $y_c = w_c \hat x_c + b_c$, one 1×1 layer (1×2 with bias) a channel.

The layer's input is the normalised $\hat x$, recomputed here from the same call; the normalisation itself has no
parameters. In training mode output-gradients are $N \cdot \partial(\text{mean loss})/\partial y$, cross-example terms
included (docs/conventions.md). Shapes `[N, C, *T]`; K = C groups, T positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fisherfn.layers.base import Call, Family

_ARGUMENTS = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


def couples_examples(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call mixes the examples of a batch, as batch norm in training mode does."""
    given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
    return function is F.batch_norm and bool(given.get("training", False))


def match(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    if function is not F.batch_norm:
        return None
    given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
    if given.get("weight") is None:
        return None
    training, eps = given.get("training", False), given.get("eps", 1e-5)
    # batch statistics are recomputed without the buffers, which the model's own call has already moved
    mean, var = (None, None) if training else (given["running_mean"], given["running_var"])
    normalised = F.batch_norm(given["input"], mean, var, training=training, eps=eps)
    return Call(normalised, given["weight"], given.get("bias"))


def rows(x: Float[Tensor, "n c *t"], facts: None) -> Float[Tensor, "c n positions 1"]:
    return x.reshape(x.shape[0], x.shape[1], -1).transpose(0, 1).unsqueeze(-1)


def columns(g: Float[Tensor, "s n c *t"], facts: None) -> Float[Tensor, "c s n positions 1"]:
    return g.reshape(*g.shape[:3], -1).permute(2, 0, 1, 3).unsqueeze(-1)


def to_matrix(weight: Float[Tensor, " c"], facts: None) -> Float[Tensor, "c 1 1"]:
    return weight.reshape(-1, 1, 1)


def from_matrix(matrix: Float[Tensor, "c 1 1"], facts: None) -> Float[Tensor, " c"]:
    return matrix.reshape(-1)


BATCH_NORM = Family("batch norm", match, rows, columns, to_matrix, from_matrix)
