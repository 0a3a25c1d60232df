"""Numbers that a build compares: generic cotangents, and when two gradients agree."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherfn import tree
from fisherfn.types import Tree


def cotangent_of(outputs: Tensor) -> Tensor:
    """Return a fixed generic cotangent: gradients that agree on it are equal."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)


def close(found: Tensor, truth: Tensor, scale: Tensor, tolerance: float, noise: float = 0.0) -> bool:
    """Return True if two sums agree in the working precision of their terms; `scale` is the sum of their sizes.

    The sum itself may vanish: a bias before a batch norm has no gradient. With `noise`, the terms may vanish too.
    """
    return bool((found - truth).norm() <= tolerance * scale.norm() + noise)


def noise(truth: Tree) -> float:
    """Return the size of numerical noise in a zero gradient: 0 below double precision, where it would hide errors."""
    if any(g.dtype != torch.float64 for g in truth.values()):
        return 0.0
    return 100 * torch.finfo(torch.float64).eps * float(tree.norm(truth))
