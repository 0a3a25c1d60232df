"""The drop-in shell: a torch optimizer and a preconditioner around the pure core, for existing training loops."""

from fisherfn.optim.natural_gradient import NaturalGradient
from fisherfn.optim.preconditioner import Preconditioner

__all__ = ["NaturalGradient", "Preconditioner"]
