r"""Preconditioned conjugate gradients on trees: solve $A x = b$ for a symmetric positive definite A, given by products.

With a preconditioner P and $z = P r$, each step minimises the error $\|x - x_*\|_A$ over one more direction:

$$\alpha = \frac{r^\top z}{p^\top A p}, \quad x \leftarrow x + \alpha p, \quad r \leftarrow r - \alpha A p, \quad
p \leftarrow z + \frac{r_{new}^\top z_{new}}{r^\top z}\, p .$$

The system is scaled such that the largest entry of b and of the first residual is between 1 and 2: the squares of small
numbers vanish (in float32 those below 1e-23), and those of large ones overflow. So are the arguments of A and P, which
may be in half precision. The scales are powers of two, which round nothing.

Hestenes & Stiefel 1952, *Methods of conjugate gradients for solving linear systems*.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import tree
from fisherfn.errors import ShapeError, StructureError, expect, expect_count
from fisherfn.types import PyTree, Tree, single


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

    The arguments of `product` and `precondition` have the types of b, and so has x. Everything between two calls is
    computed in at least float32.

    Args:
        product: `v ↦ A v`, such as `lambda v: ff.tree.add(F @ v, v, scale=damping)`.
        b: the right side, a tree.
        iterations: number of steps, each with one product and one call of `precondition`; one more product follows.
        precondition: `r ↦ P r`, a symmetric positive definite approximation of A⁻¹, such as
            `lambda r: ng.precondition(state, r)`; None: the identity.
        start: first guess; None: zero.

    Raises:
        HyperparameterError: fewer than one iteration.
        StructureError: `b` is not a tree of tensors; `start`, or what a function returns, has other names; `product` or
            `precondition` is no function.
        ShapeError: shapes differ from those of b, or a tensor contains integers or flags.
    """
    expect(b, dict, "b", "pass a tree like params, {name: tensor}")
    expect_count("iterations", iterations)
    if not b:
        raise StructureError("b has no tensors: pass a tree like params, {name: tensor}.")
    for name, leaf in b.items():
        expect(leaf, Tensor, f"{name!r} of b", "pass a tree like params, {name: tensor}")
        if leaf.is_complex():
            raise ShapeError(f"{name!r} of b is complex: pass real and imaginary parts, torch.view_as_real(b).")
    _check(b, b, "b")

    def A(v: Tree) -> Tree:
        return _call("product", product, v, b)

    def P(r: Tree) -> Tree:
        return r if precondition is None else _call("precondition", precondition, r, b)

    right = tree.map(single, b)
    if start is not None:
        _check(start, b, "start")
        start = tree.map(single, start)
    r = right if start is None else tree.add(right, A(start), scale=-1.0)
    size = _size((right, r))
    right, r = _divided(right, size), _divided(r, size)
    x = tree.zeros_like(right) if start is None else _divided(start, size)
    z = p = P(r)
    rz, norms = tree.dot(r, z), [tree.norm(r)]
    for _ in range(iterations):
        Ap = A(p)
        alpha = _ratio(rz, tree.dot(p, Ap))
        x, r = tree.add(x, p, scale=alpha), tree.add(r, Ap, scale=-alpha)
        z = P(r)
        before, rz = rz, tree.dot(r, z)
        p = tree.add(z, p, scale=_ratio(rz, before))
        norms.append(tree.norm(r))
    solution = {name: (size.to(leaf.dtype) * leaf).to(b[name].dtype) for name, leaf in x.items()}
    rounded = _divided(tree.map(single, solution), size)
    norms[-1] = tree.norm(tree.add(right, A(rounded), scale=-1.0))
    found = torch.stack(norms)
    return Solution(solution, torch.where(found == 0, 0.0, found / tree.norm(right)))


def _call(name: str, fn: Callable[[Tree], Tree], v: Tree, b: Tree) -> Tree:
    """Return a linear function of v, called with a tree of size 1 in the types of b."""
    expect(fn, Callable, name, "pass a function of a tree, such as lambda v: F @ v")  # type: ignore[arg-type]
    size = _size(v)
    found = fn({key: leaf.to(b[key].dtype) for key, leaf in _divided(v, size).items()})
    _check(found, b, f"the result of {name}")
    return {key: size.to(leaf.dtype) * leaf for key, leaf in tree.map(single, found).items()}


def _check(values: Any, b: Tree, what: str) -> None:
    """Raise unless a tree has the names and shapes of b."""
    if not isinstance(values, dict) or values.keys() != b.keys():
        found = list(values)[:4] if isinstance(values, dict) else type(values).__name__
        raise StructureError(f"{what} must be a tree of tensors with the names of b, {list(b)[:4]}, not {found}.")
    tree.check_leaves(values, {name: leaf.shape for name, leaf in b.items()}, f" of {what}", "as in b")


def _size(trees: PyTree) -> Float[Tensor, ""]:
    """Return the power of two that divides the largest entry to a number between 1 and 2; 1 if there is none."""
    largest = [leaf.detach().abs().amax() for leaf in tree.leaves(trees) if leaf.numel()] or [torch.zeros(())]
    size = torch.stack(largest).amax().log2().floor().exp2()
    return torch.where(torch.isfinite(size) & (size > 0), size, 1.0)


def _divided(v: Tree, size: Float[Tensor, ""]) -> Tree:
    """Return a tree divided by a number."""
    return {name: leaf / size.to(leaf.dtype) for name, leaf in v.items()}


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the ratio, or zero if the denominator is zero: the system is then solved."""
    return torch.where(denominator == 0, 0.0, numerator / torch.where(denominator == 0, 1.0, denominator))
