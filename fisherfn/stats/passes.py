"""The passes of a batch that give its statistics: one run of the model with taps, one backward pass per kind of label.

The cotangents of the outputs are those of the loss, and those of each kind of Fisher: their columns are scaled so that
the Fisher is `1/N Σ_n Σ_s` of their outer products (docs/conventions.md). A single `vjp` with respect to zero taps
pulls all of them back to the layers' outputs; no weight gradient is formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vjp, vmap

from fisherfn import tree
from fisherfn.errors import LikelihoodError, NoiseError, ShapeError
from fisherfn.likelihoods import Callback
from fisherfn.stats.functional import call
from fisherfn.stats.intercept import Intercept, Taps
from fisherfn.stats.layout import Layout
from fisherfn.stats.path import check_path
from fisherfn.stats.shared import Followed
from fisherfn.types import Model, PyTree, Tree


def tapped_run(
    model: Model, layout: Layout, params: Tree, x: PyTree, context: PyTree, uncoupled: bool = False
) -> tuple[Tensor, Callable[[Tensor], Taps], Taps, PyTree]:
    """Run the model once; return outputs, the pullback to the layers' outputs, the layers' raw inputs, the new context.

    The pullback also returns the gradient, summed over the examples, of parameters that take the plain gradient.
    Inputs and output-gradients have the examples on the first axis, whichever axis the layer has them on.
    """
    examples = tree.leaves(x)[0].shape[0]

    # vjp gets one flat list of tensors: traversing trees of them takes as long as the layers of a small net
    def forward(*primals: Tensor) -> tuple[Tensor, tuple[list[Tensor], PyTree]]:
        shared, taps = Followed(layout.plan), primals[: len(zeros)]
        values = {**params, **dict(zip(plain, primals[len(zeros) :], strict=True))}
        with Intercept(values, _by_layer(layout, taps), uncoupled, shared) as mode:
            outputs, new_context = call(model, values, x, context)
        shared.finish()
        check_path(layout, mode)
        raw = [record.input(examples) for block in layout.layers for record in mode.records[block.weight]]
        return outputs, (raw, new_context)

    plain = [name for name, _ in layout.uncovered]
    like, uses = tree.leaves(params)[0], (use for block in layout.layers for use in block.uses)
    zero = cache(lambda dtype: like.new_zeros((), dtype=dtype))
    zeros = [zero(use.dtype).expand(use.full_shape(examples)) for use in uses]
    primals = (*zeros, *(params[name] for name in plain))
    outputs, pull, (inputs, new_context) = vjp(forward, *primals, has_aux=True)  # type: ignore[misc]

    def pull_examples_first(cotangent: Tensor) -> Taps:
        pulled = pull(cotangent.to(outputs.dtype))
        summed = {name: (g,) for name, g in zip(plain, pulled[len(zeros) :], strict=True)}
        return _examples_first(layout, pulled[: len(zeros)]) | summed

    return outputs, pull_examples_first, _examples_first(layout, inputs), new_context


def loss_cotangent(
    likelihood: object, outputs: Float[Tensor, "n *d"], targets: PyTree
) -> tuple[Float[Tensor, "n *d"], Float[Tensor, " n"]]:
    """Return `∂ nll_n / ∂ outputs_n` of every example, and the negative log-likelihoods themselves."""
    score = getattr(likelihood, "score", None)
    if score is not None:
        return score(outputs, targets), example_losses(likelihood, outputs, targets)

    def total(f: Tensor) -> tuple[Tensor, Tensor]:
        losses = example_losses(likelihood, f, targets)
        return losses.sum(), losses

    return torch.func.grad(total, has_aux=True)(outputs)  # type: ignore[no-any-return]


def example_losses(likelihood: Any, outputs: Float[Tensor, "n *d"], targets: PyTree) -> Float[Tensor, " n"]:
    """Return the negative log-likelihood of each example; raise unless there is one number per example."""
    nll: Any = likelihood.nll(outputs, targets)
    if not isinstance(nll, Tensor) or nll.shape != outputs.shape[:1]:
        found = f"shape {tuple(nll.shape)}" if isinstance(nll, Tensor) else type(nll).__name__
        raise ShapeError(
            f"the likelihood gave {found} for {outputs.shape[0]} examples; nll must return [N], "
            "summed over output dimensions and not averaged over examples."
        )
    return nll


def fisher_cotangents(
    likelihood: object, outputs: Float[Tensor, "n *d"], targets: PyTree, fisher: str, noise: Tensor | None
) -> Float[Tensor, "s n *d"]:
    """Return the output-gradients of every sample ("mc") or the columns of the output Fisher's square root ("type2").

    The targets only give the weight of each observation, for likelihoods that have such weights.
    """
    observed = getattr(likelihood, "observed", None)
    if observed is None:
        return _equal_cotangents(likelihood, outputs, fisher, noise)
    likelihood, weights = observed(outputs, targets)
    columns = _equal_cotangents(likelihood, outputs, fisher, noise)
    if weights is None:
        return columns
    roots: Tensor = weights.sqrt().reshape(*weights.shape, *(1,) * (outputs.ndim - weights.ndim))
    return columns * roots.to(columns.dtype)


def _equal_cotangents(
    likelihood: object, outputs: Float[Tensor, "n *d"], fisher: str, noise: Tensor | None
) -> Float[Tensor, "s n *d"]:
    if fisher == "type2":
        return require(likelihood, "fisher_sqrt", fisher)(outputs)  # type: ignore[no-any-return, operator]
    sample = require(likelihood, "sample", fisher)
    if noise is None:
        raise NoiseError(
            'fisher="mc" samples labels and never uses the global generator: '
            "pass generator=torch.Generator() or noise=ng.noise(batch, generator)."
        )
    draws = noise.shape[1]
    labels = (sample(outputs, noise[:, s]) for s in range(draws))  # type: ignore[operator]
    score = getattr(likelihood, "score", None) or (lambda f, y: loss_cotangent(likelihood, f, y)[0])
    columns = [score(outputs, each) for each in labels]
    return columns[0].unsqueeze(0) if draws == 1 else torch.stack(columns) / math.sqrt(draws)


def require(likelihood: object, method: str, fisher: str) -> object:
    """Return a method of the likelihood, or raise the error that names it."""
    found = getattr(likelihood, method, None)
    if found is None and isinstance(getattr(likelihood, "likelihood", likelihood), Callback):
        raise LikelihoodError(
            f'fisher="{fisher}" needs a likelihood with {method}, which a plain function does not have: pass '
            'ff.Categorical() or another likelihood, or use fisher="empirical".'
        )
    if found is None:
        raise LikelihoodError(
            f'fisher="{fisher}" needs {type(likelihood).__name__}.{method}, which it does not have; '
            'define it (see the likelihood protocol), or use fisher="empirical", which needs only nll.'
        )
    return found


def pull_all(pull: Callable[[Tensor], Taps], cotangents: Float[Tensor, "s n *d"]) -> Taps:
    """Pull several cotangents back, `[S, N, …]` to `[S, …]` per tap; without cotangents the result is empty."""
    if cotangents.shape[0] == 0:
        return {}
    if cotangents.shape[0] == 1:  # one plain backward is cheaper than a vmapped one
        return {name: tuple(g.unsqueeze(0) for g in uses) for name, uses in pull(cotangents[0]).items()}
    pulled: Taps = vmap(pull)(cotangents)
    return pulled


def _by_layer(layout: Layout, flat: Sequence[Tensor]) -> Taps:
    """Group tensors, given in the order of layers and their uses, by the name of the weight."""
    each = iter(flat)
    return {block.weight: tuple(next(each) for _ in block.uses) for block in layout.layers}


def _examples_first(layout: Layout, flat: Sequence[Tensor]) -> Taps:
    uses = (use for block in layout.layers for use in block.uses)
    return _by_layer(layout, [use.examples_first(x) for use, x in zip(uses, flat, strict=True)])
