"""The Bernoulli likelihood of binary outputs, given as logits or as probabilities."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from fisherfn.likelihoods.base import check_shape, diagonal_columns, sum_over_outputs


@dataclass(frozen=True)
class Bernoulli:
    r"""Independent binary outputs: binary images, multi-label classification.

    $-\log p(y \mid f) = \sum_j \log(1 + e^{f_j}) - y_j f_j$ for logits; with `logits=False` the outputs are the
    probabilities themselves (a network that ends in a sigmoid), clamped away from 0 and 1 by machine precision.
    Targets have the shape of the outputs and lie in [0, 1]. An example with a target or a probability outside [0, 1]
    has the loss NaN.

    >>> Bernoulli().nll(torch.zeros(1, 2), torch.ones(1, 2))  # 2 log 2
    tensor([1.3863])
    """

    logits: bool = True

    def nll(self, outputs: Float[Tensor, "n *d"], targets: Tensor) -> Float[Tensor, " n"]:
        check_shape(targets, outputs.shape, "Bernoulli", "a target for each output")
        targets = targets.to(outputs.dtype)
        if self.logits:
            nll = F.softplus(outputs) - targets * outputs
        else:
            p = self._inside(outputs)
            nll = -(targets * p.log() + (1 - targets) * torch.log1p(-p))
        return torch.where(self._valid_each(outputs, targets), sum_over_outputs(nll), math.nan)

    def score(self, outputs: Float[Tensor, "n *d"], targets: Tensor) -> Float[Tensor, "n *d"]:
        r"""Return the gradient of `nll` in the outputs: $p - y$ for logits, $(p - y) / (p(1-p))$ for probabilities."""
        check_shape(targets, outputs.shape, "Bernoulli", "a target for each output")
        targets = targets.to(outputs.dtype)
        if self.logits:
            return outputs.sigmoid() - targets
        p = self._inside(outputs)
        return torch.where(p == outputs, (p - targets) / (p * (1 - p)), 0.0)  # clamped outputs have no gradient

    def sample(self, outputs: Float[Tensor, "n *d"], noise: Float[Tensor, "n *d"]) -> Float[Tensor, "n *d"]:
        """Return one where `noise < p`, with noise uniform in [0, 1)."""
        p = outputs.sigmoid() if self.logits else outputs
        return (noise < p).to(outputs.dtype)

    def fisher_sqrt(self, outputs: Float[Tensor, "n *d"]) -> Float[Tensor, "columns n *d"]:
        r"""Return one column per output: $\sqrt{p(1-p)}\,e_j$ for logits, $e_j / \sqrt{p(1-p)}$ for probabilities."""
        p = outputs.sigmoid() if self.logits else self._inside(outputs)
        deviation = (p * (1 - p)).sqrt()
        return diagonal_columns(deviation if self.logits else deviation.reciprocal())

    def fisher_product(self, outputs: Float[Tensor, "n *d"], v: Float[Tensor, "n *d"]) -> Float[Tensor, "n *d"]:
        r"""Return $p(1-p)\,v$ for logits, $v / (p(1-p))$ for probabilities."""
        p = outputs.sigmoid() if self.logits else self._inside(outputs)
        variance = p * (1 - p)
        return v * variance if self.logits else v / variance

    def valid(self, outputs: Tensor, targets: Tensor) -> Bool[Tensor, ""]:
        return self._valid_each(outputs, targets.to(outputs.dtype)).all()

    def _valid_each(self, outputs: Float[Tensor, "n *d"], targets: Float[Tensor, "n *d"]) -> Bool[Tensor, " n"]:
        """Return whether all targets of an example lie in [0, 1], and no probability lies outside.

        NaN is the smallest and the largest of numbers. A target that is NaN is invalid; an output that is NaN is a
        fault of the model, which the mask of the loss reports.
        """
        flat = targets.reshape(targets.shape[0], -1)
        sound = (flat.amin(1) >= 0) & (flat.amax(1) <= 1)
        if self.logits:
            return sound
        p = outputs.reshape(outputs.shape[0], -1)
        return sound & ~((p.amin(1) < 0) | (p.amax(1) > 1))

    def _inside(self, p: Tensor) -> Tensor:
        eps = torch.finfo(p.dtype).eps
        return p.clamp(eps, 1 - eps)
