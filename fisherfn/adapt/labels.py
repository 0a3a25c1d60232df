"""The number of labels of an example, which the defaults of adaptive steps are per."""

from __future__ import annotations

import math

from fisherfn.likelihoods import Categorical
from fisherfn.natgrad import NaturalGradient


def labels_per_example(ng: NaturalGradient) -> int:
    """Return the number of labels of an example: of classes one at each position (of a sequence, an image), else one.

    The losses of the positions add up, and so do the KL divergences between predictions.
    """
    return math.prod(ng.layout.output_shape[:-1]) if isinstance(ng.likelihood, Categorical) else 1
