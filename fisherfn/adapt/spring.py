r"""SPRING: momentum inside the damped solve.

With r the residuals, J their Jacobian, both divided by √N, and φ the previous direction,

$$\zeta = r - J \mu\varphi, \qquad \varphi \leftarrow \mu\varphi + J^\top (J J^\top + \lambda I)^{-1} \zeta .$$

The new direction minimises $\tfrac12 \|J\varphi' - r\|^2 + \tfrac\lambda2 \|\varphi' - \mu\varphi\|^2$: it equals μφ
in all directions of which the batch says nothing. Setting the derivative to zero, with $F = J^\top J$ and
$\nabla = J^\top r$,

$$\varphi \leftarrow (F + \lambda I)^{-1} (\nabla + \lambda\mu\varphi),$$

which is one preconditioned gradient, for any likelihood, any sum of terms, and any method that approximates F. For the
exact Fisher of squared losses, `fisherfn.lowrank.solve_own` computes the first form, which stays accurate for a tiny λ.

Goldshlager, Abrahamsen & Lin 2024, *A Kaczmarz-inspired approach to accelerate the optimization of neural network
wavefunctions*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisherfn import tree
from fisherfn.errors import StructureError, expect, expect_number
from fisherfn.natgrad import NaturalGradient
from fisherfn.state import State, detached
from fisherfn.types import Info, Tree


class SpringState(NamedTuple):
    """The state of SPRING: a pytree.

    Attributes:
        curvature: the state of the natural gradient, with λ.
        direction: φ, the last direction.
    """

    curvature: State
    direction: Tree


@dataclass(frozen=True)
class Spring:
    """SPRING for a natural gradient, made by `ff.spring`; its attributes are that function's arguments."""

    ng: NaturalGradient
    momentum: float | Tensor

    def init(self, params: Tree, *, damping: float | Tensor = 1e-3) -> SpringState:
        """Return the initial state: the direction zero, this λ, and no running average (ema 0); see `ng.init`."""
        return SpringState(self.ng.init(params, damping=damping, ema=0.0), tree.zeros_like(params))

    def step(self, params: Tree, state: SpringState, batch: Any, **options: Any) -> tuple[Tree, SpringState, Info]:
        """Return the new direction φ, the new state and info; subtract φ times a learning rate from the parameters.

        If any check fails (`info.ok`), the state is returned unchanged.

        Args:
            params: the parameters.
            state: from `init` or the last step.
            batch: inputs and targets, or one such pair per term.
            options: arguments of `ng.stats`: generator, noise, context, chunk_size.

        Raises:
            StructureError: a state of another optimizer; see `ng.stats` for the others.
        """
        expect(state, SpringState, "state", "pass what spring.init(params) or spring.step returned")
        stats = self.ng.stats(params, batch, **options)
        near = tree.scale(state.direction, self.momentum)
        direction, curvature, info = self.ng.step_from(state.curvature, stats, stats, near=near)
        ok = torch.stack(list(info.ok.values())).all()
        new = SpringState(curvature, detached(tree.select(ok, direction, state.direction), stats.loss))
        return direction, new, info._replace(loss=stats.loss, context=stats.context)


def spring(ng: NaturalGradient, *, momentum: float | Tensor = 0.9) -> Spring:
    """Build SPRING: natural gradients with momentum inside the damped solve.

    With a line search, keep the step that was taken: `state._replace(direction=ff.tree.scale(direction, size))`.
    Otherwise the momentum of a long direction survives a short step.

    Args:
        ng: model, likelihood and method. `ff.exact()` gives the published algorithm.
        momentum: μ in [0, 1); 0 gives the natural gradient itself. A tensor may be batched under `torch.vmap`.

    Raises:
        HyperparameterError: a momentum outside its range.
        StructureError: a method whose step is not linear in the gradient.
    """
    expect(ng, NaturalGradient, "ng", "pass what ff.natural_gradient or ff.sum_of_terms returned")
    expect_number("momentum", momentum, lambda v: 0 <= v < 1, "must lie in [0, 1)")
    if ng.method.inverse_kind != "symmetric":
        raise StructureError(f"SPRING needs a symmetric inverse, which this {ng.method.name} has not: use ff.exact().")
    return Spring(ng, momentum)


def norm_clip(direction: Tree, *, lr: float | Tensor, norm: float | Tensor) -> Tree:
    r"""Scale a direction by $\min(1, C / (\eta \|\varphi\|))$, so that its step is not longer than `norm`.

    Args:
        direction: a tree like params.
        lr: the learning rate η of the step.
        norm: the greatest length C of the step.

    Raises:
        HyperparameterError: a length or learning rate that is not positive.

    >>> norm_clip({"w": torch.tensor([3.0, 4.0])}, lr=1.0, norm=1.0)["w"]
    tensor([0.6000, 0.8000])
    """
    expect(direction, dict, "direction", "pass the tree that spring.step or ng.step returned")
    for name, value in (("lr", lr), ("norm", norm)):
        expect_number(f"norm_clip: {name}", value, lambda v: v > 0, "must be positive")
    length = tree.norm(direction) * lr
    return tree.scale(direction, (norm / length.clamp(min=torch.finfo(length.dtype).tiny)).clamp(max=1.0))
