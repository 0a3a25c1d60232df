"""The moments of patches without the patches: those of the rows, whatever the convolution."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisherfn import rows
from fisherfn.layers import FAMILIES
from fisherfn.layers.conv import Config, each
from fisherfn.layers.conv_transpose import Config as TransposedConfig
from tests.oracles import close

CONV, TRANSPOSED = FAMILIES["conv"], FAMILIES["conv transpose"]


def check(family, x, config):
    """Sums over examples and positions of the rows, by definition."""
    a = rows.dense(family.rows(x, config)).flatten(1, 2)
    found = family.moments(x, config)
    if found is not None:
        close(found.first, a.sum(1))
        close(found.second, torch.einsum("kri,krj->kij", a, a))
    return found


@st.composite
def drawn(draw):
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    per_dim = lambda low, high: draw(st.tuples(*[st.integers(low, high)] * dims))  # noqa: E731
    kernel, dilation, padding = per_dim(1, 4), per_dim(1, 2), per_dim(0, 2)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    space = [r + extra for r, extra in zip(reach, per_dim(0, 5), strict=True)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(2, 2 * groups, *space, generator=generator, dtype=torch.float64)
    return x, kernel, padding, dilation, groups


@given(drawn=drawn(), stride=st.integers(1, 2))
def test_moments_of_a_convolution_are_those_of_its_rows(drawn, stride):
    x, kernel, padding, dilation, groups = drawn
    both = tuple((p, max(p - 1, 0)) for p in padding)
    check(CONV, x, Config(kernel, each(stride, len(kernel)), both, dilation, groups))


@given(drawn=drawn())
def test_moments_of_a_transposed_convolution_are_those_of_its_rows(drawn):
    x, kernel, padding, dilation, groups = drawn
    padding = tuple(min(p, d * (k - 1)) for p, d, k in zip(padding, dilation, kernel, strict=True))
    nothing, ones = each(0, len(kernel)), each(1, len(kernel))
    check(TRANSPOSED, x, TransposedConfig(kernel, ones, padding, nothing, dilation, groups))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("dilation", "groups", "wider"), [(1, 1, 0), (2, 2, 0), (1, 2, 1)])
def test_moments_where_every_kernel_entry_meets_the_whole_input(dims, dilation, groups, wider):
    x = torch.randn(2, 2 * groups, *(6, 5, 7)[:dims], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kernel, step = (4, 3, 3)[:dims], each(dilation, dims)
    reach = [dilation * (k - 1) + wider for k in kernel]
    config = Config(kernel, each(1, dims), tuple((p, p + wider) for p in reach), step, groups)
    assert check(CONV, x, config) is not None
    nothing = each(0, dims)
    assert check(TRANSPOSED, x, TransposedConfig(kernel, each(1, dims), nothing, nothing, step, groups)) is not None


@pytest.mark.parametrize("short", [(0, 1), (1, 0)])
@pytest.mark.parametrize("dimension", [0, 1])
def test_moments_where_one_kernel_entry_misses_the_border(dimension, short):
    x = torch.randn(2, 2, 7, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    padding = [(3, 3), (3, 3)]
    padding[dimension] = (3 - short[0], 3 - short[1])
    assert check(CONV, x, Config((4, 4), (1, 1), tuple(padding), (1, 1), 1)) is not None


def test_moments_where_the_second_axis_is_strided_and_wide():
    x = torch.randn(2, 2, 7, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert check(CONV, x, Config((4, 4), (1, 2), ((3, 3), (3, 16)), (1, 1), 1)) is not None


@pytest.mark.parametrize(("kernel", "stride", "quick"), [(3, 1, True), (5, 1, True), (1, 1, False), (3, 2, False)])
def test_the_quick_way_is_taken_where_patches_overlap(kernel, stride, quick):
    x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    config = Config(each(kernel, 2), each(stride, 2), ((1, 1), (1, 1)), (1, 1), 1)
    assert (check(CONV, x, config) is not None) == quick


def test_moments_go_through_vmap():
    x = torch.randn(3, 2, 2, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    config = Config((3, 2), (1, 1), ((1, 1), (0, 1)), (2, 1), 2)
    together = torch.vmap(lambda x: tuple(CONV.moments(x, config)))(x)
    for n, member in enumerate(x):
        close(together[0][n], CONV.moments(member, config).first)
        close(together[1][n], CONV.moments(member, config).second)
