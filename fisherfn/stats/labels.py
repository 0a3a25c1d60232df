"""Cotangents of the outputs for the loss and for each kind of Fisher.

The columns are scaled so that the Fisher is `1/N Σ_n Σ_s` of their outer products (docs/conventions.md).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn.errors import LikelihoodError, NoiseError, ShapeError
from fisherfn.types import PyTree


def loss_cotangent(
    likelihood: object, outputs: Float[Tensor, "n *d"], targets: PyTree
) -> tuple[Float[Tensor, "n *d"], Float[Tensor, " n"]]:
    """Return `∂ nll_n / ∂ outputs_n` of every example, and the negative log-likelihoods themselves."""
    score = getattr(likelihood, "score", None)
    if score is not None:
        return score(outputs, targets), _losses(likelihood, outputs, targets)

    def total(f: Tensor) -> tuple[Tensor, Tensor]:
        losses = _losses(likelihood, f, targets)
        return losses.sum(), losses

    return torch.func.grad(total, has_aux=True)(outputs)  # type: ignore[no-any-return]


def _losses(likelihood: Any, outputs: Float[Tensor, "n *d"], targets: PyTree) -> Float[Tensor, " n"]:
    """Return the negative log-likelihood of each example; raise unless there is one number per example."""
    nll: Tensor = likelihood.nll(outputs, targets)
    if nll.shape != outputs.shape[:1]:
        raise ShapeError(
            f"the likelihood gave shape {tuple(nll.shape)} for {outputs.shape[0]} examples; nll must return [N], "
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
    if found is None:
        raise LikelihoodError(
            f'fisher="{fisher}" needs {type(likelihood).__name__}.{method}, which it does not have; '
            'define it (see the likelihood protocol), or use fisher="empirical", which needs only nll.'
        )
    return found
