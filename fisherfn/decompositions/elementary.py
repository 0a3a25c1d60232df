"""Composite calls that reach torch as one, and the elementary calls that they stand for."""

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
    """Compute it by its definition: torch's backward of it is wrong under two nested `torch.vmap`."""
    slope = weight if input.ndim < 2 else weight.reshape(-1, *(1,) * (input.ndim - 2))
    return torch.where(input > 0, input, slope * input)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Normalise by the definition (Salimans & Kingma 2016): torch's own has no rule for `torch.vmap`. -1: all axes."""
    axes = [axis for axis in range(v.ndim) if dim == -1 or axis != dim % v.ndim]
    normed: Tensor = v * (g / torch.linalg.vector_norm(v, dim=axes, keepdim=dim != -1))
    return normed


_PARTS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.multi_head_attention_forward: multi_head_attention,
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    F.prelu: prelu,
    torch._weight_norm: weight_norm,
    **RECURRENT,
}


def decomposition(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[], Any] | None:
    """The same call in elementary ones, to be run in its place; None for a call that is one already."""
    parts = _PARTS.get(function)
    if parts is None or kwargs.get("static_k") is not None or kwargs.get("static_v") is not None:
        return None
    if _is_packed_recurrence(function, args, kwargs):
        return None
    return partial(parts, *args, **kwargs)


_ALONE: ContextVar[object | None] = ContextVar("alone", default=None)


class Elementary(TorchFunctionMode):
    """Runs composite calls as the elementary ones that they stand for."""

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Enter the mode, while all modes of this kind around it see nothing."""
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
        """An elementary call: as it is, unless a subclass has something to do with it."""
        return func(*args, **kwargs)


def refuse(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], is_parameter: Callable[[Any], bool]
) -> None:
    """Raise for a whole recurrent net on a packed sequence, if it has parameters of the model."""
    if _is_packed_recurrence(function, args, kwargs) and any(is_parameter(leaf) for leaf in tree.leaves(args)):
        raise CoverageError(
            f"the model calls the fused {function.__name__} on a packed sequence, whose examples have no axis: run it "
            "on the padded batch instead (without pack_padded_sequence), and read or mask the outputs by length."
        )


def _is_packed_recurrence(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return True for a whole recurrent net on a packed sequence, which stays one call."""
    return function in FUSED and is_packed(args, kwargs)
