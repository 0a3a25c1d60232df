"""The categorical likelihood: classes, class probabilities and weights, with the options of torch's cross-entropy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fisherfn import masked
from fisherfn.errors import HyperparameterError, ShapeError, TargetError, expect, expect_number
from fisherfn.likelihoods.base import check_shape, sum_over_outputs, uniform
from fisherfn.types import PyTree, at_least_single, single


@dataclass(frozen=True, eq=False)
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
        if self.weight is not None:
            sound = ((self.weight >= 0) & torch.isfinite(self.weight)).all()
            if self.weight.ndim != 1 or (masked.is_concrete(sound) and not sound):
                raise HyperparameterError("Categorical weight must be a tensor [C] of finite numbers >= 0.")
        expect_number("label_smoothing", self.label_smoothing, lambda v: 0 <= v <= 1, "must lie in [0, 1]")
        expect_number("ignore_index", self.ignore_index, lambda v: True, "must be a whole number", whole=True)

    def __eq__(self, other: object) -> bool:
        """Return True for the same options; class weights are compared entry by entry."""
        if not isinstance(other, Categorical):
            return NotImplemented
        one, two = self.weight, other.weight
        known = one is not None and two is not None and one.device == two.device
        same = one is two or (known and torch.equal(one, two))  # type: ignore[arg-type]
        return same and (self.ignore_index, self.label_smoothing) == (other.ignore_index, other.label_smoothing)

    def __hash__(self) -> int:
        return hash((self.ignore_index, self.label_smoothing))

    @property
    def weighted(self) -> bool:
        """True if plain labels have weights: those of their classes."""
        return self.weight is not None

    def nll(self, outputs: Float[Tensor, "n *t c"], targets: PyTree) -> Float[Tensor, " n"]:
        labels, weights = self._split(outputs, targets)
        outputs = single(outputs)  # else the logits' common shift would decide how much of the loss is rounded
        if labels.is_floating_point():
            mass = self._class_weights(outputs) * self._smooth(labels.to(outputs.dtype))
            # a class without mass does not count, whatever its logit (0 · inf is NaN)
            picked = torch.where(mass == 0, 0.0, mass * outputs).sum(-1)
            nll = mass.sum(-1) * torch.logsumexp(outputs, -1) - picked
        else:
            nll = self._of_indices(outputs, labels)
        return sum_over_outputs(nll if weights is None else weights * nll)

    def _of_indices(self, outputs: Float[Tensor, "n *t c"], labels: Int[Tensor, "n *t"]) -> Float[Tensor, "n *t"]:
        index = labels.clamp(0, outputs.shape[-1] - 1).unsqueeze(-1)
        # log-sum-exp minus the logit of the class: the softmax is never stored
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
        outputs = single(outputs)
        classes = self._class_weights(outputs)
        if labels.is_floating_point():
            mass = (classes * self._smooth(labels.to(outputs.dtype))).sum(-1)
        else:
            own = classes[labels.clamp(0, outputs.shape[-1] - 1)]
            mass = (1 - self.label_smoothing) * own + self.label_smoothing * classes.mean()
            mass = torch.where(labels == self.ignore_index, 0.0, mass)
        return Categorical(), mass if weights is None else weights * mass

    def sample(self, outputs: Float[Tensor, "n *t c"], noise: Float[Tensor, "n *t"]) -> Int[Tensor, "n *t"]:
        """Sample by the inverse distribution function: class c if `cdf[c-1] <= noise < cdf[c]`, noise in [0, 1)."""
        cdf = outputs.to(at_least_single(noise.dtype)).softmax(-1).cumsum(-1)
        # rounding may end the sum below the noise: then the last class with a probability, which need not be the last
        last = (cdf < cdf[..., -1:]).sum(-1)
        return (cdf <= noise.unsqueeze(-1)).sum(-1).minimum(last)

    def noise(self, shape: torch.Size, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        return uniform(shape[:-1], generator, dtype)

    def fisher_sqrt(self, outputs: Float[Tensor, "n *t c"]) -> Float[Tensor, "columns n *t c"]:
        r"""Return one column $\sqrt{p_c}\,(e_c - p)$ per position and class.

        Their sum of squares is $\sum s s^\top = \mathrm{diag}(p) - pp^\top$.
        """
        p = single(outputs).softmax(-1)
        classes = p.shape[-1]
        eye = torch.eye(classes, dtype=p.dtype, device=p.device)
        positions = p.reshape(p.shape[0], -1, classes)
        columns = positions.sqrt().permute(2, 0, 1).unsqueeze(-1) * (eye[:, None, None] - positions)  # [c, n, t, c']
        if positions.shape[1] == 1:
            return columns.reshape(classes, *outputs.shape).to(outputs.dtype)
        # positions are independent: each column is nonzero at one of them
        one = torch.eye(positions.shape[1], dtype=p.dtype, device=p.device)
        return torch.einsum("ut,cntd->ucntd", one, columns).reshape(-1, *outputs.shape).to(outputs.dtype)

    def fisher_product(self, outputs: Float[Tensor, "n *t c"], v: Float[Tensor, "n *t c"]) -> Float[Tensor, "n *t c"]:
        r"""Return $(\mathrm{diag}(p) - pp^\top)\, v$ at every position."""
        p = single(outputs).softmax(-1)
        return (p * (v - (p * v).sum(-1, keepdim=True))).to(v.dtype)

    def valid(self, outputs: Tensor, targets: PyTree) -> Bool[Tensor, ""]:
        labels, weights = self._split(outputs, targets)
        classes = outputs.shape[-1]
        # a logit of minus infinity excludes its class, unless others overflow, too: the loss shows that fault
        masked_out = (outputs == -math.inf) & (outputs < math.inf).all()
        if labels.is_floating_point():
            valid = (labels >= 0) & torch.isfinite(labels) & ~((labels > 0) & masked_out)
        else:
            picked = masked_out.gather(-1, labels.clamp(0, classes - 1).unsqueeze(-1)).squeeze(-1)
            inside = (labels >= 0) & (labels < classes) & ~picked
            valid = inside | (labels == self.ignore_index)
        if self.label_smoothing:  # every class has some mass
            valid = valid.all() & ~masked_out.any()
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
            check_shape(labels, positions, "Categorical", rule)
            labels = labels.long()  # in eight bits, class 156 would equal an ignore_index of -100
        if weights is None:
            return labels, None
        expect(weights, Tensor, "weights", "pass a tensor with a weight for each example or position")
        if weights.shape not in (positions[:1], positions):
            check_shape(weights, positions, "Categorical weights as", "a weight for each example or position")
        weights = weights.to(at_least_single(outputs.dtype))
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
