"""Random numbers that a model draws by itself, from uniform ones that are given.

`torch.rand`, `randn`, `bernoulli` and the methods of tensors like them, as stochastic depth, patch dropout and noise
layers call them. Uniform numbers have 32 bits, normal ones are their quantiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Size, Tensor

from fisherfn.calls import bind

Uniform: TypeAlias = Callable[[Size, torch.device, str], Tensor]
"""Makes numbers in [0, 1) of a shape on a device; the last argument says who asks."""

_NEW = {"rand", "randn"}
_LIKE = {"rand_like", "randn_like", "bernoulli"}
_IN_PLACE = {"bernoulli_", "uniform_", "normal_"}


def is_known(function: Callable[..., Any]) -> bool:
    """Whether a call draws numbers that can be made from uniform ones."""
    return getattr(function, "__name__", "") in _NEW | _LIKE | _IN_PLACE


def drawn(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], uniform: Uniform) -> Tensor:
    """The numbers of a call."""
    name = function.__name__
    if name in _NEW:
        return _new(name, args, kwargs, uniform)
    given = bind(("input",), args, kwargs)
    x: Tensor = given["self"] if "self" in given else given["input"]
    numbers = uniform(x.shape, x.device, name)
    if name in _IN_PLACE:
        return x.copy_(_filled(name, args[1:], kwargs, numbers))
    if name == "bernoulli":
        p = args[1] if len(args) > 1 else kwargs.get("p")
        return torch.lt(numbers, x if p is None else p).to(x.dtype)
    dtype, device = kwargs.get("dtype") or x.dtype, kwargs.get("device") or x.device
    return (_normal(numbers).to(dtype) if name == "randn_like" else _rounded_down(numbers, dtype)).to(device)


def _new(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], uniform: Uniform) -> Tensor:
    size = kwargs.get("size", args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args)
    device = torch.device(kwargs.get("device") or torch.get_default_device())
    numbers, dtype = uniform(Size(size), device, name), kwargs.get("dtype") or torch.get_default_dtype()
    return _normal(numbers).to(dtype) if name == "randn" else _rounded_down(numbers, dtype)


def _filled(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], numbers: Tensor) -> Tensor:
    """Return the numbers that fill a tensor; the arguments are a probability, a range, or mean and deviation."""
    if name == "bernoulli_":
        return torch.lt(numbers, args[0] if args else kwargs.get("p", 0.5)).to(numbers.dtype)
    names = ("from", "to") if name == "uniform_" else ("mean", "std")
    given = {names[0]: 0.0, names[1]: 1.0} | bind(names, args, kwargs)
    first, second = float(given[names[0]]), float(given[names[1]])
    return first + (second - first) * numbers if name == "uniform_" else first + second * _normal(numbers)


def _rounded_down(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Uniform numbers in a coarser type, where 1 stays out of reach."""
    step = torch.finfo(dtype).eps
    return (torch.floor(numbers / step) * step).to(dtype)


def _normal(numbers: Tensor) -> Tensor:
    """Quantiles of the normal distribution; the smallest uniform number is half a step above 0."""
    return math.sqrt(2) * torch.erfinv(2 * (numbers + 2.0**-33) - 1)
