"""Factors on the learning rate of each parameter, from schedules and groups, and the share of weight decay."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn.types import Tree


def scaled(nat: Tree, factors: Mapping[str, float | Tensor]) -> tuple[Tree, Float[Tensor, ""]]:
    """Return the direction with each parameter's factor relative to the largest, and the largest, a factor on α.

    The length of a direction is found by the model or limited by the KL bound. A factor that all parameters share would
    have no effect in it.
    """
    each = {name: torch.as_tensor(factor, dtype=torch.float64) for name, factor in factors.items()}
    largest = torch.stack(list(each.values())).amax()
    unit = torch.where(largest > 0, largest, 1.0)
    return {name: leaf * (each[name] / unit).to(leaf) for name, leaf in nat.items()}, largest


def decay(learning_rate: Float[Tensor, ""], weight_decay: float | Tensor) -> Float[Tensor, ""]:
    """Return the share α w of the parameters that decays: none for a negative α, at most all."""
    return (learning_rate * weight_decay).clamp(0, 1)
