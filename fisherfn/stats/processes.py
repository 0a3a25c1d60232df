"""Averages over a batch that may be spread over processes; here the batch is in one process."""

from __future__ import annotations

import math
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor

from fisherfn.types import PyTree

MULTIPLIER = 53313
"""The multiplier with which `spread` meets every place of a rhythm of 2 to 16 examples most evenly, found by search."""


class OneProcess:
    """Averages of a batch that this process holds as a whole. Data-parallel statistics replace them by messages."""

    losses: Tensor

    def total(self, here: int) -> int:
        """Return the number of examples of the batch, given the number of those in this process: here the same."""
        return here

    def part(self, wanted: int, here: int) -> list[int]:
        """Return which of the `here` examples of this process are among `wanted` ones `spread` over the batch."""
        return spread(wanted, here)

    def mean(self, value: PyTree, examples: int) -> PyTree:
        """Return the mean over the examples of all processes, given the mean over `examples` ones here."""
        del examples
        return value

    def measured(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Return the mean of the losses of the whole batch, and its squared standard error: infinite for one loss."""
        losses = self.losses.double()
        mean = losses.mean()
        return mean, squared_error((losses - mean).square().mean(), losses.shape[0])


def squared_error(variance: Float[Tensor, ""], n: int) -> Float[Tensor, ""]:
    """Return the squared standard error of the mean of n values with this (biased) variance.

    A single value says nothing about its spread: the error is infinite.
    """
    return variance / (n - 1) if n > 1 else variance + math.inf


def spread(wanted: int, total: int) -> list[int]:
    """Return positions of at most `wanted` examples among `total`: one in each of `wanted` parts of equal length.

    A batch may have an order: sorted by class, or positive and negative pairs in turn. The first examples, or every
    eighth one, would then be of one class. So the place within a part varies, as by pseudo-random numbers.

    >>> spread(4, 12)
    [0, 5, 7, 11]
    """
    wanted = min(wanted, total)
    ends = pairwise(part * total // wanted for part in range(wanted + 1)) if wanted else ()
    places = (part * (part + 1) // 2 * MULTIPLIER % 2**16 for part in range(wanted))
    return [start + (stop - start) * place // 2**16 for place, (start, stop) in zip(places, ends, strict=True)]
