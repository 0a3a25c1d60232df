r"""Damping adapted by the reduction ratio: the change of the loss divided by the change that the model predicts.

$$\rho = \frac{h(\theta + \delta) - h(\theta)}{M(\delta)}$$

Here M excludes λ, so that ρ = 1 for a linear model with squared loss. Over k steps with ω = 19/20 per step, the
Levenberg–Marquardt rule is

$$\lambda \leftarrow \omega^k \lambda \ \text{ where } \rho > \tfrac34, \qquad
  \lambda \leftarrow \omega^{-k} \lambda \ \text{ where } \rho < \tfrac14 .$$

On the batch that made the step, ρ is close to 1 for almost any λ, because the step fits this batch. The rule alone
would drive λ to zero, and steps would fit nothing but their own batch. So λ has a floor in units of the mean curvature
u (`ng.mean_curvature`): $c \sqrt{u_0 u}$, the geometric mean of the first and the present one.

Source: Martens & Grosse 2015, section 6.5; the floor is this project's (docs/adaptive.md has the measurements).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

DECAY = 19 / 20
"""ω, per step."""

GOOD, POOR = 0.75, 0.25
"""Reduction ratios above and below which λ changes."""

REJECTED = 2.0
"""Factor on λ after a rejected step."""


def reduction_ratio(actual: Tensor, predicted: Tensor) -> Float[Tensor, ""]:
    """Return ρ = actual / predicted change of the loss, with care for the sign of the prediction.

    If the model predicts an increase and the loss increases, the quotient is positive and would look like a good step.
    Without a predicted decrease, ρ is therefore −∞ for a step that did not lower the loss (or made it NaN), else 1.
    """
    falls = predicted < 0
    plain = actual / torch.where(falls, predicted, -1.0)
    without = torch.where(actual < 0, 1.0, -torch.inf)
    ratio = torch.where(falls, plain, without)
    return torch.where(torch.isnan(ratio), -torch.inf, ratio)


def adapted_damping(
    damping: Float[Tensor, ""],
    ratio: Float[Tensor, ""],
    *,
    steps: Tensor | int = 1,
    floor: Tensor | float = 0.0,
    frozen: Bool[Tensor, ""] | bool = False,
    decay: float = DECAY,
) -> Float[Tensor, ""]:
    """Return λ after the Levenberg–Marquardt rule.

    Args:
        damping: λ so far.
        ratio: ρ, from `reduction_ratio`.
        steps: k, the number of steps that ρ was measured over.
        floor: the smallest λ.
        frozen: true keeps λ, because the change of the loss is numerical noise and ρ is meaningless.
        decay: ω, per step.
    """
    factor = decay ** torch.as_tensor(steps, dtype=damping.dtype, device=damping.device)
    moved = torch.where(ratio > GOOD, damping * factor, torch.where(ratio < POOR, damping / factor, damping))
    return torch.maximum(torch.where(torch.as_tensor(frozen), damping, moved), torch.as_tensor(floor).to(damping))


def within_noise(before: Float[Tensor, ""], change: Float[Tensor, ""], dtype: torch.dtype) -> Bool[Tensor, ""]:
    """Return whether a change of the loss is a few units in its last place, so that ρ is meaningless."""
    return change.abs() <= 8 * torch.finfo(dtype).eps * before.abs()
