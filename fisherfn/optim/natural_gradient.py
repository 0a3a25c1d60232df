"""The former place of `NaturalGradient`, for one more version."""

from fisherfn.optim.optimizer import NaturalGradient

__all__ = ["NaturalGradient"]
