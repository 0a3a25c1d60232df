"""Structured rows give what the dense rows give; a lazy tap, window by window, what the tap gives."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisherfn import products, rows, taps
from fisherfn.rows import OneHot, Phase, Phases
from fisherfn.taps import LazyTap, Sizes, Tap
from tests import zoo
from tests.oracles import close


def normal(*shape, seed=0):
    return torch.randn(shape, generator=zoo.generator(seed), dtype=torch.float64)


def drawn_one_hot(k, n, t, i, seed):
    index = torch.randint(i + 1, (k, n, t), generator=zoo.generator(seed))  # i itself: an empty row
    dense = torch.zeros(k, n, t, i + 1, dtype=torch.float64).scatter(3, index.unsqueeze(-1), 1.0)[..., :i]
    return OneHot(index, i, torch.float64), dense


def drawn_phases(k, n, t, i, seed):
    """Every position in one of two phases, each with columns of its own; they may overlap."""
    rng = zoo.generator(seed)
    order = torch.randperm(t, generator=rng)
    parts, dense = [], torch.zeros(k, n, t, i, dtype=torch.float64)
    for number, positions in enumerate(p for p in order.tensor_split(2) if len(p)):
        columns = torch.randperm(i, generator=rng)[: 1 + (seed + number) % i]
        part = Phase(normal(k, n, len(positions), len(columns), seed=seed + number), positions, columns)
        for p, position in enumerate(positions):
            for c, column in enumerate(columns):
                dense[:, :, position, column] = part.a[:, :, p, c]
        parts.append(part)
    return Phases(tuple(parts), i), dense


def drawn_single_phase(k, n, t, i, seed):
    a, columns = normal(k, n, t, i, seed=seed), torch.randperm(i, generator=zoo.generator(seed))
    return Phases((Phase(a, (), columns),), i), a[..., columns.argsort()]


KINDS = {"one-hot": drawn_one_hot, "phases": drawn_phases, "one-phase": drawn_single_phase}


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(1, 2), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_structured_rows_are_dense_rows(kind, k, n, t, i, seed):
    a, dense = KINDS[kind](k, n, t, i, seed)
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
    flat = dense.flatten(1, 2)
    close(rows.gram(a), torch.einsum("kai,kbi->kab", flat, flat))
    close(rows.dense(rows.window(a, slice(1, 3))), dense[:, 1:3])
    close(rows.dense(rows.with_column(a, 0.5)), torch.cat([dense, torch.full_like(dense[..., :1], 0.5)], -1))
    close(rows.dense(rows.cat([a, a])), torch.cat([dense, dense], 2))
    assert rows.dense(rows.cast(a, torch.float32)).dtype == torch.float32
    if n % 2 == 0:  # pairs of rows that belong to one example
        close(rows.dense(rows.split_examples(a, 2)), dense.reshape(k, n // 2, 2 * t, i))


@pytest.mark.parametrize("i", [3, products.WIDE - 1, products.WIDE, products.WIDE + 3])
def test_a_product_with_itself_in_panels_is_the_product(i):
    a = normal(1, 5, i, i)  # five times as many rows as columns: above the width, in panels
    flat = a.flatten(1, 2)
    close(rows.second_moment(a), torch.einsum("kmi,kmj->kij", flat, flat))
    together = torch.vmap(rows.second_moment)(torch.stack([a, 2 * a]))
    close(together[1], 4 * rows.second_moment(a))


class Lazy(LazyTap):
    """A lazy tap of an existing one."""

    stored = 6

    def __init__(self, tap: Tap) -> None:
        self.tap = tap

    @property
    def sizes(self) -> Sizes:
        return self.tap.sizes

    def part(self, examples: slice) -> Tap:
        return self.tap.window(examples)


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


@pytest.mark.parametrize("width", [1, 255, 256, 257, 271])
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_a_product_is_one_whatever_its_width(width, factor):
    x, y = normal(2, 3, 5), normal(2, 5, width, seed=1)
    close(products.product(x, y, factor), factor * torch.einsum("kmj,kji->kmi", x, y))
