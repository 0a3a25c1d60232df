"""What the outputs mean: negative log-likelihoods, their samples and the square roots of their output Fisher.

Every likelihood sums over output dimensions and averages nothing, so that loss and Fisher share one scale: the mean
over examples is taken once, by the library (docs/conventions.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.func import grad, vjp
from torch.nn import functional as F

from fisherfn.errors import HyperparameterError, LikelihoodError, ShapeError, TargetError, expect


@runtime_checkable
class Likelihood(Protocol):
    """The likelihood protocol.

    One's own needs only what its Fisher needs: `nll` always, `sample` for "mc", `fisher_sqrt` for "type2". Three more
    methods are optional: `noise(shape, generator, dtype)` where the draw is not one uniform number an output,
    `valid(outputs, targets)`, a mask that says whether targets are in range, and `fisher_product(outputs, v)`, the
    output Fisher times v, which is cheaper than by the columns of its root.
    """

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`-log p(targets | outputs)` of each example, `[N]`, up to an additive constant."""
        ...


Nll: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Callback:
    """A plain callable `(outputs, targets) -> [N]` as a likelihood for the empirical Fisher."""

    fn: Nll

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.fn(outputs, targets)


@dataclass(frozen=True)
class Categorical:
    r"""Class probabilities `softmax(outputs)` over the last axis: classification, language models.

    $-\log p(y \mid f) = \log \sum_c e^{f_c} - f_y$, summed over positions between the first and the last axis.
    Outputs `[N, …, C]` are logits, targets `[N, …]` class indices.

    >>> Categorical().nll(torch.zeros(1, 2), torch.tensor([0]))  # log 2
    tensor([0.6931])
    """

    def nll(self, outputs: Float[Tensor, "n *t c"], targets: Tensor) -> Float[Tensor, " n"]:
        expect(targets, Tensor, "targets", "one class index for each position")
        if targets.is_floating_point() or targets.dtype == torch.bool:
            raise TargetError(
                f"Categorical targets are class indices (integers), got {targets.dtype}; use targets.long()."
            )
        _same_shape(targets, outputs.shape[:-1], "Categorical", "one class index for each position")
        inside = (targets >= 0) & (targets < outputs.shape[-1])
        index = targets.clamp(0, outputs.shape[-1] - 1).long().unsqueeze(-1)
        # log-sum-exp minus the picked logit: the softmax is never stored
        picked = outputs.gather(-1, index).squeeze(-1)
        nll = torch.logsumexp(outputs, -1) - picked
        return _sum(torch.where(inside, nll, math.nan))

    def sample(self, outputs: Float[Tensor, "n *t c"], noise: Float[Tensor, "n *t"]) -> Int[Tensor, "n *t"]:
        """Inverse distribution function: class c when `cdf[c-1] <= noise < cdf[c]`, noise uniform in [0, 1)."""
        cdf = outputs.to(noise.dtype).softmax(-1).cumsum(-1)
        return (cdf <= noise.unsqueeze(-1)).sum(-1).clamp(max=outputs.shape[-1] - 1)

    def noise(self, shape: torch.Size, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        return _uniform(shape[:-1], generator, dtype)

    def fisher_sqrt(self, outputs: Float[Tensor, "n *t c"]) -> Float[Tensor, "columns n *t c"]:
        r"""Columns $\sqrt{p_c}\,(e_c - p)$ a position and class: $\sum s s^\top = \mathrm{diag}(p) - pp^\top$."""
        p = outputs.softmax(-1)
        classes = p.shape[-1]
        eye = torch.eye(classes, dtype=p.dtype, device=p.device)
        positions = p.reshape(p.shape[0], -1, classes)
        columns = positions.sqrt().permute(2, 0, 1).unsqueeze(-1) * (eye[:, None, None] - positions)  # [c, n, t, c']
        if positions.shape[1] == 1:
            return columns.reshape(classes, *outputs.shape)
        # positions are independent: a column lives on one of them
        one = torch.eye(positions.shape[1], dtype=p.dtype, device=p.device)
        return torch.einsum("ut,cntd->ucntd", one, columns).reshape(-1, *outputs.shape)

    def fisher_product(self, outputs: Float[Tensor, "n *t c"], v: Float[Tensor, "n *t c"]) -> Float[Tensor, "n *t c"]:
        r"""$(\mathrm{diag}(p) - pp^\top)\, v$ at every position."""
        p = outputs.softmax(-1)
        return p * (v - (p * v).sum(-1, keepdim=True))

    def valid(self, outputs: Tensor, targets: Tensor) -> Bool[Tensor, ""]:
        return ((targets >= 0) & (targets < outputs.shape[-1])).all()


@dataclass(frozen=True)
class Bernoulli:
    r"""Independent coin flips: binary images, multi-label classification.

    $-\log p(y \mid f) = \sum_j \log(1 + e^{f_j}) - y_j f_j$ for logits; with `logits=False` the outputs are the
    probabilities themselves (a net that ends in a sigmoid), kept away from 0 and 1 by machine precision.
    Targets have the shape of the outputs and lie in [0, 1].

    >>> Bernoulli().nll(torch.zeros(1, 2), torch.ones(1, 2))  # 2 log 2
    tensor([1.3863])
    """

    logits: bool = True

    def nll(self, outputs: Float[Tensor, "n *d"], targets: Tensor) -> Float[Tensor, " n"]:
        _same_shape(targets, outputs.shape, "Bernoulli", "a target for each output")
        targets = targets.to(outputs.dtype)
        if self.logits:
            nll = F.softplus(outputs) - targets * outputs
        else:
            p = self._inside(outputs)
            nll = -(targets * p.log() + (1 - targets) * torch.log1p(-p))
        return _sum(torch.where((targets >= 0) & (targets <= 1), nll, math.nan))

    def sample(self, outputs: Float[Tensor, "n *d"], noise: Float[Tensor, "n *d"]) -> Float[Tensor, "n *d"]:
        """One where `noise < p`, noise uniform in [0, 1)."""
        p = outputs.sigmoid() if self.logits else outputs
        return (noise < p).to(outputs.dtype)

    def fisher_sqrt(self, outputs: Float[Tensor, "n *d"]) -> Float[Tensor, "columns n *d"]:
        r"""One column an output: $\sqrt{p(1-p)}\,e_j$ for logits, $e_j / \sqrt{p(1-p)}$ for probabilities."""
        p = outputs.sigmoid() if self.logits else self._inside(outputs)
        deviation = (p * (1 - p)).sqrt()
        return _diagonal_columns(deviation if self.logits else deviation.reciprocal())

    def fisher_product(self, outputs: Float[Tensor, "n *d"], v: Float[Tensor, "n *d"]) -> Float[Tensor, "n *d"]:
        r"""$p(1-p)\,v$ for logits, $v / (p(1-p))$ for probabilities."""
        p = outputs.sigmoid() if self.logits else self._inside(outputs)
        variance = p * (1 - p)
        return v * variance if self.logits else v / variance

    def valid(self, outputs: Tensor, targets: Tensor) -> Bool[Tensor, ""]:
        return ((targets >= 0) & (targets <= 1)).all()

    def _inside(self, p: Tensor) -> Tensor:
        eps = torch.finfo(p.dtype).eps
        return p.clamp(eps, 1 - eps)


@dataclass(frozen=True)
class Gaussian:
    r"""Outputs are the mean, with one fixed variance: regression, real-valued autoencoders.

    $-\log p(y \mid f) = \frac{1}{2\sigma^2} \sum_j (y_j - f_j)^2$; σ² = 1/2 is the plain sum of squares.

    >>> Gaussian().nll(torch.zeros(1, 2), torch.ones(1, 2))
    tensor([1.])
    """

    variance: float = 1.0

    def __post_init__(self) -> None:
        if not self.variance > 0:
            raise HyperparameterError(f"Gaussian variance must be positive, got {self.variance}.")

    def nll(self, outputs: Float[Tensor, "n *d"], targets: Tensor) -> Float[Tensor, " n"]:
        _same_shape(targets, outputs.shape, "Gaussian", "a target for each output")
        return _sum((targets - outputs).square()) / (2 * self.variance)

    def sample(self, outputs: Float[Tensor, "n *d"], noise: Float[Tensor, "n *d"]) -> Float[Tensor, "n *d"]:
        """`outputs + σ · noise`, noise standard normal."""
        return outputs + math.sqrt(self.variance) * noise

    def noise(self, shape: torch.Size, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)

    def fisher_sqrt(self, outputs: Float[Tensor, "n *d"]) -> Float[Tensor, "columns n *d"]:
        r"""One column an output: $e_j / \sigma$."""
        return _diagonal_columns(torch.full_like(outputs, 1 / math.sqrt(self.variance)))

    def fisher_product(self, outputs: Float[Tensor, "n *d"], v: Float[Tensor, "n *d"]) -> Float[Tensor, "n *d"]:
        r"""$v / \sigma^2$."""
        return v / self.variance

    def valid(self, outputs: Tensor, targets: Tensor) -> Bool[Tensor, ""]:
        return torch.isfinite(targets).all()


def draw(likelihood: object, shape: torch.Size, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """The noise for outputs of this shape: the likelihood's own, else one uniform number an output."""
    own = getattr(likelihood, "noise", None)
    return own(shape, generator, dtype) if own is not None else _uniform(shape, generator, dtype)


def output_fisher(likelihood: object, outputs: Tensor, targets: Any, v: Tensor) -> Tensor:
    """Return B v for every example, B the Fisher of its outputs.

    By `fisher_product` or the columns of `fisher_sqrt`. A likelihood with neither, a plain callable, has the second
    derivative of its `nll` in the outputs instead, at the targets of the data.

    Raises:
        LikelihoodError: an `nll` that cannot be differentiated twice.
    """
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
        # reverse over reverse: the gradient's own pullback is symmetric
        return vjp(slope, outputs)[1](v)[0]  # type: ignore[no-any-return]
    except (RuntimeError, NotImplementedError) as error:
        raise LikelihoodError(
            f"the curvature of the outputs is wanted, and nll cannot be differentiated twice ({str(error)[:120]}): give "
            "the likelihood a fisher_product(outputs, v), or set a learning rate and momentum."
        ) from error


def _uniform(shape: torch.Size, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=dtype, device=generator.device)


def _sum(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1).sum(-1)


def _diagonal_columns(scale: Tensor) -> Tensor:
    """`[N, *d] -> [D, N, *d]`: column j holds `scale` at output j and zero elsewhere."""
    eye = torch.eye(scale[0].numel(), dtype=scale.dtype, device=scale.device)
    return (eye.unsqueeze(1) * scale.reshape(1, scale.shape[0], -1)).reshape(-1, *scale.shape)


def _same_shape(targets: Tensor, expected: torch.Size, name: str, rule: str) -> None:
    expect(targets, Tensor, "targets", rule)
    if targets.shape != expected:
        raise ShapeError(
            f"{name} targets have shape {tuple(targets.shape)}, expected {tuple(expected)} ({rule}). "
            "Check the batch and the model's last layer."
        )
