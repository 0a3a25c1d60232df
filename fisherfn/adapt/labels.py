"""The labels of an example: whether they are classes, and how many there are. Defaults of adaptive steps follow."""

from __future__ import annotations

import math
from typing import Any

from fisherfn.likelihoods import Categorical, Weighted
from fisherfn.natgrad import NaturalGradient


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
