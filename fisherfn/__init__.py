"""fisherfn: natural gradients and curvature for PyTorch, as pure functions on `torch.func`."""

from fisherfn import errors, likelihoods, members, optim, tree
from fisherfn.adapt import Adapted, Adaptive, AdaptiveState, Cadence, QuadraticModel, adaptive, kl_clip, quadratic_model
from fisherfn.base import Method
from fisherfn.compiled import compile
from fisherfn.conjugate_gradients import conjugate_gradients
from fisherfn.errors import FisherfnError, check
from fisherfn.fisher import Fisher
from fisherfn.influence import example_gradients, influence_scores
from fisherfn.laplace import Laplace, LaplaceState, laplace
from fisherfn.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from fisherfn.methods import (
    METHODS,
    deflation,
    ekfac,
    exact,
    kfac,
    kfac_corrected,
    kl_optimal,
    kpsvd,
    lanczos,
    two_level,
)
from fisherfn.natgrad import NaturalGradient, natural_gradient
from fisherfn.operators import Approximation, DampedInverse
from fisherfn.randomness import dropout_seeds
from fisherfn.state import State
from fisherfn.stats import ImplicitFisher, Layout, Stats, functional
from fisherfn.taps import Tap
from fisherfn.types import Info

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Adapted",
    "Adaptive",
    "AdaptiveState",
    "Approximation",
    "Bernoulli",
    "Cadence",
    "Categorical",
    "DampedInverse",
    "Fisher",
    "FisherfnError",
    "Gaussian",
    "ImplicitFisher",
    "Info",
    "Laplace",
    "LaplaceState",
    "Layout",
    "Likelihood",
    "Method",
    "NaturalGradient",
    "QuadraticModel",
    "State",
    "Stats",
    "Tap",
    "adaptive",
    "check",
    "compile",
    "conjugate_gradients",
    "deflation",
    "dropout_seeds",
    "ekfac",
    "errors",
    "exact",
    "example_gradients",
    "functional",
    "influence_scores",
    "kfac",
    "kfac_corrected",
    "kl_clip",
    "kl_optimal",
    "kpsvd",
    "lanczos",
    "laplace",
    "likelihoods",
    "members",
    "natural_gradient",
    "optim",
    "quadratic_model",
    "tree",
    "two_level",
]
