"""Line search over a grid of step sizes: a pure function of the loss, the parameters and a direction.

Müller & Zeinhofer 2023, *Achieving high accuracy with PINNs via energy natural gradients*, use the step sizes
1, 1/2, …, 2⁻³⁰ and take the one with the lowest loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import tree
from fisherfn.errors import HyperparameterError, expect, expect_number
from fisherfn.types import Tree

SIZES = tuple(0.5**k for k in range(31))
"""Step sizes 1, 1/2, …, 2⁻³⁰."""


class LineSearch(NamedTuple):
    """The result of a line search.

    Attributes:
        params: the parameters after the step.
        size: the step size; 0 if no step has a finite loss, in which case the parameters do not change.
        loss: the loss at these parameters; NaN if no step has a finite loss.
    """

    params: Tree
    size: Float[Tensor, ""]
    loss: Float[Tensor, ""]


def line_search(
    loss: Callable[[Tree], Tensor], params: Tree, direction: Tree, *, sizes: Sequence[float] = SIZES
) -> LineSearch:
    """Take the step `params - size * direction` with the lowest loss of a grid of step sizes.

    The loss may rise if every step of the grid raises it: include 0 in `sizes` to rule this out.

    Args:
        loss: the loss of a tree of parameters, a tensor with one number.
        params: the parameters.
        direction: a tree like params: the preconditioned gradient.
        sizes: the step sizes, by default 1, 1/2, …, 2⁻³⁰. Each costs one evaluation of the loss.

    Raises:
        StructureError: params or direction that are no trees.
        HyperparameterError: no step size, or one that is negative.

    >>> found = line_search(lambda p: p["w"] ** 2, {"w": torch.tensor(3.0)}, {"w": torch.tensor(12.0)})
    >>> found.size, found.params["w"]
    (tensor(0.2500), tensor(0.))
    """
    expect(params, dict, "params", "pass a tree {name: tensor}")
    expect(direction, dict, "direction", "pass the tree that ng.step or ng.precondition returned")
    if not sizes:
        raise HyperparameterError("a line search needs a step size: pass sizes=(1.0, 0.5, 0.25), for example.")
    for each in sizes:
        expect_number("a step size", each, lambda v: v >= 0, "must be >= 0")
    losses = torch.stack([loss(tree.add(params, direction, scale=-each)) for each in sizes])
    finite = torch.isfinite(losses)
    best = torch.where(finite, losses, torch.inf).argmin(0, keepdim=True)  # an index that no device has to wait for
    found = finite.any()
    size = torch.where(found, losses.new_tensor(sizes).gather(0, best)[0], 0.0)
    moved = tree.map(lambda p, d: p - size.to(p.dtype) * d.to(p.dtype), params, direction)
    return LineSearch(tree.select(found, moved, params), size, torch.where(found, losses.gather(0, best)[0], torch.nan))
