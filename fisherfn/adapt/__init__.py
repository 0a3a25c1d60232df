"""Step size, momentum and damping: the KL bound, the quadratic model, cadences, and the optimizer without tuning."""

from fisherfn.adapt.build import adaptive
from fisherfn.adapt.cadence import Cadence, Due
from fisherfn.adapt.clip import clip_factor, kl_clip
from fisherfn.adapt.damping import adapted_damping, reduction_ratio
from fisherfn.adapt.optimizer import START, Adaptive
from fisherfn.adapt.quadratic import QuadraticModel, quadratic_model
from fisherfn.adapt.state import Adapted, AdaptiveState

__all__ = [
    "START",
    "Adapted",
    "Adaptive",
    "AdaptiveState",
    "Cadence",
    "Due",
    "QuadraticModel",
    "adapted_damping",
    "adaptive",
    "clip_factor",
    "kl_clip",
    "quadratic_model",
    "reduction_ratio",
]
