"""Likelihoods: negative log-likelihoods, samples, and square roots of the Fisher of the outputs.

Every likelihood sums over output dimensions and does not average, so that loss and Fisher share one scale. The library
takes the mean over examples (docs/conventions.md).
"""

from fisherfn.likelihoods.base import Callback, Likelihood, Nll, as_likelihood, draw, output_fisher, weighs
from fisherfn.likelihoods.bernoulli import Bernoulli
from fisherfn.likelihoods.categorical import Categorical
from fisherfn.likelihoods.gaussian import Gaussian
from fisherfn.likelihoods.weighted import Weighted

__all__ = [
    "Bernoulli",
    "Callback",
    "Categorical",
    "Gaussian",
    "Likelihood",
    "Nll",
    "Weighted",
    "as_likelihood",
    "draw",
    "output_fisher",
    "weighs",
]
