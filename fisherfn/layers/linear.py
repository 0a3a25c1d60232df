r"""Linear layers, also shared over a sequence: $s = W x + b$ at every position.

Input `[N, *T, d_in]`, output `[N, *T, d_out]`: all axes between the first and the last are shared positions
(weight sharing "expand", Eschenhagen et al. 2023, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fisherfn.calls import bind
from fisherfn.layers.base import Call, Family


def match(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    given = bind(("input", "weight", "bias"), args, kwargs)
    weight, bias = given["weight"], given.get("bias")
    if weight.ndim != 2:  # torch also takes a vector, for one output without an axis
        return None
    return Call(given["input"], weight, bias if bias is not None and bias.shape == weight.shape[:1] else None)


def rows(x: Float[Tensor, "n *t i"], config: None) -> Float[Tensor, "1 n positions i"]:
    return x.reshape(1, x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])  # -1 is undefined without inputs


def columns(g: Float[Tensor, "s n *t o"], config: Any) -> Float[Tensor, "1 s n positions o"]:
    return g.reshape(1, *g.shape[:2], math.prod(g.shape[2:-1]), g.shape[-1])


def to_matrix(weight: Float[Tensor, "o i"], config: None) -> Float[Tensor, "1 o i"]:
    return weight.unsqueeze(0)


def from_matrix(matrix: Float[Tensor, "1 o i"], config: None) -> Float[Tensor, "o i"]:
    return matrix.squeeze(0)


LINEAR = Family("linear", (F.linear,), match, rows, columns, to_matrix, from_matrix, any_axis=True)
