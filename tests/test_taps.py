"""Taps answer alike: moments are their definitions, and chunks of any size give the means of the whole."""

import pytest
import torch

from fisherfn import rows
from fisherfn.errors import EmptyBatchError
from fisherfn.joined import JoinedTap, silent_tap
from fisherfn.per_example import squares
from fisherfn.taps import ChunkedTap, Tap
from fisherfn.types import Shape
from tests.oracles import close


def drawn_tap(one_hot: bool = False) -> Tap:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, 7, 3, 4, generator=generator, dtype=torch.float64)
    g = torch.randn(2, 5, 7, 3, 6, generator=generator, dtype=torch.float64)
    index = torch.randint(5, (2, 7, 3), generator=generator)  # 4: an empty row
    return Tap(rows.OneHot(index, 4, torch.float64) if one_hot else a, g)


def by_definition(vectors, reduction=None):
    """Return `Σ x xᵀ` over examples and positions, vector by vector; `vectors` are `[m, t, d]`."""
    total = torch.zeros(vectors.shape[-1], vectors.shape[-1], dtype=vectors.dtype)
    for example in vectors:
        for x in [reduction(example, 0)] if reduction else example:
            total += torch.outer(x, x)
    return total


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("limit", [3, 4, 5, 6])
def test_moments_are_their_definition(summed, limit):
    tap = drawn_tap()
    for k in range(2):
        mean, total = (torch.mean, torch.sum) if summed else (None, None)
        A, G = by_definition(tap.a[k], mean), by_definition(tap.g[k].flatten(0, 1), total)
        close(tap.input_moment(limit, summed)[k], A if limit >= 4 else A.diagonal())
        close(tap.output_moment(limit, summed)[k], G if limit >= 6 else G.diagonal())


@pytest.mark.parametrize("summed", [False, True])
def test_the_input_moment_of_one_hot_rows_is_the_diagonal(summed):
    tap = drawn_tap(one_hot=True)
    for k in range(2):
        close(
            tap.input_moment(8192, summed)[k],
            by_definition(tap.a.dense()[k], torch.mean if summed else None).diagonal(),
        )


@pytest.mark.parametrize("size", [1, 2, 3, 7, 9])
def test_chunks_of_any_size_give_the_sums_and_means_of_the_whole(size):
    """Seven examples: the last chunk is shorter, and counts for less."""
    tap = drawn_tap()
    chunks = ChunkedTap(tap, size)
    assert (chunks.sizes, chunks.dtype, chunks.one_hot, chunks.at_once) == (tap.sizes, tap.dtype, False, False)
    close(chunks.mean(lambda part: squares(part) / part.sizes.n), squares(tap) / 7)
    close(chunks.input_moment(8), tap.input_moment(8))
    close(chunks.output_moment(8), tap.output_moment(8))
    close(torch.cat([part.g for part in chunks.windows()], 2), tap.g)
    assert all(part.sizes.n <= size for part in chunks.windows())
    assert (chunks.output_rows(), chunks.output_rows(summed=True)) == (21, 7)
    part = chunks.window(slice(1, 4)).to(torch.float32)
    assert (part.size, part.sizes.n, part.dtype) == (size, 3, torch.float32)
    close(part.whole().g.double(), tap.g[:, :, 1:4], tol=1e-6)


def test_a_half_precision_tap_has_moments_in_float32():
    tap = drawn_tap().to(torch.bfloat16)
    assert {tap.input_moment(8).dtype, tap.output_moment(8).dtype, tap.precise().dtype} == {torch.float32}


def test_no_examples_have_no_mean():
    with pytest.raises(EmptyBatchError, match="no examples"):
        ChunkedTap(drawn_tap().window(slice(0, 0)), 2).mean(squares)


@pytest.mark.parametrize("one_hot", [False, True])
def test_positions_of_zeros_and_silent_examples_have_no_output_rows(one_hot):
    tap, short = drawn_tap(one_hot), drawn_tap()
    short = Tap(short.a[:, :4, :1], short.g[:, :, :4, :1])
    silent = silent_tap(Shape(2, 6, 4, one_hot), 5, tap.g)
    joined = JoinedTap((tap, silent, short), (1.0, 1.0, 1.0), 5)
    assert (joined.sizes.n, joined.sizes.t) == (16, 3)
    assert (joined.output_rows(), joined.output_rows(summed=True)) == (21 + 4, 7 + 4)
    part = joined.window(slice(5, 13)).to(torch.float32)
    assert (part.sizes.n, part.output_rows(), part.output_rows(summed=True)) == (8, 6 + 1, 2 + 1)
    assert JoinedTap((silent,), (1.0,), 5).output_rows() == 1, "a divisor"
