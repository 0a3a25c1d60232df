r"""The exact (type 2) Fisher as products through the model, without storage: $F v = \frac1N \sum_n J_n^\top B_n J_n v$.

$J_n$ is the Jacobian of example n's outputs and $B_n$ the Fisher of its outputs, given by the likelihood. A product
costs a few gradients, whatever the number of outputs. Type 2 may have hundreds of columns per example (784 pixels at
batch size 1024 give 802,816 columns); here neither the columns nor a system of that size is formed. Linear systems are
solved by a fixed number of conjugate-gradient steps.

Schraudolph 2002, *Fast curvature matrix-vector products for second-order gradient descent*; Martens 2010, *Deep
learning via Hessian-free optimization*, sections 4.2 and 4.6 (warm starts).

n example.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vjp

from fisherfn import tree
from fisherfn.conjugate_gradients import conjugate_gradients
from fisherfn.errors import LikelihoodError, expect_number
from fisherfn.likelihoods import output_fisher, weighs
from fisherfn.operators import check_like, to_scipy
from fisherfn.stats.border import border
from fisherfn.stats.functional import run
from fisherfn.stats.passes import require
from fisherfn.types import Model, PyTree, Tree, single


class Solved(NamedTuple):
    """An approximate solution, and the norm of its residual relative to that of the right-hand side."""

    x: Tree
    residual: Float[Tensor, ""]


class ImplicitFisher:
    """The full type-2 Fisher of a batch, with all layers coupled. It is immutable, and its methods are pure functions.

    Args:
        model: the model, as at the build.
        likelihood: the likelihood of the outputs, with `fisher_product(outputs, v)` (B v of every example) or
            `fisher_sqrt`.
        params: the parameters at which the Fisher is evaluated.
        x: the inputs of the batch.
        context: the context of the model, `()` for none.
        targets: the targets of the batch, for the weights of its observations; None if all count the same.

    Raises:
        LikelihoodError: the likelihood lacks both methods, or has weights and no targets were given.
    """

    def __init__(
        self, model: Model, likelihood: Any, params: Tree, x: PyTree, context: PyTree, targets: PyTree = None
    ) -> None:
        if not hasattr(likelihood, "fisher_product"):
            require(likelihood, "fisher_sqrt", "type2")
        if targets is None and weighs(likelihood):
            raise LikelihoodError(
                f"{type(likelihood).__name__} weights its observations by their targets, and none were given: pass "
                "those of the batch, ng.implicit_fisher(params, x, targets)."
            )
        self._outputs: Callable[[Tree], Tensor] = lambda p: run(model, p, x, context)[0]
        self._likelihood, self._params, self._targets = likelihood, params, targets
        self._examples = tree.leaves(x)[0].shape[0]

    @border()
    def __matmul__(self, v: Tree) -> Tree:
        """Compute the product `F v`.

        Raises:
            StructureError: the names of `v` differ from those of params.
            ShapeError: shapes differ from those of params.
        """
        check_like(v, self._params)
        v = {name: v[name].to(leaf.dtype) for name, leaf in self._params.items()}
        outputs, pull = vjp(self._outputs, self._params)  # type: ignore[misc]
        # J v is the pullback of the pullback, which is linear: this needs reverse mode only, which every layer supports
        _, push = vjp(lambda u: pull(u)[0], torch.zeros_like(outputs))  # type: ignore[misc]
        (product,) = pull(output_fisher(self._likelihood, outputs, self._targets, push(v)[0]) / self._examples)
        return {name: leaf.to_dense() if leaf.is_sparse else leaf for name, leaf in product.items()}

    def solve(self, v: Tree, damping: float | Tensor, *, iterations: int = 50, start: Tree | None = None) -> Solved:
        r"""Solve $(F + \lambda I) x = v$ by `iterations` steps of conjugate gradients from `start` (zero if None).

        Raises:
            HyperparameterError: fewer than one iteration, or a negative damping.
            StructureError: the names of `v` or `start` differ from those of params.
            ShapeError: shapes differ from those of params.
        """
        expect_number("damping", damping, lambda number: number >= 0, "must be >= 0")
        for given in (v,) if start is None else (v, start):
            check_like(given, self._params)

        def damped(z: Tree) -> Tree:
            return tree.add(tree.map(single, self @ z), tree.map(single, z), scale=damping)

        x, residuals = conjugate_gradients(damped, v, iterations=iterations, start=start)
        return Solved(x, residuals[-1])

    def to_scipy(self, damping: float = 0.0) -> Any:
        """Return `F + damping · I` as a `scipy.sparse.linalg.LinearOperator` on vectors of P numbers.

        Raises:
            MissingPackageError: scipy is not installed.
        """
        return to_scipy(self.__matmul__, self._params, damping)
