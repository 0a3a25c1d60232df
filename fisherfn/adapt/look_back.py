"""The look back: the next batch shows that the last update was a mistake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from fisherfn import tree
from fisherfn.adapt.labels import target_mass
from fisherfn.adapt.state import AdaptiveState
from fisherfn.stats import Stats
from fisherfn.types import PyTree, Tree

SIGMAS, TOLERANCE = 4.0, 0.02
"""Allowed increase of the loss from one batch to the next: standard errors, plus a share of the loss.

Losses are compared per unit of target mass, because that of a longer sequence is a sum of more terms. The tokens of a
short sequence may still be harder than those of a long one, so the share by which the masses differ is allowed, too.
"""

EXPLAINED = 0.5
"""The share of such an increase that the last update must explain on examples of the new batch.

Batches of different difficulty (another noise level, another source) differ by more than sampling errors.
"""

DEAD = 0.1
"""The share of all parameters that may lose their gradient in one step."""


class Seen(NamedTuple):
    """Measurements of a batch before the step.

    Mean loss, its squared standard error, mean target mass of an example, and the parameters with a gradient.
    """

    loss: Tensor
    spread: Tensor
    mass: Tensor
    alive: Tensor

    @classmethod
    def of(cls, likelihood: Any, stats: Stats, targets: PyTree, alive: Tensor) -> Seen:
        """Return the measurements from the statistics of a batch with these targets."""
        return cls(*stats.measured(), target_mass(likelihood, stats, targets), alive)

    def undoes(self, state: AdaptiveState, stats: Stats, caused: Callable[[], Tensor]) -> Bool[Tensor, ""]:
        """Return whether the last update must have been a mistake: a loss too high, or too many dead parameters.

        Args:
            state: the state after the last step.
            stats: the statistics of the new batch.
            caused: returns the change of the loss by the last update, in nats, on examples of the new batch; called
                only if the loss is too high, or where masks cannot be read.
        """
        sound = stats.checks["inputs"] & stats.checks["targets"]
        before, mine = state.loss / state.mass, self.loss / self.mass
        errors = (state.spread / state.mass.square() + self.spread / self.mass.square()).sqrt()
        share = TOLERANCE + 1 - torch.minimum(self.mass, state.mass) / torch.maximum(self.mass, state.mass)
        limit = before + SIGMAS * errors + share * before.abs()
        rises = ~((mine <= limit) | torch.isinf(state.loss) | (self.mass == 0))  # NaN is too high
        harder = tree.choose(rises, lambda: caused() / self.mass < EXPLAINED * (mine - before), lambda: rises)
        harder = harder & torch.isfinite(mine)  # an infinite loss may be that of an example without a trial
        sizes = [shape.numel() for _, shape in stats.layout.shapes]
        dead = (self.loss.new_tensor(sizes) * (state.alive & ~self.alive)).sum() > DEAD * sum(sizes)
        return sound & ((rises & ~harder) | (dead & self.alive.any()))

    def remembered(self, state: AdaptiveState) -> Seen:
        """Return what the next batch is compared with.

        A batch without any gradient (no target counts) says nothing: the batch before it is kept.
        """
        any_ = self.alive.any()
        before = (state.loss, state.spread, state.mass, state.alive)
        return Seen(*(torch.where(any_, mine, old) for mine, old in zip(self, before, strict=True)))


def kept_context(back: Bool[Tensor, ""], old: PyTree, new: PyTree) -> PyTree:
    """Return the new context; the old one if the last update is undone: the new one was computed after that update."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new

    def chosen(name: str, leaf: Any) -> Any:
        before = old.get(name)
        same = isinstance(leaf, Tensor) and isinstance(before, Tensor) and before.shape == leaf.shape
        return torch.where(back, before, leaf) if same else leaf  # type: ignore[arg-type]

    return {name: chosen(name, leaf) for name, leaf in new.items()}


def alive(grads: Tree) -> Bool[Tensor, " parameters"]:
    """Return for each parameter whether it has a gradient at all."""
    return torch.stack([torch.linalg.vector_norm(leaf) for leaf in tree.leaves(grads)]) != 0
