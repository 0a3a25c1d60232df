"""The values of an adaptive step: the state of the optimizer, and its report on a step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fisherfn import tree
from fisherfn.errors import StructureError
from fisherfn.state import State, detached
from fisherfn.types import PyTree, Tree


class Adapted(NamedTuple):
    """The choices of an adaptive step and their reduction ratio.

    Attributes:
        learning_rate: α.
        momentum: μ.
        damping: λ after the step.
        reduction_ratio: ρ, the change of the loss divided by the change that the quadratic model predicted.
        rejected: whether the step was rejected or the one before it undone.
    """

    learning_rate: Float[Tensor, ""]
    momentum: Float[Tensor, ""]
    damping: Float[Tensor, ""]
    reduction_ratio: Float[Tensor, ""]
    rejected: Bool[Tensor, ""]


class AdaptiveState(NamedTuple):
    """The state of the optimizer: a pytree of tensors.

    Attributes:
        curvature: the method's state; its `damping` is λ.
        update: δ₀, the last accepted update.
        predicted: the sum of M, without λ, over the accepted steps since the last refresh of inverses, in nats.
        actual: the sum of the changes of the loss over the same steps, in nats.
        steps: the number of these steps.
        shrink: factor on a given learning rate, halved by each rejection until the next refresh of inverses.
        first_curvature: the mean curvature (`ng.mean_curvature`) at the first update.
        loss: mean loss of the last batch; infinite before the first.
        spread: squared standard error of that mean.
        mass: mean number of outputs of an example in that batch, counted with the weights of its targets.
        alive: for each parameter, whether it had a gradient at the last accepted step.
        rejected: whether a step since the last refresh of inverses was rejected; a loop may refresh them then.
        average: running average of the parameters, `()` without one.
        count: number of steps in the average.
    """

    curvature: State
    update: Tree
    predicted: Float[Tensor, ""]
    actual: Float[Tensor, ""]
    steps: Int[Tensor, ""]
    shrink: Float[Tensor, ""]
    first_curvature: Float[Tensor, ""]
    loss: Float[Tensor, ""]
    spread: Float[Tensor, ""]
    mass: Float[Tensor, ""]
    alive: Bool[Tensor, " parameters"]
    rejected: Bool[Tensor, ""]
    average: PyTree
    count: Int[Tensor, ""]  # type: ignore[assignment]  # shadows the tuple's own method

    def unseen(self) -> AdaptiveState:
        """Return the state for parameters that others have changed: the next loss then says nothing about δ₀."""
        return self._replace(loss=torch.full_like(self.loss, torch.inf), alive=torch.zeros_like(self.alive))

    def averaged(self, params: Tree, old: float, sound: Tensor, loss: Tensor) -> AdaptiveState:
        """Return the state with the next running average of the parameters, if the step passed its checks.

        Args:
            params: the new parameters.
            old: the weight of the old average, which early steps do not reach.
            sound: whether the step counts.
            loss: the loss of the step; see `detached`.
        """
        count = self.count + 1
        weight = (1 - 1 / count.double()).clamp(max=old)
        average = tree.map(lambda mean, p: torch.lerp(p, mean, weight.to(p.dtype)), self.average, params)
        average = tree.select(sound, detached(average, loss), self.average)
        return self._replace(average=average, count=torch.where(sound, count, self.count))

    def check_average(self, wanted: bool) -> None:
        """Raise `StructureError` unless the state has a running average of the parameters exactly if it is wanted."""
        if wanted != isinstance(self.average, dict):
            has, built = ("no", "with") if wanted else ("a", "without")
            raise StructureError(
                f"the state has {has} running average, but the optimizer was built {built} average=: build it as the "
                "one that made the state, or start with opt.init(params)."
            )
