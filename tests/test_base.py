"""The lift from one block to all: the mean hook."""

import pytest
import torch

from fisherfn.base import chunked_mean, whole_mean
from fisherfn.methods.kfac import estimate
from fisherfn.taps import Tap


def drawn_tap() -> Tap:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, 7, 3, 4, generator=generator, dtype=torch.float64)
    g = torch.randn(2, 5, 7, 3, 6, generator=generator, dtype=torch.float64)
    return Tap(a, g)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 9])
def test_chunks_of_any_size_give_the_mean_of_the_whole(size):
    """Seven examples: the last chunk is shorter, and counts for less."""
    whole, _ = estimate(drawn_tap(), None, whole_mean)
    parts, _ = estimate(drawn_tap(), None, chunked_mean(size))
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


def test_the_moments_are_their_definition():
    a, g = drawn_tap()
    factors, _ = estimate(Tap(a, g))
    A, G = torch.zeros(2, 4, 4, dtype=a.dtype), torch.zeros(2, 6, 6, dtype=a.dtype)
    for k in range(2):
        for n in range(7):
            for t in range(3):
                A[k] += torch.outer(a[k, n, t], a[k, n, t]) / 7
                for s in range(5):
                    G[k] += torch.outer(g[k, s, n, t], g[k, s, n, t]) / (7 * 3)
    torch.testing.assert_close(tuple(factors), (A, G), rtol=1e-10, atol=1e-12)
