"""Layers whose scale or bias is none of their own parameters: the plain layer, then a product and a sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.nn import functional as F

from fisherfn.calls import bind

_AFFINE: dict[Callable[..., Any], tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    F.rms_norm: ("input", "normalized_shape", "weight", "eps"),
}


def without_affine(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    apart: Callable[[Any, Any], tuple[bool, bool]],
) -> Callable[[], Any] | None:
    """A layer whose scale or bias is none of its own, with these as calls of their own; None for any other call.

    Examples: a bias put together from parts, a scale of `1 + w`, a trained bias on a frozen weight. `apart` says of a
    weight and a bias whether each is to be taken from the call (a linear layer keeps its weight).
    """
    names = _AFFINE.get(function)
    if names is None:
        return None
    given = bind(names, args, kwargs)
    weight, bias = given.get("weight"), given.get("bias")
    scaled, shifted = apart(weight, bias)
    shifted |= scaled and bias is not None
    scaled &= "normalized_shape" in given
    if not scaled and not shifted:
        return None
    plain = given | ({"weight": None} if scaled else {}) | ({"bias": None} if bias is not None else {})

    def parts() -> Any:
        out = function(**plain)
        out = out * weight if scaled else out
        return out if bias is None else out + bias

    return parts
