"""Numbers that a build compares: generic gradients, and when two of them agree."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import vjp

from fisherfn import tree
from fisherfn.stats.functional import run
from fisherfn.types import Model, PyTree, Tree


def cotangent_of(outputs: Tensor) -> Tensor:
    """A fixed generic cotangent: whatever agrees on it agrees."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)


def gradients(model: Model, params: Tree, x: PyTree, context: PyTree, cotangent: Tensor) -> Tree:
    """Autograd's gradient of all parameters for this cotangent."""
    _, pull = vjp(lambda p: run(model, p, x, context)[0], dict(params))  # type: ignore[misc]
    grads: Tree = pull(cotangent)[0]
    return grads


def close(found: Tensor, truth: Tensor, scale: Tensor, tolerance: float, noise: float = 0.0) -> bool:
    """Agreement to the working precision of the sum's terms (`scale`: the sum of their sizes), far from a missing one.

    The sum itself may vanish: a bias before a batch norm has no gradient. With `noise`, the terms may vanish too.
    """
    return bool((found - truth).norm() <= tolerance * scale.norm() + noise)


def noise(truth: Tree) -> float:
    """The size of numerical noise in a gradient that is zero: 0 below double precision, where it would hide errors."""
    if any(g.dtype != torch.float64 for g in truth.values()):
        return 0.0
    return 100 * torch.finfo(torch.float64).eps * float(tree.norm(truth))
