r"""Experts on routed rows: `torch.nn.functional.grouped_mm`, with the rows sorted by their expert.

A mixture of experts gathers the tokens in the order of their experts, `x[index]`, and multiplies each stretch by its
own matrix. In that order the examples lie anywhere. In the order of the tokens they do not, so the same product is

$$s_r = \sum_k h_{rk}\, W_k\, (h_{rk}\, x_r),$$

with $h_{rk} = 1$ if row r is expert k's, else 0: a grouped product of every expert on every row. Rows of other experts
are zero, in the inputs and in the output-gradients. It costs as many products as there are experts, where torch's own
has no rule for `torch.vmap`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fisherfn.calls import holds
from fisherfn.errors import StructureError
from fisherfn.layers.einsum import Axes, grouped_product

_NAMES = ("input", "mat2", "offs", "bias", "out_dtype")
GROUPED = getattr(torch, "_grouped_mm", None)
"""What `torch.nn.functional.grouped_mm` calls."""


class Order(NamedTuple):
    """Rows of a tensor that was gathered from another: which `rows` of that one's, of how many."""

    rows: Int[Tensor, " s"]
    tokens: int


class Orders:
    """Orders of gathered rows in a run, by identity of the tensor and of the ends of the experts' stretches."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, Order]] = {}

    def note(self, func: Callable[..., Any], args: tuple[Any, ...], output: Any) -> None:
        """Note a call `x[index]`; any other is none."""
        if func is not Tensor.__getitem__ or not isinstance(output, Tensor) or not isinstance(args[1], Tensor):
            return
        x, index = args
        if index.ndim == 1 and index.dtype in (torch.int64, torch.int32) and x.ndim == 2:
            self._known[id(output)] = output, Order(index, x.shape[0])

    def of(self, x: Tensor, ends: Tensor) -> Order | None:
        """The order of rows: that of earlier ones with the same ends, or that in which they were gathered."""
        _, order = self._known.get(id(ends), self._known.get(id(x), (None, None)))
        if order is not None:
            self._known[id(ends)] = ends, order
        return order


def as_experts(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    orders: Orders,
    is_parameter: Callable[[Any], bool],
    original: Callable[[Any], Tensor | None],
) -> Callable[[], Tensor] | None:
    """A product of sorted rows with a parameter as a grouped product; None for any other call.

    `original` gives W for its transpose.
    """
    if GROUPED is None or function is not GROUPED:
        return None
    given: Mapping[str, Any] = dict(zip(_NAMES, args, strict=False)) | kwargs
    x, view, ends = given.get("input"), given.get("mat2"), given.get("offs")
    weight, turned = (view, False) if is_parameter(view) else (original(view), True)
    if not isinstance(x, Tensor) or not isinstance(ends, Tensor) or not isinstance(weight, Tensor) or x.ndim != 2:
        return None
    order = orders.of(x, ends)
    more = any(given.get(name) is not None for name in ("bias", "out_dtype"))
    if more or weight.ndim != 3 or order is None or x.shape[0] % order.tokens:
        return None
    outputs, inputs = ((1,), (2,)) if turned else ((2,), (1,))
    axes = Axes(weight.shape, (0,), outputs, inputs)
    return lambda: _experts(x, weight, ends, order, axes)


def _experts(x: Float[Tensor, "s i"], weight: Tensor, ends: Int[Tensor, " k"], order: Order, axes: Axes) -> Tensor:
    by_token = order.rows.argsort(stable=True)
    expert = (torch.arange(x.shape[0], device=x.device).unsqueeze(-1) >= ends).sum(-1)
    mine = (expert.unsqueeze(-1) == torch.arange(weight.shape[0], device=x.device))[by_token].to(x.dtype).unsqueeze(-1)
    found = (mine * grouped_product(mine * x[by_token].unsqueeze(-2), weight, axes)).sum(-2)
    return torch.where(_even(order, by_token), found, torch.nan)[by_token.argsort()]


def _even(order: Order, by_token: Int[Tensor, " s"]) -> Bool[Tensor, ""]:
    """Whether each token was gathered as often as any other, so that each example has as many rows.

    Raises:
        StructureError: it was not. Where values cannot be looked at, the outputs are not finite instead.
    """
    times = order.rows.shape[0] // order.tokens
    expected = torch.arange(order.rows.shape[0], device=by_token.device) // times
    even = (order.rows[by_token] == expected).all()
    if not holds(even):
        raise StructureError(
            "the model routes some tokens to more experts than others, so that examples have different numbers of "
            "rows: route each token to as many experts (top-k), without a capacity or a choice by the experts."
        )
    return even
