"""Per-example gradients, their windows and their squares, for every kind of rows, against sums over positions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisherfn import per_example, taps
from tests import drawn
from tests.oracles import close

KINDS = pytest.mark.parametrize("kind", drawn.ROWS)


@KINDS
@given(drawn.sizes(), drawn.SEEDS, st.booleans())
def test_matrices_and_their_squares_are_the_sums_over_positions(kind, sizes, seed, lazy):
    tap, W = drawn.tap(kind, sizes, seed, lazy)
    close(per_example.example_matrices(tap), W)
    close(per_example.squares(tap), W.square().sum((0, 1)))


@KINDS
@pytest.mark.parametrize("window", [1, 30, 1000])
@pytest.mark.parametrize("lazy", [False, True])
def test_windows_of_any_size_are_the_whole(kind, window, lazy, monkeypatch):
    """One example per window, some, or all: the examples in order, and the sums of the whole."""
    tap, W = drawn.tap(kind, (2, 2, 5, 2, 3, 4), 7, lazy)
    monkeypatch.setattr(per_example, "WINDOW", window * 24)
    monkeypatch.setattr(taps, "WINDOW", window)
    parts = list(per_example.matrix_windows(tap))
    assert all(part.sizes.n <= max(1, window // 2) for part in parts)
    close(torch.cat([per_example.example_matrices(part) for part in parts], 1), W)
    close(per_example.squares(tap), W.square().sum((0, 1)))


def test_blocks_stand_side_by_side_and_samples_outermost():
    one, W = drawn.tap("dense", (1, 2, 3, 2, 2, 3))
    other, V = drawn.tap("one-hot", (2, 2, 3, 1, 1, 4), 5)
    flat = per_example.flat_example_matrices([one, other])
    assert flat.shape == (6, 6 + 8)
    for s in range(2):
        for n in range(3):
            close(flat[3 * s + n], torch.cat([W[s, n].flatten(), V[s, n].flatten()]))
