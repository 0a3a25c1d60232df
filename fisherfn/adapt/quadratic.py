r"""The quadratic model of a batch along a few directions, with the exact Fisher, and its minimiser.

$$M(\delta) = \tfrac12 \delta^\top (F + \lambda I)\, \delta + \nabla h^\top \delta, \qquad \delta = \sum_i w_i d_i$$

Restricted to directions $d_i$ (the preconditioned gradient and the previous update) this is a quadratic in the few
coefficients w, of which one is the step size and the other the momentum:

$$M(w) = \tfrac12 w^\top \hat A w + b^\top w, \qquad
  \hat A_{ij} = d_i^\top F d_j + \lambda\, d_i^\top d_j, \qquad b_i = \nabla h^\top d_i .$$

Neither F nor a gradient is formed. With J the Jacobian of the outputs f and B the Fisher of the outputs,

$$d_i^\top F d_j = \frac1N \sum_n (J_n d_i)^\top B_n (J_n d_j), \qquad
  \nabla h^\top d_i = \frac1N \sum_n \Bigl(\frac{\partial h_n}{\partial f_n}\Bigr)^{\!\top} J_n d_i ,$$

so only the products J d_i are needed, computed in forward mode together with one run of the model.

On a quadratic loss with λ = 0, the steps along (preconditioned gradient, previous update) that minimise M are the steps
of preconditioned conjugate gradients.

Source: Martens & Grosse 2015, sections 6.4, 7 and appendix C.

Indices: n example; i and j direction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap

from fisherfn import tree
from fisherfn.errors import ModelError, StructureError
from fisherfn.likelihoods import output_fisher
from fisherfn.natgrad import NaturalGradient
from fisherfn.stats import Batch, checked, run
from fisherfn.terms import TermSum
from fisherfn.types import PyTree, Tree

PARALLEL = 1e-6
"""Share of a direction's own curvature below which it counts as a combination of the directions before it."""

LACKING = ("forward AD", "forward mode", "forward-mode", "vmap over", "derivative for")
"""Words of torch's errors for a function that lacks the rule of a transform."""


class QuadraticModel(NamedTuple):
    """The quadratic model of a batch, restricted to directions; λ is an argument of its functions.

    Attributes:
        slope: b, ∇hᵀd_i, in nats.
        curvature: d_iᵀ F d_j, in nats.
        gram: d_iᵀ d_j.
        losses: the negative log-likelihood of each example, before the step, in nats.
    """

    slope: Float[Tensor, " d"]
    curvature: Float[Tensor, "d d"]
    gram: Float[Tensor, "d d"]
    losses: Float[Tensor, " n"]

    def value(self, weights: Float[Tensor, " d"], damping: Tensor | float = 0.0) -> Float[Tensor, ""]:
        """Return M(w), the predicted change of the mean loss, in nats."""
        return 0.5 * weights @ self._damped(damping) @ weights + self.slope @ weights

    def minimiser(
        self, damping: Tensor | float = 0.0, fixed: Sequence[Tensor | float | None] | None = None
    ) -> Float[Tensor, " d"]:
        """Return the coefficients with the lowest M.

        A direction without curvature, or one that is a combination of those before it, gets the coefficient 0.

        Args:
            damping: λ of M.
            fixed: for each direction its coefficient, or None if it is free.
        """
        matrix = self._damped(damping)
        given = [None] * len(self.slope) if fixed is None else list(fixed)
        free = torch.tensor([value is None for value in given], device=matrix.device)
        held = torch.stack([torch.as_tensor(0.0 if v is None else v, dtype=matrix.dtype).to(matrix) for v in given])
        right = torch.where(free, -(self.slope + matrix @ held), 0.0)
        system = torch.where(free[:, None] & free, matrix, 0.0)
        return held + _eliminated(system, right)

    def _damped(self, damping: Tensor | float) -> Float[Tensor, "d d"]:
        return self.curvature + damping * self.gram


def quadratic_model(
    ng: NaturalGradient, params: Tree, batch: Batch, directions: Sequence[Tree], *, context: PyTree = None
) -> QuadraticModel:
    """Return the quadratic model of a batch along directions, with the exact Fisher of its examples.

    The curvature of the outputs is the likelihood's own Fisher, or the second derivative of its `nll` if it has
    neither `fisher_product` nor `fisher_sqrt` (a plain callable).

    Args:
        ng: model and likelihood.
        params: the parameters at which the model is computed.
        batch: inputs and targets; for a sum of terms one such pair per term.
        directions: trees like params.
        context: the context, for models with one.

    Raises:
        StructureError: no direction, one that does not have the structure of params, or a batch with other terms.
        ShapeError: another shape than at the build.
        EmptyBatchError: no examples.
        LikelihoodError: a plain callable that cannot be differentiated twice.
    """
    if not directions:
        raise StructureError("a quadratic model needs a direction: pass [nat] or [nat, previous_update].")
    for values in (params, *directions):
        ng.layout.validate(values)
    if isinstance(ng, TermSum):
        ng.check_terms(batch)
        assert isinstance(batch, Mapping)
        models = {
            name: quadratic_model(term, params, batch[name], directions, context=(context or {}).get(name))
            for name, term in ng.terms.items()
        }
        return _sum(models, ng.weights)
    x, y, context, n = checked(ng.layout, batch, context)
    outputs, moves = tangents(lambda p: run(ng.model, p, x, context)[0], params, directions)

    def nll(f: Tensor) -> tuple[Tensor, Tensor]:
        losses = ng.likelihood.nll(f, y)
        return losses.mean(), losses

    slope_of_outputs, losses = grad(nll, has_aux=True)(outputs)
    products = torch.stack([output_fisher(ng.likelihood, outputs, y, move) for move in moves]) / n
    flat = moves.flatten(1).double()
    curvature = flat @ products.flatten(1).double().T
    # A plain callable may be concave in the outputs. Along such a direction the model would have no minimum, and every
    # step the length 0; without that curvature, the damping alone limits the step.
    convex = curvature.diagonal() >= 0
    curvature = torch.where(convex[:, None] & convex, curvature, 0.0)
    return QuadraticModel(
        slope=flat @ slope_of_outputs.flatten().double(),
        curvature=0.5 * (curvature + curvature.T),  # symmetric in spite of numerical noise
        gram=_gram(directions),
        losses=losses.detach(),
    )


def without_examples(directions: Sequence[Tree], losses: Float[Tensor, " n"]) -> QuadraticModel:
    """Return the quadratic model of no examples; `losses` is empty."""
    gram = _gram(directions)
    return QuadraticModel(torch.zeros_like(gram[0]), torch.zeros_like(gram), gram, losses)


def _sum(models: Mapping[str, QuadraticModel], weights: Mapping[str, float]) -> QuadraticModel:
    """Return the model of a sum of terms; the mean of its losses is the loss."""
    n = sum(len(model.losses) for model in models.values())
    return QuadraticModel(
        slope=torch.stack([weights[name] * model.slope for name, model in models.items()]).sum(0),
        curvature=torch.stack([weights[name] * model.curvature for name, model in models.items()]).sum(0),
        gram=next(iter(models.values())).gram,
        losses=torch.cat([model.losses * (weights[name] * n / len(model.losses)) for name, model in models.items()]),
    )


def tangents(
    outputs_of: Callable[[Tree], Tensor], params: Tree, directions: Sequence[Tree]
) -> tuple[Float[Tensor, "n *o"], Float[Tensor, "d n *o"]]:
    """Return the outputs f(params), and J d for each direction d.

    Forward mode computes all directions together with one run of the model. If the model uses a function without a
    rule for several at once (a custom `autograd.Function`), they follow one another. If it uses one without a forward
    rule, two reverse passes replace it: the pullback is linear in its cotangent, and J d is the pullback of d through
    it.

    Raises:
        ModelError: a function with neither.
    """
    stacked: Tree = {name: torch.stack([d[name].to(p.dtype) for d in directions]) for name, p in params.items()}

    def along(direction: Tree) -> Any:
        return jvp(outputs_of, (params,), (direction,))

    def one_by_one() -> tuple[Tensor, Tensor]:
        pairs = [along({name: leaf[k] for name, leaf in stacked.items()}) for k in range(len(directions))]
        return pairs[0][0], torch.stack([move for _, move in pairs])

    def backwards() -> tuple[Tensor, Tensor]:
        outputs, pull = vjp(outputs_of, params)  # type: ignore[misc]
        _, push = vjp(lambda u: pull(u)[0], torch.zeros_like(outputs))  # type: ignore[misc]
        return outputs, torch.stack([push({name: d[name] for name in params})[0] for d in directions])

    def together() -> tuple[Tensor, Tensor]:
        outputs, moves = vmap(along)(stacked)
        return outputs[0], moves  # the outputs are the same for every direction, computed once

    lacking: Exception | None = None
    for way in (together, one_by_one, backwards):
        try:
            return way()
        except (NotImplementedError, RuntimeError) as error:
            if not any(word in str(error) for word in LACKING):
                raise
            lacking = error
    raise ModelError(
        f"a function of the model lacks derivatives that adaptive steps need ({str(lacking)[:120]}): pass lr and "
        "damping, and the step needs no quadratic model."
    ) from lacking


def _eliminated(matrix: Float[Tensor, "d d"], right: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """Solve a positive semidefinite system, with 0 for rows that vanish or depend on those before them.

    Gauss–Jordan elimination on the system scaled to a unit diagonal. A mask skips pivots below `PARALLEL`, separately
    for each member of a vmapped call.
    """
    diagonal = matrix.diagonal()
    scale = torch.where(diagonal > 0, torch.where(diagonal > 0, diagonal, 1.0).rsqrt(), 0.0)
    table = torch.cat([matrix * scale[:, None] * scale, (right * scale)[:, None]], 1)
    for i, unit in enumerate(torch.eye(len(diagonal), device=matrix.device).bool()):
        pivot = table[i, i]
        usable = pivot > PARALLEL
        row = torch.where(usable, table[i] / torch.where(usable, pivot, 1.0), 0.0)
        column = torch.where(unit, 0.0, table[:, i])
        table = torch.where(unit[:, None], row, table - column[:, None] * row)
    return table[:, -1] * scale


def _gram(directions: Sequence[Tree]) -> Float[Tensor, "d d"]:
    """Return the inner products of all pairs, each computed once."""
    pairs = {(i, j): tree.dot(d, directions[j]) for i, d in enumerate(directions) for j in range(i + 1)}
    rows = [[pairs[max(i, j), min(i, j)] for j in range(len(directions))] for i in range(len(directions))]
    return torch.stack([torch.stack(row) for row in rows]).double()
