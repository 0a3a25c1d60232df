"""The labels of an example: whether they are classes, and how many count. Defaults of adaptive steps follow."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn.likelihoods import Categorical, Weighted
from fisherfn.natgrad import NaturalGradient
from fisherfn.stats import Stats
from fisherfn.types import PyTree


def has_classes(likelihood: Any) -> bool:
    """Return True if the labels are classes, with or without a weight for each example."""
    while isinstance(likelihood, Weighted):
        likelihood = likelihood.likelihood
    return isinstance(likelihood, Categorical)


def labels_per_example(ng: NaturalGradient) -> int:
    """Return the number of labels of an example: of classes one at each position (of a sequence, an image), else one.

    The losses of the positions add up, and so do the KL divergences between predictions.
    """
    return math.prod(ng.layout.output_shape[:-1]) if has_classes(ng.likelihood) else 1


def target_mass(likelihood: Any, stats: Stats, targets: PyTree) -> Float[Tensor, ""]:
    """Return the mean over a batch of the number of outputs of an example, counted with the weights of its targets.

    A loss is a sum of so many terms, up to a constant factor: the classes of a position share its label. Ignored labels
    have no mass.
    """
    outputs = stats.outputs
    size = math.prod(outputs.shape[1:])
    observed = getattr(likelihood, "observed", None)
    weights = None if observed is None else observed(outputs, targets)[1]
    if weights is None:
        return torch.full_like(stats.loss, size, dtype=torch.float64)
    mean = weights.double().mean() if len(weights) else weights.double().sum()
    return stats.mean((size * mean,), len(weights))[0]  # type: ignore[no-any-return]
