"""The Bernoulli likelihood of binary outputs, given as logits or as probabilities."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from fisherfn.likelihoods.base import check_shape, diagonal_columns, sum_over_outputs, within_range
from fisherfn.types import at_least_single, single


@dataclass(frozen=True)
class Bernoulli:
    r"""Independent binary outputs: binary images, multi-label classification.

    $-\log p(y \mid f) = \sum_j \log(1 + e^{f_j}) - y_j f_j$ for logits; with `logits=False` the outputs are the
    probabilities themselves (a network that ends in a sigmoid), clamped away from 0 and 1 by machine precision (that
    of float32 for outputs in half precision).
    Targets have the shape of the outputs and lie in [0, 1]. An example with a target or a probability outside [0, 1]
    has the loss NaN.

    >>> Bernoulli().nll(torch.zeros(1, 2), torch.ones(1, 2))  # 2 log 2
    tensor([1.3863])
    """

    logits: bool = True

    def nll(self, outputs: Float[Tensor, "n *d"], targets: Tensor) -> Float[Tensor, " n"]:
        check_shape(targets, outputs.shape, "Bernoulli", "a target for each output")
        outputs = single(outputs)
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
        f = single(outputs)
        targets = targets.to(f.dtype)
        if self.logits:
            return (f.sigmoid() - targets).to(outputs.dtype)
        p = self._inside(f)
        slope = torch.where(p == f, (p - targets) / (p * (1 - p)), 0.0)  # clamped outputs have no gradient
        return within_range(slope, outputs.dtype)

    def sample(self, outputs: Float[Tensor, "n *d"], noise: Float[Tensor, "n *d"]) -> Float[Tensor, "n *d"]:
        """Return one where `noise < p`, with noise uniform in [0, 1)."""
        p = single(outputs).sigmoid() if self.logits else outputs
        return (noise < p).to(outputs.dtype)

    def fisher_sqrt(self, outputs: Float[Tensor, "n *d"]) -> Float[Tensor, "columns n *d"]:
        r"""Return one column per output: $\sqrt{p(1-p)}\,e_j$ for logits, $e_j / \sqrt{p(1-p)}$ for probabilities."""
        deviation = self._variance(outputs).sqrt()
        return diagonal_columns((deviation if self.logits else deviation.reciprocal()).to(outputs.dtype))

    def fisher_product(self, outputs: Float[Tensor, "n *d"], v: Float[Tensor, "n *d"]) -> Float[Tensor, "n *d"]:
        r"""Return $p(1-p)\,v$ for logits, $v / (p(1-p))$ for probabilities."""
        variance = self._variance(outputs)
        return within_range(v * variance if self.logits else v / variance, v.dtype)

    def valid(self, outputs: Tensor, targets: Tensor) -> Bool[Tensor, ""]:
        return self._valid_each(outputs, targets.to(at_least_single(outputs.dtype))).all()

    def _variance(self, outputs: Tensor) -> Tensor:
        """Return `p(1 − p)` in at least float32."""
        p = single(outputs).sigmoid() if self.logits else self._inside(single(outputs))
        return p * (1 - p)

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
