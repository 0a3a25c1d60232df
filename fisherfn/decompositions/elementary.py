"""Function mode that replaces composite calls of torch by elementary ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fisherfn import tree
from fisherfn.decompositions.attention import multi_head_attention, scaled_dot_product_attention
from fisherfn.decompositions.recurrent import FUSED, RECURRENT, is_packed
from fisherfn.errors import CoverageError


def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """Compute PReLU by its definition, since torch's backward of it is wrong under two nested `torch.vmap`."""
    slope = weight if input.ndim < 2 else weight.reshape(-1, *(1,) * (input.ndim - 2))
    return torch.where(input > 0, input, slope * input)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Normalise by definition (Salimans & Kingma 2016), as torch's has no `torch.vmap` rule; `dim=-1` for all axes."""
    axes = [axis for axis in range(v.ndim) if dim == -1 or axis != dim % v.ndim]
    normed: Tensor = v * (g / torch.linalg.vector_norm(v, dim=axes, keepdim=dim != -1))
    return normed


_FEW_ROWS = 25
"""Numbers of vectors up to which torch, too, takes the norm of every difference."""


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    """Compute distances by definition, since torch's backward of them is wrong under `torch.vmap`.

    As in torch, Euclidean distances of many vectors come from products, which need no memory for all differences.
    """
    many = max(x1.shape[-2], x2.shape[-2]) > _FEW_ROWS and compute_mode != "donot_use_mm_for_euclid_dist"
    if p != 2 or not (many or compute_mode == "use_mm_for_euclid_dist"):
        distances: Tensor = torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), ord=p, dim=-1)
        return distances
    squares = x1.square().sum(-1).unsqueeze(-1) + x2.square().sum(-1).unsqueeze(-2) - 2 * x1 @ x2.mT
    apart = squares > 0
    return torch.where(apart, torch.where(apart, squares, 1.0).sqrt(), 0.0)


_PARTS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.multi_head_attention_forward: multi_head_attention,
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    F.prelu: prelu,
    torch._weight_norm: weight_norm,
    torch.cdist: cdist,
    **RECURRENT,
}


def decomposition(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[], Any] | None:
    """Return the elementary calls that replace a composite call; None if the call is already elementary."""
    parts = _PARTS.get(function)
    if parts is None or kwargs.get("static_k") is not None or kwargs.get("static_v") is not None:
        return None
    if _is_packed_recurrence(function, args, kwargs):
        return None
    return partial(parts, *args, **kwargs)


_ALONE: ContextVar[object | None] = ContextVar("alone", default=None)


class Elementary(TorchFunctionMode):
    """Replace composite calls by elementary ones while the mode is entered."""

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Enter the mode and make all enclosing modes of this kind inactive meanwhile."""
        token = _ALONE.set(self)
        try:
            with self:
                yield
        finally:
            _ALONE.reset(token)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _ALONE.get() not in (None, self):
            return func(*args, **kwargs)
        parts = decomposition(func, args, kwargs)
        if parts is not None:
            with self:  # the parts may be composite, too
                return parts()
        return self.elementary(func, args, kwargs)

    def elementary(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an elementary call; subclasses may change this."""
        return func(*args, **kwargs)


def refuse(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], is_parameter: Callable[[Any], bool]
) -> None:
    """Raise for a fused recurrent net on a packed sequence, if it reads parameters of the model."""
    if _is_packed_recurrence(function, args, kwargs) and any(is_parameter(leaf) for leaf in tree.leaves(args)):
        raise CoverageError(
            f"the model calls the fused {function.__name__} on a packed sequence, whose examples have no axis: run it "
            "on the padded batch instead (without pack_padded_sequence), and read or mask the outputs by length."
        )


def _is_packed_recurrence(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return True for a fused recurrent net on a packed sequence, which is not decomposed."""
    return function in FUSED and is_packed(args, kwargs)
