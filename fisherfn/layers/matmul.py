r"""Linear layers with the weight on the right: $s = x W + b$, with $W$ of shape `[d_in, d_out]`.

The calls are `x @ W`, `torch.matmul`, `torch.mm` and `torch.addmm`, used by hand-written nets and some language models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fisherfn.calls import bind
from fisherfn.layers.base import Call, Family
from fisherfn.layers.linear import columns, rows

_PRODUCTS: dict[Callable[..., Any], str] = {
    torch.matmul: "other",
    torch.mm: "mat2",
    Tensor.matmul: "other",
    Tensor.mm: "mat2",
}
_PRODUCTS[Tensor.__matmul__] = "other"
_SUMS = (torch.addmm, Tensor.addmm)


def match(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    names = ("input", "mat1", "mat2") if function in _SUMS else ("input", _PRODUCTS[function])
    given = bind(names, args, kwargs)
    if set(given) != set(names):  # scaled sums and calls with out= are not covered
        return None
    *bias, x, weight = (given[name] for name in names)
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor) or x.ndim < 2 or weight.ndim != 2:
        return None
    return Call(x, weight, bias[0] if bias and bias[0].shape == weight.shape[1:] else None)


_TRANSPOSING = {"t", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "adjoint"}
_PROPERTIES = {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH")}
"""Functions that may return the transpose of their first argument."""


def is_transpose(func: Callable[..., Any], x: Any, output: Any) -> bool:
    """Return True if a call returned the transpose of a matrix, or of a batch of them (`mT`), as a view.

    The function counts, too: a matrix that `torch.linalg` computes also has the strides of a transpose.
    """
    if func not in _PROPERTIES and getattr(func, "__name__", "") not in _TRANSPOSING:
        return False
    if not isinstance(x, Tensor) or not isinstance(output, Tensor) or x.ndim < 2 or output.ndim != x.ndim:
        return False
    return all(tuple(b) == (*a[:-2], a[-1], a[-2]) for a, b in ((x.shape, output.shape), (x.stride(), output.stride())))


def untransposed(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    original: Callable[[Any], Tensor | None],
) -> Callable[[], Any] | None:
    """Convert a product with the transpose of a weight to a layer; return None for any other call.

    `x @ W.T` is `F.linear(x, W)`, and `F.linear(x, W.T)` is `x @ W`. `original` gives W for its transpose.
    """
    if function is F.linear:
        names: tuple[str, ...] = ("input", "weight", "bias")
    elif function in _SUMS:
        names = ("bias", "input", "weight")
    elif function in _PRODUCTS:
        names = ("input", "weight")
    else:
        return None
    if len(args) + len(kwargs) > len(names) or (kwargs and function is not F.linear):
        return None
    given = bind(names, args, kwargs)
    weight, x, bias = original(given.get("weight")), given.get("input"), given.get("bias")
    if weight is None or weight.ndim != 2 or not isinstance(x, Tensor):
        return None
    if function is not F.linear:
        if bias is None or bias.shape == weight.shape[:1]:
            return lambda: F.linear(x, weight, bias)
        return lambda: F.linear(x, weight) + bias
    return lambda: x @ weight if bias is None else x @ weight + bias


def to_matrix(weight: Float[Tensor, "i o"], config: None) -> Float[Tensor, "1 o i"]:
    return weight.mT.unsqueeze(0)


def from_matrix(matrix: Float[Tensor, "1 o i"], config: None) -> Float[Tensor, "i o"]:
    return matrix.squeeze(0).mT


MATMUL = Family("matmul", (*_PRODUCTS, *_SUMS), match, rows, columns, to_matrix, from_matrix, any_axis=True)
