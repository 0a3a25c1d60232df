"""Drop-in classes for existing training loops: a torch optimizer and a preconditioner around the pure functions."""

from fisherfn.optim.optimizer import NaturalGradient
from fisherfn.optim.preconditioner import Preconditioner

__all__ = ["NaturalGradient", "Preconditioner"]
