"""What methods of one and of two Kronecker products share: only how the terms are estimated and averaged is theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from fisherfn.base import LayerMethod, Method, estimate_then_blend, layerwise
from fisherfn.errors import HyperparameterError
from fisherfn.linalg import damped, kron, rearranged
from fisherfn.linalg.kron import Pair, Sum
from fisherfn.types import Shape

DampingForm = Literal["factored", "eigen"]


def one_term(
    name: str, estimate: Callable[..., Any], blend: Callable[..., Pair], damping_form: str, diagonal_above: int
) -> Method:
    """A method whose factors are a `Pair`."""
    form, width = damped.damping_form(damping_form), checked_width(diagonal_above)

    def init(shape: Shape, dtype: torch.dtype, device: torch.device, damping: Tensor) -> tuple[Pair, damped.Inverse]:
        eye = kron.identity(shape, kron.forms(shape, width), dtype, device)
        return kron.zeros(eye), form.empty(eye, damping)

    layer = LayerMethod(
        init=init,
        update=estimate_then_blend(estimate, blend),
        invert=form.one,
        apply=damped.apply,
        apply_tap=damped.apply_tap,
        matvec=lambda factors, W: kron.apply([factors], W),
        overlap=lambda factors, tap: rearranged.overlap([factors], tap),
    )
    return layerwise(name, layer)


def two_terms(
    name: str,
    estimate: Callable[..., Any],
    blend: Callable[..., Sum],
    damping_form: str,
    floor: float,
    diagonal_above: int,
) -> Method:
    """A method whose factors are a `Sum`, the first term PSD."""
    form, width = damped.damping_form(damping_form, terms=2, floor=floor), checked_width(diagonal_above)

    def init(shape: Shape, dtype: torch.dtype, device: torch.device, damping: Tensor) -> tuple[Sum, damped.Inverse]:
        eye = kron.identity(shape, kron.forms(shape, width), dtype, device)
        return Sum(kron.zeros(eye), kron.zeros(eye)), form.empty(eye, damping)

    layer = LayerMethod(
        init=init,
        update=estimate_then_blend(estimate, blend),
        invert=lambda factors, damping: form.two(factors.first, factors.second, damping),
        apply=damped.apply,
        apply_tap=damped.apply_tap,
        matvec=kron.apply,
        overlap=rearranged.overlap,
    )
    return layerwise(name, layer)


def checked_steps(iterations: int, least: int) -> int:
    """The number of iterations.

    Raises:
        HyperparameterError: too few to find as many terms.
    """
    if iterations < least:
        raise HyperparameterError(f"iterations must be >= {least}, got {iterations}.")
    return iterations


def checked_width(diagonal_above: int) -> int:
    """The width above which factors are diagonal.

    Raises:
        HyperparameterError: a negative one.
    """
    if diagonal_above < 0:
        raise HyperparameterError(f"diagonal_above must be >= 0, got {diagonal_above}.")
    return diagonal_above
