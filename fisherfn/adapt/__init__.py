"""Step size, momentum and damping: KL bound, quadratic model, line search, SPRING, the optimizer without tuning."""

from fisherfn.adapt.build import adaptive
from fisherfn.adapt.cadence import Cadence, Due
from fisherfn.adapt.clip import clip_factor, default_kl_bound, kl_clip
from fisherfn.adapt.damping import START, adapted_damping, reduction_ratio
from fisherfn.adapt.line_search import LineSearch, line_search
from fisherfn.adapt.optimizer import Adaptive
from fisherfn.adapt.quadratic import QuadraticModel, quadratic_model
from fisherfn.adapt.spring import Spring, SpringState, norm_clip, spring
from fisherfn.adapt.state import Adapted, AdaptiveState

__all__ = [
    "START",
    "Adapted",
    "Adaptive",
    "AdaptiveState",
    "Cadence",
    "Due",
    "LineSearch",
    "QuadraticModel",
    "Spring",
    "SpringState",
    "adapted_damping",
    "adaptive",
    "clip_factor",
    "default_kl_bound",
    "kl_clip",
    "line_search",
    "norm_clip",
    "quadratic_model",
    "reduction_ratio",
    "spring",
]
