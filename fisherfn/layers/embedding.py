r"""Embeddings: $s = W e_j$, a column of the matrix `[E, V]` for each index j; the one-hot row is stored as the index.

Input `[N, *T]` of integers, output `[N, *T, E]`, weight `[V, E]`. The row of the padding index, which gets no gradient
in torch, is zero. Calls with `max_norm` (which changes the weight) or `scale_grad_by_freq` are refused. The
result of `sparse` calls is the same: the gradient is made from indices and output-gradients, and is not sparse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from fisherfn.calls import bind
from fisherfn.errors import CoverageError
from fisherfn.layers.base import Call, Family
from fisherfn.layers.linear import columns
from fisherfn.rows import OneHot

_ARGUMENTS = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")


class Config(NamedTuple):
    width: int
    padding: int | None
    dtype: torch.dtype


Facts = Config
"""The name of `Config` in layouts saved before 0.1.0."""


_BAG = (
    "input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse", "per_sample_weights",
    "include_last_offset", "padding_idx",
)  # fmt: skip


def match(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    if function is not F.embedding:
        return None  # a bag is no layer of its own; see `refuse`
    given = bind(_ARGUMENTS, args, kwargs)
    if given.get("max_norm") is not None or given.get("scale_grad_by_freq"):
        return None  # see `refuse`
    weight, padding = given["weight"], given.get("padding_idx")
    width = weight.shape[0]
    return Call(given["input"], weight, None, Config(width, None if padding is None else padding % width, weight.dtype))


def refuse(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = bind(_ARGUMENTS if function is F.embedding else _BAG, args, kwargs)
    weight = given["weight"]
    frozen = isinstance(weight, torch.nn.Parameter) and not weight.requires_grad
    if given.get("scale_grad_by_freq") and not frozen:
        raise CoverageError(
            "the model divides an embedding's gradient by the counts of the indices in the batch (scale_grad_by_freq), "
            "which is the gradient of no loss: build the embedding without it."
        )
    if given.get("max_norm") is not None:
        raise CoverageError(
            "the model renormalises an embedding while it runs (max_norm), which changes the caller's parameters: "
            "drop max_norm and renormalise between steps."
        )


def rows(index: Int[Tensor, "n *t"], config: Config) -> OneHot:
    flat = index.long().reshape(1, index.shape[0], -1)
    if config.padding is not None:
        flat = torch.where(flat == config.padding, config.width, flat)
    return OneHot(flat, config.width, config.dtype)


def to_matrix(weight: Float[Tensor, "v e"], config: Config) -> Float[Tensor, "1 e v"]:
    return weight.mT.unsqueeze(0)


def from_matrix(matrix: Float[Tensor, "1 e v"], config: Config) -> Float[Tensor, "v e"]:
    return matrix.squeeze(0).mT


EMBEDDING = Family(
    "embedding", (F.embedding, F.embedding_bag), match, rows, columns, to_matrix, from_matrix,
    refuse=refuse, any_axis=True, one_hot=True,
)  # fmt: skip
