r"""Errors of a method's Fisher, layer by layer: Frobenius distance, leading eigenvalues, KL divergence, angle of steps.

An approximation is known by its action on matrices, $W \mapsto \hat F W$ with W `[k o i]`; its matrix is formed only
where it is small. k group, o output, i input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

import fisherfn as ff

Action = Callable[[Tensor], Tensor]
"""A symmetric linear map of matrices `[k o i]`."""

Layers = dict[str, float]
"""A number for each layer."""

Values = dict[str, dict[str, dict[str, float]]]
"""Values by quantity, layer and method; NaN if there is none."""

GRADIENT = "gradient"
"""The reference for angles: the gradient without a preconditioner."""

FORMED = 512
"""Largest size for which the matrix of an approximation is formed."""

CYCLES = 30
"""Number of restarts of the Lanczos iteration; few blocks need more than three."""


def compare(
    nets: Mapping[str, ff.NaturalGradient],
    params: dict[str, Tensor],
    batch: tuple[Tensor, Tensor],
    damping: float,
    count: int,
    labels: torch.Generator,
    context: Any = None,
) -> tuple[float, Values]:
    """Compute the loss, and the errors of every method from the same statistics.

    Args:
        nets: natural gradients of one model by method.
        params: parameters.
        batch: examples.
        damping: λ.
        count: number of compared eigenvalues; 0 only measures distances.
        labels: generator of the Fisher's labels.
        context: buffers of the model.
    """
    first = next(iter(nets.values()))
    stats = first.stats(params, batch, generator=labels, context=context)
    exact = exactly(first, stats, damping, count) if count else None
    found = {name: of_method(ng, ng.init(params, damping=damping), stats, exact) for name, ng in nets.items()}
    if exact:
        plain = first.layout.matrices(stats.grads)
        found[GRADIENT] = {"angle": {key: angle(plain[key], nat) for key, nat in exact.nat.items()}}
    values: Values = {}
    for name, quantities in found.items():
        for quantity, layers in quantities.items():
            for key, value in layers.items():
                values.setdefault(quantity, {}).setdefault(key, {})[name] = value
    return float(stats.loss), values


class Exact(NamedTuple):
    """The references of a comparison: leading eigenvalues of F, and the exact block natural gradient."""

    eigenvalues: dict[str, Tensor]
    nat: dict[str, Tensor]


def exactly(ng: ff.NaturalGradient, stats: ff.Stats, damping: float, count: int) -> Exact:
    """Compute the references from the sampled Fisher, block by block."""
    fisher, sizes = ng.fisher(stats, "block"), {block.key: math.prod(block.shape) for block in ng.layout.blocks}
    grams = fisher.gram()
    assert isinstance(grams, dict)
    eigenvalues = {key: leading_of_gram(gram, sizes[key], count) for key, gram in grams.items()}
    return Exact(eigenvalues, ng.layout.matrices(fisher.solve(stats.grads, damping)))


def of_method(ng: ff.NaturalGradient, state: ff.State, stats: ff.Stats, exact: Exact | None) -> dict[str, Layers]:
    """Return the values of one method by quantity; NaN if the update or the inversion failed a check."""
    state, info = ng.update(state, stats)
    values = {"error": sound(info, {key: float(error) for key, error in ng.fisher_error(state, stats).items()})}
    if exact:
        inverted, more = ng.invert(state)
        nat = ng.layout.matrices(ng.precondition(inverted, stats.grads))
        lines = {key: eigenvalue_error(ng, state, nat[key], key, true) for key, true in exact.eigenvalues.items()}
        angles = {key: angle(nat[key], true) for key, true in exact.nat.items()}
        nats = {key: float(value) for key, value in ng.fisher_divergence(inverted, stats).items()}
        values |= {"eigenvalues": sound(info, lines)}
        values |= {name: sound(info, sound(more, of)) for name, of in (("divergence", nats), ("angle", angles))}
    return values


def sound(info: ff.Info, values: Layers) -> Layers:
    """Return the values, or NaN if the underlying call failed."""
    return values if all(bool(ok) for ok in info.ok.values()) else dict.fromkeys(values, math.nan)


def eigenvalue_error(ng: ff.NaturalGradient, state: ff.State, like: Tensor, key: str, true: Tensor) -> float:
    """Return `‖λ̂ − λ‖ / ‖λ‖` of a layer's undamped approximation; NaN if the Fisher is zero."""
    if not true[0] > 0:
        return math.nan

    def act(W: Tensor) -> Tensor:
        return ng.method.matvec({key: state.factors[key]}, {key: W})[key]

    return float((leading(act, like, len(true), float(true[0])) - true).norm() / true.norm())


def angle(x: Tensor, y: Tensor) -> float:
    """Return the angle in degrees between two tensors as vectors; NaN if one of them is zero."""
    x, y = (v.double().flatten() / v.double().norm() for v in (x, y))
    return math.degrees(2 * math.atan2(float((x - y).norm()), float((x + y).norm())))


# ------------------------------------------------------------------------------------------------------- eigenvalues


def leading_of_gram(gram: Tensor, unknowns: int, count: int) -> Tensor:
    """Return the largest eigenvalues of `F = UUᵀ`, descending, from the small `UᵀU`; the others are zero."""
    found = torch.linalg.eigvalsh(gram.double()).clamp(min=0).flip(0)[: min(unknowns, count)]
    return torch.cat([found, found.new_zeros(min(unknowns, count) - len(found))])


def leading(act: Action, like: Tensor, count: int, scale: float) -> Tensor:
    r"""Return the algebraically largest eigenvalues of $\hat F$, descending; NaN if the iteration does not converge.

    Args:
        act: $W \mapsto \hat F W$.
        like: a matrix `[k o i]`, for its shape and precision.
        count: number of eigenvalues, at most all.
        scale: approximate size of the largest.
    """
    if like.numel() > FORMED:
        return _lanczos(act, like, count, scale)
    units = torch.eye(like.numel(), dtype=like.dtype).reshape(-1, *like.shape)
    matrix = torch.vmap(act)(units).flatten(1).double()
    return torch.linalg.eigvalsh((matrix + matrix.mT) / 2).flip(0)[:count]


def _lanczos(act: Action, like: Tensor, count: int, scale: float) -> Tensor:
    """Compute eigenvalues by implicitly restarted Lanczos, from a fixed start.

    It uses `I + F̂/scale` instead of F̂: relative accuracy is never reached for eigenvalues near zero, and this finds all
    with the same accuracy relative to the largest.
    """
    size, dtype = like.numel(), like.new_empty(0).numpy().dtype

    def shifted(v: np.ndarray) -> np.ndarray:
        W = torch.from_numpy(np.array(v, dtype=dtype)).reshape(like.shape)
        return v + act(W).flatten().numpy() / dtype.type(scale)

    start = np.random.default_rng(0).standard_normal(size).astype(dtype)
    operator = LinearOperator((size, size), matvec=shifted, dtype=dtype)
    try:
        found = eigsh(operator, count, which="LA", v0=start, tol=1e-5, maxiter=CYCLES, return_eigenvectors=False)
    except ArpackNoConvergence:
        return torch.full((count,), math.nan, dtype=torch.float64)
    return (torch.from_numpy(np.sort(found)[::-1].astype(np.float64)) - 1) * scale
