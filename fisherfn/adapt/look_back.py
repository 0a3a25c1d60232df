"""The look back: the next batch shows that the last update was a mistake."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from fisherfn import tree
from fisherfn.adapt.state import AdaptiveState
from fisherfn.stats import Stats
from fisherfn.types import Tree

SIGMAS, TOLERANCE = 4.0, 0.02
"""Allowed increase of the loss from one batch to the next: standard errors, plus a share of the loss."""

DEAD = 0.1
"""The share of all parameters that may lose their gradient in one step."""


class Seen(NamedTuple):
    """Mean loss of the whole batch before the step, its squared standard error, and the parameters with a gradient."""

    loss: Tensor
    spread: Tensor
    alive: Tensor

    @classmethod
    def of(cls, stats: Stats, alive: Tensor) -> Seen:
        """Return the measurements from the statistics of a batch."""
        return cls(*stats.measured(), alive)

    def undoes(self, state: AdaptiveState, stats: Stats) -> Bool[Tensor, ""]:
        """Return whether the last update must have been a mistake: a loss too high, or too many dead parameters."""
        sound = stats.checks["inputs"] & stats.checks["targets"]
        limit = state.loss + SIGMAS * (state.spread + self.spread).sqrt() + TOLERANCE * state.loss.abs()
        fine = (self.loss <= limit) | torch.isinf(state.loss)  # NaN is not fine
        sizes = [shape.numel() for _, shape in stats.layout.shapes]
        dead = (self.loss.new_tensor(sizes) * (state.alive & ~self.alive)).sum() > DEAD * sum(sizes)
        return sound & (~fine | (dead & self.alive.any()))

    def remembered(self, state: AdaptiveState) -> Seen:
        """Return what the next batch is compared with.

        A batch without any gradient (no target counts) says nothing: the batch before it is kept.
        """
        any_ = self.alive.any()
        before = (state.loss, state.spread, state.alive)
        return Seen(*(torch.where(any_, mine, old) for mine, old in zip(self, before, strict=True)))


def alive(grads: Tree) -> Bool[Tensor, " parameters"]:
    """Return for each parameter whether it has a gradient at all."""
    return torch.stack([torch.linalg.vector_norm(leaf) for leaf in tree.leaves(grads)]) != 0
