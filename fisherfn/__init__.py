"""fisherfn: natural gradients and curvature for PyTorch, as pure functions on `torch.func`."""

from fisherfn import distributed, errors, likelihoods, members, optim, tree
from fisherfn.adapt import (
    Adapted,
    Adaptive,
    AdaptiveState,
    Cadence,
    LineSearch,
    QuadraticModel,
    Spring,
    SpringState,
    adaptive,
    kl_clip,
    line_search,
    norm_clip,
    quadratic_model,
    spring,
)
from fisherfn.base import Method
from fisherfn.compiled import compile
from fisherfn.conjugate_gradients import conjugate_gradients
from fisherfn.errors import FisherfnError, check
from fisherfn.fisher import Fisher
from fisherfn.free_constant import centred
from fisherfn.influence import example_gradients, influence_scores
from fisherfn.laplace import Laplace, LaplaceState, laplace
from fisherfn.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, Weighted
from fisherfn.methods import (
    METHODS,
    deflation,
    dense,
    ekfac,
    exact,
    kfac,
    kfac_by_term,
    kfac_corrected,
    kl_optimal,
    kpsvd,
    lanczos,
    two_level,
)
from fisherfn.natgrad import NaturalGradient, natural_gradient
from fisherfn.operators import Approximation, DampedInverse
from fisherfn.randomness import dropout_seeds
from fisherfn.stagger import Staggered, staggered
from fisherfn.state import State
from fisherfn.stats import ImplicitFisher, Layout, Stats, functional, join
from fisherfn.taps import Tap
from fisherfn.terms import Term, TermSum, sum_of_terms
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
    "LineSearch",
    "Method",
    "NaturalGradient",
    "QuadraticModel",
    "Spring",
    "SpringState",
    "Staggered",
    "State",
    "Stats",
    "Tap",
    "Term",
    "TermSum",
    "Weighted",
    "adaptive",
    "centred",
    "check",
    "compile",
    "conjugate_gradients",
    "deflation",
    "dense",
    "distributed",
    "dropout_seeds",
    "ekfac",
    "errors",
    "exact",
    "example_gradients",
    "functional",
    "influence_scores",
    "join",
    "kfac",
    "kfac_by_term",
    "kfac_corrected",
    "kl_clip",
    "kl_optimal",
    "kpsvd",
    "lanczos",
    "laplace",
    "likelihoods",
    "line_search",
    "members",
    "natural_gradient",
    "norm_clip",
    "optim",
    "quadratic_model",
    "spring",
    "staggered",
    "sum_of_terms",
    "tree",
    "two_level",
]
