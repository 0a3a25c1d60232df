"""Factors on the learning rate of each parameter, from schedules and groups, and weight decay."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import tree
from fisherfn.errors import StructureError, expect_number
from fisherfn.types import Tree


class Scales(NamedTuple):
    """Factors on the learning rate.

    The length of a direction is found by the model or limited by the KL bound. A factor that all parameters share would
    have no effect in it, so the largest one is taken out.

    Attributes:
        largest: the largest factor, which multiplies α.
        relative: for each parameter its factor divided by the largest; None if all are the same.
    """

    largest: float | Tensor
    relative: dict[str, Tensor] | None = None

    @classmethod
    def of(cls, factors: float | Tensor | Mapping[str, float | Tensor], names: Collection[str]) -> Scales:
        """Return the factors of these parameters: one for all, or one for each name.

        Raises:
            HyperparameterError: a negative factor.
            StructureError: a name without a parameter, or a parameter without a factor.
        """
        if not isinstance(factors, Mapping):
            expect_number("lr_scale", factors, lambda v: v >= 0, "must be >= 0")
            return cls(factors)
        missing, unknown = sorted(set(names) - factors.keys()), sorted(factors.keys() - set(names))
        if missing or unknown:
            raise StructureError(f"lr_scale has no factor for {missing}, and factors for no parameter: {unknown}.")
        for name, factor in factors.items():
            expect_number(f"lr_scale of {name}", factor, lambda v: v >= 0, "must be >= 0")
        each = {name: torch.as_tensor(factor, dtype=torch.float64) for name, factor in factors.items()}
        largest = torch.stack(list(each.values())).amax()
        unit = torch.where(largest > 0, largest, 1.0)
        return cls(largest, {name: factor / unit for name, factor in each.items()})

    def directions(self, nat: Tree, previous: Tree) -> tuple[Tree, Tree]:
        """Return the preconditioned gradient with its relative factors, and the update before.

        The factor 0 stops a parameter at once, so the update before is then left out.
        """
        if self.relative is not None:
            moving = {name: factor > 0 for name, factor in self.relative.items()}
            nat = {name: leaf * self.relative[name].to(leaf) for name, leaf in nat.items()}
            return nat, {name: leaf * moving[name].to(leaf) for name, leaf in previous.items()}
        if isinstance(self.largest, Tensor):
            positive = self.largest > 0
            return nat, tree.map(lambda leaf: leaf * positive.to(leaf), previous)
        return nat, previous if self.largest > 0 else tree.zeros_like(previous)

    def decayed(self, new: Tree, old: Tree, learning_rate: Float[Tensor, ""], weight_decay: float | Tensor) -> Tree:
        """Subtract α w θ from the new parameters, with θ the old ones and α that of each parameter."""
        shares = dict.fromkeys(new, decay(learning_rate, weight_decay))
        if self.relative is not None:
            rates = {name: learning_rate * factor.to(learning_rate) for name, factor in self.relative.items()}
            shares = {name: decay(rate, weight_decay) for name, rate in rates.items()}
        return {name: torch.addcmul(p, old[name], shares[name].to(p), value=-1) for name, p in new.items()}


def decay(learning_rate: Float[Tensor, ""], weight_decay: float | Tensor) -> Float[Tensor, ""]:
    """Return the share α w of the parameters that decays: none for a negative α, at most all."""
    return (learning_rate * weight_decay).clamp(0, 1)
