r"""Preconditioned conjugate gradients on trees: solve $A x = b$ for a symmetric positive definite A, given by products.

With a preconditioner P and $z = P r$, each step minimises the error $\|x - x_*\|_A$ over one more direction:

$$\alpha = \frac{r^\top z}{p^\top A p}, \quad x \leftarrow x + \alpha p, \quad r \leftarrow r - \alpha A p, \quad
p \leftarrow z + \frac{r_{new}^\top z_{new}}{r^\top z}\, p .$$

Hestenes & Stiefel 1952, *Methods of conjugate gradients for solving linear systems*.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import tree
from fisherfn.errors import expect, expect_count
from fisherfn.types import Tree


class Solution(NamedTuple):
    """The solution of a linear system, and the relative residual norms `‖b − A x‖ / ‖b‖` before and after each step.

    The last one is computed from x. Those before it are of the recursion, which goes on to fall where rounding errors
    keep the true residual from falling.
    """

    x: Tree
    residuals: Float[Tensor, " steps"]


def conjugate_gradients(
    product: Callable[[Tree], Tree],
    b: Tree,
    *,
    iterations: int,
    precondition: Callable[[Tree], Tree] | None = None,
    start: Tree | None = None,
) -> Solution:
    """Solve `A x = b` by a fixed number of steps; under `torch.vmap` for many right sides at once.

    A right side that is solved before the last step stays as it is. The number of steps is fixed, because members of a
    vmapped call cannot stop separately; `residuals` tell whether it was enough.

    Args:
        product: `v ↦ A v`, such as `lambda v: ff.tree.add(F @ v, v, scale=damping)`.
        b: the right side, a tree.
        iterations: number of steps, each with one product and one call of `precondition`; one more product follows.
        precondition: `r ↦ P r`, a symmetric positive definite approximation of A⁻¹, such as
            `lambda r: ng.precondition(state, r)`; None: the identity.
        start: first guess; None: zero.

    Raises:
        HyperparameterError: fewer than one iteration.
        StructureError: `b` is not a tree of tensors.
    """
    expect(b, dict, "b", "pass a tree like params, {name: tensor}")
    expect_count("iterations", iterations)
    P = precondition or (lambda r: r)
    x = tree.scale(b, 0.0) if start is None else start
    r = b if start is None else tree.add(b, product(start), scale=-1.0)
    z = p = P(r)
    rz, norms = tree.dot(r, z), [tree.norm(r)]
    for _ in range(iterations):
        Ap = product(p)
        alpha = _ratio(rz, tree.dot(p, Ap))
        x, r = tree.add(x, p, scale=alpha), tree.add(r, Ap, scale=-alpha)
        z = P(r)
        before, rz = rz, tree.dot(r, z)
        p = tree.add(z, p, scale=_ratio(rz, before))
        norms.append(tree.norm(r))
    norms[-1] = tree.norm(tree.add(b, product(x), scale=-1.0))
    return Solution(x, _ratio(torch.stack(norms), tree.norm(b)))


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the ratio, or zero if the denominator is zero: the system is then solved."""
    return torch.where(denominator == 0, 0.0, numerator / torch.where(denominator == 0, 1.0, denominator))
