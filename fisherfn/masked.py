"""Tensors chosen by a mask, without a copy where the mask can be read.

In a group of models (`torch.vmap`) the mask of a step has a value per model, which a transformed function cannot read.
The rule `_Where.vmap` can. While all models are sound, which is nearly always so, it returns the new tensors as they
are. A `torch.where` of the factors of 64 wide models takes half of the time of a step that refreshes statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from torch._C._functorch import maybe_current_level
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def is_concrete(x: Tensor) -> bool:
    """Return True if the value of a tensor can be read: not in a transform of torch.func, in a trace or on "meta"."""
    return not _in_trace() and type(x) is Tensor and maybe_current_level() is None and not x.is_meta


def readable(x: Tensor) -> bool:
    """Return True if a value can be read at once; reading from a GPU would wait for it."""
    return is_concrete(x) and x.device.type == "cpu"


def where(mask: Bool[Tensor, ""], news: Sequence[Tensor], olds: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return `torch.where(mask, new, old)` of pairs of equal shapes; a group of sound models copies nothing.

    >>> where(torch.tensor(True), [torch.ones(2)], [torch.full((2,), torch.nan)])
    (tensor([1., 1.]),)
    """
    if news and not _in_trace() and maybe_current_level() is not None:
        return _Where.apply(mask, *news, *olds)  # type: ignore[no-any-return, no-untyped-call]
    return tuple(torch.where(mask, new, old) for new, old in zip(news, olds, strict=True))


def all_true(
    checks: Mapping[str, Bool[Tensor, "*k"]], more: Mapping[str, Bool[Tensor, "*k"]]
) -> dict[str, Bool[Tensor, "*k"]]:
    """Return masks by name that are true where both are; a name that one lacks, such as "chunks", was no risk there."""
    return {**checks, **{name: mask & checks.get(name, mask) for name, mask in more.items()}}


def _in_trace() -> bool:
    return torch.compiler.is_compiling() or get_proxy_mode() is not None


class _Where(torch.autograd.Function):
    """`where` of `(mask, *news, *olds)`: only a function with derivatives of its own can have a rule for `vmap`."""

    @staticmethod
    def forward(mask: Tensor, *pairs: Tensor) -> tuple[Tensor, ...]:
        half = len(pairs) // 2
        return where(mask, pairs[:half], pairs[half:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        zeros = [torch.zeros_like(grad) for grad in grads]
        return None, *where(mask, grads, zeros), *where(mask, zeros, grads)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor) -> tuple[Tensor, ...]:
        (mask,) = ctx.saved_tensors
        half = len(tangents) // 2
        return where(mask, tangents[:half], tangents[half:])

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], mask: Tensor, *pairs: Tensor) -> tuple[Any, ...]:
        """Take tensors of all models, whose axes are `dims`; return the chosen ones and their axes."""
        mask, *moved = (x if dim is None else x.movedim(dim, 0) for x, dim in zip((mask, *pairs), dims, strict=True))
        half = len(pairs) // 2
        if readable(everyone := mask.all()) and everyone:
            return tuple(moved[:half]), tuple(None if dim is None else 0 for dim in dims[1 : half + 1])
        full = [
            x.expand(info.batch_size, *x.shape) if dim is None else x for x, dim in zip(moved, dims[1:], strict=True)
        ]
        masks = [mask.reshape(-1, *[1] * (x.ndim - 1)) for x in full[:half]]
        return tuple(map(torch.where, masks, full[:half], full[half:])), (0,) * half
