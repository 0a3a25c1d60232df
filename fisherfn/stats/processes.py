"""Averages over a batch that may be spread over processes; here the batch is in one process."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from fisherfn.types import PyTree


class OneProcess:
    """Averages of a batch that this process holds as a whole. Data-parallel statistics replace them by messages."""

    losses: Tensor

    def total(self, here: int) -> int:
        """Return the number of examples of the batch, given the number of those in this process: here the same."""
        return here

    def first(self, wanted: int, here: int) -> int:
        """Return how many of the first `wanted` examples of the batch are among the `here` ones of this process."""
        return min(wanted, here)

    def mean(self, value: PyTree, examples: int) -> PyTree:
        """Return the mean over the examples of all processes, given the mean over `examples` ones here."""
        del examples
        return value

    def measured(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Return the mean of the losses of the whole batch, and its squared standard error."""
        losses = self.losses.double()
        n = losses.shape[0]
        return losses.mean(), losses.var(correction=0) / max(n - 1, 1)
