"""Structured rows give what the dense rows give; a lazy tap, window by window, what the tap gives."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisherfn import rows, taps
from fisherfn.rows import OneHot
from fisherfn.taps import Tap
from tests import drawn
from tests.drawn import Lazy, normal
from tests.oracles import close


@pytest.mark.parametrize("kind", drawn.STRUCTURED)
@given(st.integers(1, 2), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_structured_rows_are_dense_rows(kind, k, n, t, i, seed):
    a, dense = drawn.STRUCTURED[kind](k, n, t, i, seed)
    g, M = normal(k, n, t, 3, seed=1), normal(k, i, 2, seed=2)
    assert rows.sizes(a) == (k, n, t, i)
    close(rows.dense(a), dense)
    close(rows.times(a, M), torch.einsum("knti,kij->kntj", dense, M))
    close(rows.outer(g, a), torch.einsum("knto,knti->koi", g, dense))
    close(rows.second_moment(a), torch.einsum("knti,kntj->kij", dense, dense))
    close(rows.diagonal_moment(a), torch.einsum("knti,knti->ki", dense, dense))
    close(rows.total(a), torch.einsum("knti->kni", dense))
    if isinstance(a, OneHot):
        close(rows.total_diagonal(a), torch.einsum("knti,knui->ki", dense, dense))
        assert torch.equal(rows.alike(a), torch.einsum("knti,knui->kntu", dense, dense) == 1), "empty rows equal none"
    flat = dense.flatten(1, 2)
    close(rows.gram(a), torch.einsum("kai,kbi->kab", flat, flat))
    close(rows.dense(rows.window(a, slice(1, 3))), dense[:, 1:3])
    close(rows.dense(rows.with_column(a, 0.5)), torch.cat([dense, torch.full_like(dense[..., :1], 0.5)], -1))
    close(rows.dense(rows.cat([a, a])), torch.cat([dense, dense], 2))
    assert rows.dense(rows.cast(a, torch.float32)).dtype == torch.float32
    if n % 2 == 0:  # pairs of rows that belong to one example
        close(rows.dense(rows.split_examples(a, 2)), dense.reshape(k, n // 2, 2 * t, i))


@given(st.integers(1, 7), st.integers(1, 20))
def test_windows_are_the_whole(n, window):
    """Every example in exactly one window, in order."""
    tap = Tap(normal(1, n, 2, 3), normal(1, 2, n, 2, 4))
    lazy = Lazy(tap)
    before = taps.WINDOW
    taps.WINDOW = window
    try:
        parts = list(lazy.windows())
    finally:
        taps.WINDOW = before
    assert all(part.sizes.n * 6 <= max(window, 6) for part in parts)
    close(torch.cat([part.a for part in parts], 1), tap.a)
    close(torch.cat([part.g for part in parts], 2), tap.g)
    close(lazy.whole().g, tap.g)
