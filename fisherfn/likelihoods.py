"""Likelihoods: negative log-likelihoods, samples, and square roots of the Fisher of the outputs.

Every likelihood sums over output dimensions and does not average, so that loss and Fisher share one scale. The library
takes the mean over examples (docs/conventions.md).
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

from fisherfn.errors import HyperparameterError, LikelihoodError, ShapeError, TargetError, expect, expect_number
from fisherfn.types import PyTree


@runtime_checkable
class Likelihood(Protocol):
    """The likelihood protocol.

    Your own likelihood needs `nll`, `sample` for "mc", and `fisher_sqrt` for "type2". Four more methods are optional:

    - `noise(shape, generator, dtype)`: the noise for `sample`, if it is not one uniform number per output;
    - `valid(outputs, targets)`: a mask that is true if the targets are in range;
    - `fisher_product(outputs, v)`: the output Fisher times v, cheaper than from the columns of its root;
    - `observed(outputs, targets)`, if observations have different weights: the likelihood that scores sampled labels,
      and a weight per example or position that multiplies the Fisher of "mc" and "type2".
    """

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return `-log p(targets | outputs)` of each example, `[N]`, up to an additive constant."""
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

    Outputs `[N, …, C]` are logits. The class takes the targets and options of `torch.nn.functional.cross_entropy`:

    - class indices `[N, …]`; positions whose index is `ignore_index` do not count;
    - class probabilities `[N, …, C]` (soft labels, mixup, distillation), in floating point;
    - a pair `(labels, weights)` of either with a weight for each example `[N]` or position `[N, …]`.

    The loss is the sum over positions, averaged over **all N examples** of the batch. Torch's `reduction="mean"`
    divides by the number (or total weight) of counted positions instead: its value is this one times N over that
    number, and a damping λ here corresponds to λ times the same factor there.

    With $m$ the total target mass of a position (1 for a plain label, 0 for an ignored one, else the product of its
    weights), the Fisher of "mc" and "type2" is the Gauss-Newton matrix of this loss,
    $\frac1N \sum m\, J^\top (\mathrm{diag}(p) - pp^\top) J$: a weight of 2 counts as an example seen twice. The
    empirical Fisher is built from the gradients of the weighted loss terms, so it contains the weights squared.

    Args:
        ignore_index: the index of positions that do not count.
        weight: a weight for each class, `[C]`.
        label_smoothing: the share ε of every label that is distributed evenly over all classes, in [0, 1].

    >>> Categorical().nll(torch.zeros(1, 2), torch.tensor([0]))  # log 2
    tensor([0.6931])
    >>> Categorical().nll(torch.zeros(1, 3, 2), torch.tensor([[0, -100, -100]]))
    tensor([0.6931])
    """

    ignore_index: int = -100
    weight: Tensor | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.weight is not None and not isinstance(self.weight, Tensor):
            raise HyperparameterError(f"Categorical weight is a tensor [C] or None, got {type(self.weight).__name__}.")
        expect_number("label_smoothing", self.label_smoothing, lambda v: 0 <= v <= 1, "must lie in [0, 1]")
        expect_number("ignore_index", self.ignore_index, lambda v: True, "must be a whole number", whole=True)

    def nll(self, outputs: Float[Tensor, "n *t c"], targets: PyTree) -> Float[Tensor, " n"]:
        labels, weights = self._split(outputs, targets)
        if labels.is_floating_point():
            mass = self._class_weights(outputs) * self._smooth(labels.to(outputs.dtype))
            # a class without mass does not count, whatever its logit (0 · inf is NaN)
            picked = torch.where(mass == 0, 0.0, mass * outputs).sum(-1)
            nll = mass.sum(-1) * torch.logsumexp(outputs, -1) - picked
        else:
            nll = self._of_indices(outputs, labels)
        return _sum(nll if weights is None else weights * nll)

    def _of_indices(self, outputs: Float[Tensor, "n *t c"], labels: Int[Tensor, "n *t"]) -> Float[Tensor, "n *t"]:
        index = labels.clamp(0, outputs.shape[-1] - 1).long().unsqueeze(-1)
        # log-sum-exp minus the picked logit: the softmax is never stored
        normaliser = torch.logsumexp(outputs, -1)
        nll = normaliser - outputs.gather(-1, index).squeeze(-1)
        if self.weight is not None:
            nll = nll * self._class_weights(outputs)[index.squeeze(-1)]
        if self.label_smoothing:
            spread = self._class_weights(outputs) / outputs.shape[-1]
            smooth = spread.sum() * normaliser - (spread * outputs).sum(-1)
            nll = (1 - self.label_smoothing) * nll + self.label_smoothing * smooth
        inside = (labels >= 0) & (labels < outputs.shape[-1])
        return torch.where(labels == self.ignore_index, 0.0, torch.where(inside, nll, math.nan))

    def observed(self, outputs: Float[Tensor, "n *t c"], targets: PyTree) -> tuple[Categorical, Tensor | None]:
        """Return the distribution that labels are sampled from, and each position's target mass `[N, …]`.

        Without targets (None) every position counts the same.
        """
        if targets is None:
            return Categorical(), None
        labels, weights = self._split(outputs, targets)
        classes = self._class_weights(outputs)
        if labels.is_floating_point():
            mass = (classes * self._smooth(labels.to(outputs.dtype))).sum(-1)
        else:
            own = classes[labels.clamp(0, outputs.shape[-1] - 1).long()]
            mass = (1 - self.label_smoothing) * own + self.label_smoothing * classes.mean()
            mass = torch.where(labels == self.ignore_index, 0.0, mass)
        return Categorical(), mass if weights is None else weights * mass

    def sample(self, outputs: Float[Tensor, "n *t c"], noise: Float[Tensor, "n *t"]) -> Int[Tensor, "n *t"]:
        """Sample by the inverse distribution function: class c if `cdf[c-1] <= noise < cdf[c]`, noise in [0, 1)."""
        cdf = outputs.to(noise.dtype).softmax(-1).cumsum(-1)
        return (cdf <= noise.unsqueeze(-1)).sum(-1).clamp(max=outputs.shape[-1] - 1)

    def noise(self, shape: torch.Size, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        return _uniform(shape[:-1], generator, dtype)

    def fisher_sqrt(self, outputs: Float[Tensor, "n *t c"]) -> Float[Tensor, "columns n *t c"]:
        r"""Return one column $\sqrt{p_c}\,(e_c - p)$ per position and class.

        Their sum of squares is $\sum s s^\top = \mathrm{diag}(p) - pp^\top$.
        """
        p = outputs.softmax(-1)
        classes = p.shape[-1]
        eye = torch.eye(classes, dtype=p.dtype, device=p.device)
        positions = p.reshape(p.shape[0], -1, classes)
        columns = positions.sqrt().permute(2, 0, 1).unsqueeze(-1) * (eye[:, None, None] - positions)  # [c, n, t, c']
        if positions.shape[1] == 1:
            return columns.reshape(classes, *outputs.shape)
        # positions are independent: each column is nonzero at one of them
        one = torch.eye(positions.shape[1], dtype=p.dtype, device=p.device)
        return torch.einsum("ut,cntd->ucntd", one, columns).reshape(-1, *outputs.shape)

    def fisher_product(self, outputs: Float[Tensor, "n *t c"], v: Float[Tensor, "n *t c"]) -> Float[Tensor, "n *t c"]:
        r"""Return $(\mathrm{diag}(p) - pp^\top)\, v$ at every position."""
        p = outputs.softmax(-1)
        return p * (v - (p * v).sum(-1, keepdim=True))

    def valid(self, outputs: Tensor, targets: PyTree) -> Bool[Tensor, ""]:
        labels, weights = self._split(outputs, targets)
        classes = outputs.shape[-1]
        if labels.is_floating_point():
            valid = (labels >= 0) & torch.isfinite(labels) & ~((labels > 0) & (outputs == -math.inf))
        else:
            picked = outputs.gather(-1, labels.clamp(0, classes - 1).long().unsqueeze(-1)).squeeze(-1)
            inside = (labels >= 0) & (labels < classes) & (picked != -math.inf)
            valid = inside | (labels == self.ignore_index)
        if self.label_smoothing:  # every class has some mass
            valid = valid.all() & (outputs != -math.inf).all()
        return valid.all() if weights is None else valid.all() & ((weights >= 0) & torch.isfinite(weights)).all()

    def _split(self, outputs: Tensor, targets: PyTree) -> tuple[Tensor, Tensor | None]:
        """Return labels, and the weight of every position or None; raise unless their shapes and types fit."""
        labels, weights = targets if isinstance(targets, (tuple, list)) and len(targets) == 2 else (targets, None)
        expect(labels, Tensor, "targets", "pass class indices, class probabilities, or (labels, weights)")
        positions = outputs.shape[:-1]
        if labels.is_floating_point():
            if labels.shape != outputs.shape:
                raise TargetError(
                    f"Categorical targets are class indices (integers) of shape {tuple(positions)}, or class "
                    f"probabilities of shape {tuple(outputs.shape)}; got {labels.dtype} of shape {tuple(labels.shape)}."
                )
        elif labels.dtype == torch.bool or labels.is_complex():
            raise TargetError(
                f"Categorical targets are class indices (integers) or class probabilities, got {labels.dtype}."
            )
        else:
            rule = "one class index for each position; class probabilities are floating-point"
            _same_shape(labels, positions, "Categorical", rule)
        if weights is None:
            return labels, None
        expect(weights, Tensor, "weights", "pass a tensor with a weight for each example or position")
        if weights.shape not in (positions[:1], positions):
            _same_shape(weights, positions, "Categorical weights as", "a weight for each example or position")
        weights = weights.to(outputs.dtype)
        return labels, weights.reshape(*weights.shape, *(1,) * (len(positions) - weights.ndim)).expand(positions)

    def _class_weights(self, outputs: Tensor) -> Float[Tensor, " c"]:
        classes = outputs.shape[-1:]
        if self.weight is None:
            return outputs.new_ones(classes)
        if self.weight.shape != classes:
            raise ShapeError(
                f"Categorical weight has shape {tuple(self.weight.shape)}, and the model has {classes[0]} classes: "
                "pass one weight for each class."
            )
        return self.weight.to(outputs)

    def _smooth(self, probabilities: Float[Tensor, "n *t c"]) -> Float[Tensor, "n *t c"]:
        if not self.label_smoothing:
            return probabilities
        return (1 - self.label_smoothing) * probabilities + self.label_smoothing / probabilities.shape[-1]


@dataclass(frozen=True)
class Bernoulli:
    r"""Independent coin flips: binary images, multi-label classification.

    $-\log p(y \mid f) = \sum_j \log(1 + e^{f_j}) - y_j f_j$ for logits; with `logits=False` the outputs are the
    probabilities themselves (a network that ends in a sigmoid), clamped away from 0 and 1 by machine precision.
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
        """Return one where `noise < p`, with noise uniform in [0, 1)."""
        p = outputs.sigmoid() if self.logits else outputs
        return (noise < p).to(outputs.dtype)

    def fisher_sqrt(self, outputs: Float[Tensor, "n *d"]) -> Float[Tensor, "columns n *d"]:
        r"""Return one column per output: $\sqrt{p(1-p)}\,e_j$ for logits, $e_j / \sqrt{p(1-p)}$ for probabilities."""
        p = outputs.sigmoid() if self.logits else self._inside(outputs)
        deviation = (p * (1 - p)).sqrt()
        return _diagonal_columns(deviation if self.logits else deviation.reciprocal())

    def fisher_product(self, outputs: Float[Tensor, "n *d"], v: Float[Tensor, "n *d"]) -> Float[Tensor, "n *d"]:
        r"""Return $p(1-p)\,v$ for logits, $v / (p(1-p))$ for probabilities."""
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
    r"""A Gaussian with the outputs as mean and one fixed variance: regression, real-valued autoencoders.

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
        """Return `outputs + σ · noise`, with standard normal noise."""
        return outputs + math.sqrt(self.variance) * noise

    def noise(self, shape: torch.Size, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)

    def fisher_sqrt(self, outputs: Float[Tensor, "n *d"]) -> Float[Tensor, "columns n *d"]:
        r"""Return one column per output: $e_j / \sigma$."""
        return _diagonal_columns(torch.full_like(outputs, 1 / math.sqrt(self.variance)))

    def fisher_product(self, outputs: Float[Tensor, "n *d"], v: Float[Tensor, "n *d"]) -> Float[Tensor, "n *d"]:
        r"""Return $v / \sigma^2$."""
        return v / self.variance

    def valid(self, outputs: Tensor, targets: Tensor) -> Bool[Tensor, ""]:
        return torch.isfinite(targets).all()


def draw(likelihood: object, shape: torch.Size, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Return the noise for outputs of this shape: the likelihood's own, else one uniform number per output."""
    own = getattr(likelihood, "noise", None)
    return own(shape, generator, dtype) if own is not None else _uniform(shape, generator, dtype)


def output_fisher(likelihood: object, outputs: Tensor, targets: Any, v: Tensor) -> Tensor:
    """Return B v for every example, where B is the Fisher of its outputs.

    Uses `fisher_product` or the columns of `fisher_sqrt`. For a likelihood with neither (a plain callable), B is the
    second derivative of its `nll` with respect to the outputs, at the targets of the data.

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
            f"the curvature of the outputs is needed, but nll cannot be differentiated twice ({str(error)[:120]}): "
            "give the likelihood a fisher_product(outputs, v), or set a learning rate and momentum."
        ) from error


def _uniform(shape: torch.Size, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=dtype, device=generator.device)


def _sum(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1).sum(-1)


def _diagonal_columns(scale: Tensor) -> Tensor:
    """Convert `[N, *d]` to `[D, N, *d]`: column j is `scale` at output j and zero elsewhere."""
    eye = torch.eye(scale[0].numel(), dtype=scale.dtype, device=scale.device)
    return (eye.unsqueeze(1) * scale.reshape(1, scale.shape[0], -1)).reshape(-1, *scale.shape)


def _same_shape(targets: Tensor, expected: torch.Size, name: str, rule: str) -> None:
    expect(targets, Tensor, "targets", rule)
    if targets.shape != expected:
        raise ShapeError(
            f"{name} targets have shape {tuple(targets.shape)}, expected {tuple(expected)} ({rule}). "
            "Check the batch and the model's last layer."
        )
