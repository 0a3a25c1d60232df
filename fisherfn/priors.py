"""Precisions of a Gaussian prior: one per block, and one per parameter that the outputs do not depend on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn.errors import StructureError, expect_positive, unknown
from fisherfn.stats import Layout

Prior = float | Tensor | Mapping[str, float | Tensor]
"""The precision δ of the prior: one for all parameters, or one per block key and per unused parameter."""


def precisions(layout: Layout, prior: Prior, like: Tensor) -> dict[str, Tensor]:
    """Return a precision for each block and each unused parameter, of the type and on the device of a tensor.

    Raises:
        HyperparameterError: a precision that is not positive.
        UnknownNameError: no block or unused parameter has this key.
        StructureError: a block or an unused parameter without a precision.
    """
    keys = [*(block.key for block in layout.blocks), *layout.unused]
    given = dict(prior) if isinstance(prior, Mapping) else dict.fromkeys(keys, prior)
    for key in given:
        if key not in keys:
            raise unknown("block", key, keys)
    missing = [key for key in keys if key not in given]
    if missing:
        raise StructureError(
            f"no prior precision for {', '.join(map(repr, missing))}: give one per block and per unused parameter."
        )
    for key, δ in given.items():
        expect_positive(f"prior precision of {key!r}", δ)
    return {key: torch.as_tensor(given[key], dtype=like.dtype, device=like.device) for key in keys}


def fixed_point(determined: Float[Tensor, ""], size: int, square: Float[Tensor, ""], old: Tensor) -> Float[Tensor, ""]:
    """Return MacKay's `γ / ‖θ‖²` for P = `size` parameters; the old precision where the data or θ do not determine it.

    γ = P − λ tr (F̂ + λI)⁻¹ is a difference: below its rounding errors it counts as zero.
    """
    exists = (determined > size * torch.finfo(determined.dtype).eps) & (square > 0)
    return torch.where(exists, determined / torch.where(exists, square, 1.0), old)
