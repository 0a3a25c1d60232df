"""The likelihood protocol, a plain callable as a likelihood, and functions that serve every likelihood."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor
from torch.func import grad, vjp

from fisherfn.errors import LikelihoodError, ShapeError, TargetError, expect


@runtime_checkable
class Likelihood(Protocol):
    """The likelihood protocol.

    Your own likelihood needs `nll`, `sample` for "mc", and `fisher_sqrt` for "type2". Six more methods are optional:

    - `noise(shape, generator, dtype)`: the noise for `sample`, if it is not one uniform number per output;
    - `valid(outputs, targets)`: a mask that is true if the targets are in range;
    - `score(outputs, targets)`: the gradient of `nll` in the outputs, cheaper than by autograd;
    - `fisher_product(outputs, v)`: the output Fisher times v, cheaper than from the columns of its root;
    - `column_weights(cotangent)`: the weights `[columns, N]` of the columns of `fisher_sqrt` whose sum is a cotangent
      `[N, …]` of the outputs, with which the exact natural gradient stays accurate for a tiny λ;
    - `observed(outputs, targets)`, if observations have different weights: the likelihood that scores sampled labels,
      and a weight per example or position that multiplies the Fisher of "mc" and "type2". With the
      attribute `weighted = False` the weights are 1 unless the targets say otherwise, and targets may be left out.

    The library passes outputs in at least float32. Its own likelihoods also take half precision: they compute in
    float32, return losses and weights in float32, and everything shaped like the outputs in the outputs' type.
    """

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return `-log p(targets | outputs)` of each example, `[N]`, up to an additive constant."""
        ...


Nll: TypeAlias = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Callback:
    """A plain callable `(outputs, targets) -> [N]` as a likelihood for the empirical Fisher."""

    fn: Nll

    def nll(self, outputs: Tensor, targets: Any) -> Tensor:
        return self.fn(outputs, targets)


def as_likelihood(given: Any) -> Any:
    """Return an object with `nll`; a plain callable becomes a likelihood for the empirical Fisher.

    Raises:
        LikelihoodError: a class, or neither a likelihood nor a function.
    """
    if isinstance(given, type):
        raise LikelihoodError(f"the likelihood is a class, {given.__name__}: pass an instance, {given.__name__}().")
    if hasattr(given, "nll"):
        return given
    if not callable(given):
        found = repr(given) if given is None or isinstance(given, str) else type(given).__name__
        raise LikelihoodError(
            f"the likelihood cannot be {found}: pass ff.Categorical(), ff.Bernoulli(), ff.Gaussian(), an object with "
            'nll(outputs, targets), or a function (outputs, targets) -> [N] with fisher="empirical".'
        )
    return Callback(given)


def draw(likelihood: object, shape: torch.Size, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Return the noise for outputs of this shape: the likelihood's own, else one uniform number per output."""
    own = getattr(likelihood, "noise", None)
    return own(shape, generator, dtype) if own is not None else uniform(shape, generator, dtype)


def output_fisher(likelihood: object, outputs: Tensor, targets: Any, v: Tensor) -> Tensor:
    """Return B v for every example, where B is the Fisher of its outputs.

    Uses `fisher_product` or the columns of `fisher_sqrt`. For a likelihood with neither (a plain callable), B is the
    second derivative of its `nll` with respect to the outputs, at the targets of the data. With targets, B includes
    the weights of observations (`observed`).

    Raises:
        LikelihoodError: an `nll` that cannot be differentiated twice.
    """
    observed = getattr(likelihood, "observed", None)
    if observed is not None and targets is not None:
        likelihood, weights = observed(outputs, targets)
        if weights is not None:
            v = (v * weights.reshape(*weights.shape, *(1,) * (v.ndim - weights.ndim))).to(v.dtype)
    product = getattr(likelihood, "fisher_product", None)
    if product is not None:
        return product(outputs, v)  # type: ignore[no-any-return]
    root = getattr(likelihood, "fisher_sqrt", None)
    if root is not None:
        columns = root(outputs)
        return torch.einsum("sn,sn...->n...", (columns * v).flatten(2).sum(-1), columns)

    def slope(f: Tensor) -> Tensor:
        return grad(lambda g: likelihood.nll(g, targets).sum())(f)  # type: ignore[attr-defined, no-any-return]

    try:
        # reverse over reverse mode: the pullback of the gradient is symmetric
        return vjp(slope, outputs)[1](v)[0]  # type: ignore[no-any-return]
    except (RuntimeError, NotImplementedError) as error:
        raise LikelihoodError(
            f"the curvature of the outputs is needed, but nll cannot be differentiated twice ({str(error)[:120]}): "
            "give the likelihood a fisher_product(outputs, v), or set a learning rate and momentum."
        ) from error


def weighs(likelihood: object) -> bool:
    """Return True if the weights of observations cannot be known without targets."""
    return hasattr(likelihood, "observed") and bool(getattr(likelihood, "weighted", True))


def uniform(shape: torch.Size, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Return noise that is uniform in [0, 1)."""
    return torch.rand(shape, generator=generator, dtype=dtype, device=generator.device)


def within_range(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in another type, whose largest number stands for larger ones: float16 would make them infinite."""
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)


def sum_over_outputs(x: Tensor) -> Tensor:
    """Convert `[N, …]` to `[N]`."""
    return x.reshape(x.shape[0], -1).sum(-1)


def diagonal_columns(scale: Tensor) -> Tensor:
    """Convert `[N, *d]` to `[D, N, *d]`: column j is `scale` at output j and zero elsewhere."""
    eye = torch.eye(scale[0].numel(), dtype=scale.dtype, device=scale.device)
    return (eye.unsqueeze(1) * scale.reshape(1, scale.shape[0], -1)).reshape(-1, *scale.shape)


def check_shape(targets: Tensor, expected: torch.Size, name: str, rule: str) -> None:
    """Raise unless the targets of a likelihood of this name are real and have the expected shape; `rule` says why.

    Raises:
        StructureError: no tensor.
        TargetError: complex numbers.
        ShapeError: another shape.
    """
    expect(targets, Tensor, "targets", rule)
    if targets.is_complex():
        raise TargetError(f"{name} targets are real numbers, got {targets.dtype}.")
    if targets.shape != expected:
        raise ShapeError(
            f"{name} targets have shape {tuple(targets.shape)}, expected {tuple(expected)} ({rule}). "
            "Check the batch and the model's last layer."
        )
