"""Averages over a batch that may be spread over processes; here the batch is in one process."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from fisherfn.types import PyTree


class OneProcess:
    """Averages of a batch that this process holds as a whole. Data-parallel statistics replace them by messages."""

    examples: int

    def first(self, wanted: int) -> int:
        """Return how many of the first `wanted` examples of the batch this process holds: here all of them."""
        return min(wanted, self.examples)

    def mean(self, value: PyTree, examples: int) -> PyTree:
        """Return the mean over the examples of all processes, given the mean over `examples` ones here."""
        del examples
        return value

    def moments(self, losses: Float[Tensor, " n"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Return mean and variance over the whole batch, given the losses of the examples that this process holds."""
        return losses.mean(), losses.var(correction=0)
