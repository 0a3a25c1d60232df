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

from fisherfn.adapt.state import AdaptiveState
from fisherfn.stats import Layout

START, FLOOR = 20.0, 1.0
"""Initial λ in units of the first mean curvature u₀, and smallest λ in units of √(u₀u).

One pair of constants for all nets; docs/adaptive.md has the measurements.
"""

DECAY = 19 / 20
"""ω, per step."""

GOOD, POOR = 0.75, 0.25
"""Reduction ratios above and below which λ changes."""

ULP = 8 * torch.finfo(torch.float32).eps
"""Relative rounding of a mean loss in single precision."""

REJECTED, LEAST = 2.0, 1e-4
"""Factor on λ after a rejected step, and the least λ after it, in units of the first mean curvature."""


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


def followed(
    damping: Float[Tensor, ""], state: AdaptiveState, first: Float[Tensor, ""], unit: Float[Tensor, ""], relative: float
) -> Float[Tensor, ""]:
    """Return λ for a refresh of inverses, from the steps since the last one.

    Args:
        damping: λ so far.
        state: the state after these steps.
        first: u₀, the first mean curvature.
        unit: u, the present one.
        relative: relative rounding of the loss. Without a larger change λ is kept, unless it is above its initial
            value. It then decreases: steps may be short for this reason, and rejected ones would only raise it.
    """
    noise, high = within_noise(state.loss, state.actual, relative), damping > START * first
    ratio = torch.where(noise & high, torch.inf, reduction_ratio(state.actual, state.predicted))
    frozen = (state.predicted == 0) | (noise & ~high)
    moved = adapted_damping(damping, ratio, steps=state.steps, floor=FLOOR * (first * unit).sqrt(), frozen=frozen)
    return torch.where((state.first_curvature == 0) & (unit > 0), START * unit, moved)


def rounding(layout: Layout, device: torch.device) -> float:
    """Return the relative rounding of a mean loss: that of single precision, or of layers in half precision.

    The errors of many outputs average out, but a layer in half precision rounds its weights, too, for all examples
    alike. Under autocast, layers have half precision although their weights have not.
    """
    types = {use.dtype for block in layout.blocks for use in block.uses}
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        types.add(torch.get_autocast_dtype(device.type))
    return max(ULP, *(torch.finfo(dtype).eps for dtype in types))


def within_noise(before: Float[Tensor, ""], change: Float[Tensor, ""], relative: float = ULP) -> Bool[Tensor, ""]:
    """Return whether a change of a finite loss may be its rounding, so that ρ is meaningless."""
    return torch.isfinite(before) & (change.abs() <= relative * before.abs())
