"""Tanh nets that carry derivatives along: value, first derivatives and one second-order operator in one pass.

The derivatives follow the chain rule layer by layer (forward mode, as in the forward Laplacian of Li et al. 2023).
Every weight multiplies value and derivatives in ordinary linear layers: they are *shared positions* of one layer, of
which only the value receives the bias. This is how K-FAC is defined for such nets (Dangel, Müller & Zeinhofer 2024).

n point, d coordinate, i input and o output of a layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

import fisherfn as ff
from common.config import ConfigError

Tree = dict[str, Tensor]


class Derivatives(NamedTuple):
    """A net's value `[n, o]`, its first derivatives `[n, d, o]`, and the operator Σ_d c_d ∂²/∂x_d² of it, `[n, o]`."""

    value: Tensor
    first: Tensor
    second: Tensor


def widths_of(text: str) -> list[int]:
    """Convert "2-64-1" to a list of widths."""
    parts = text.split("-")
    if len(parts) < 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"model must be widths such as 2-64-1, got {text}")
    return [int(part) for part in parts]


def initial(widths: Sequence[int], seed: int) -> Tree:
    """Return parameters as `torch.nn.Linear` draws them: uniform within ±1/√d_in, in float64."""
    generator, params = torch.Generator().manual_seed(seed), {}
    for at, (d_in, d_out) in enumerate(itertools.pairwise(widths)):
        for name, shape in (("weight", (d_out, d_in)), ("bias", (d_out,))):
            uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
            params[f"{at}.{name}"] = (2 * uniform - 1) / d_in**0.5
    return params


def value(params: Tree, x: Tensor) -> Tensor:
    """Return the net's value at each point, `[n, o]`."""
    depth = len(params) // 2
    for at in range(depth):
        x = linear(x, params[f"{at}.weight"], params[f"{at}.bias"])
        x = torch.tanh(x) if at + 1 < depth else x
    return x


def derivatives(params: Tree, x: Tensor, coefficients: Sequence[float]) -> Derivatives:
    """Return value, first derivatives and Σ_d c_d ∂²/∂x_d² of the net at each point, for the coefficients c."""
    depth, d = len(params) // 2, x.shape[1]
    c = x.new_tensor(coefficients).reshape(-1, 1)
    h, first, second = x, torch.eye(d).to(x).expand(len(x), d, d), torch.zeros_like(x)
    for at in range(depth):
        weight = params[f"{at}.weight"]
        h, first, second = linear(h, weight, params[f"{at}.bias"]), linear(first, weight), linear(second, weight)
        if at + 1 < depth:
            h = torch.tanh(h)
            slope = 1 - h.square()
            second = slope * (second - 2 * h * (c * first.square()).sum(1))
            first = slope.unsqueeze(1) * first
    return Derivatives(h, first, second)


def size_of(params: Tree) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in ff.tree.leaves(params))
