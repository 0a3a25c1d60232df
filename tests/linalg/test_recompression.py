"""The best few products for a weighted sum of many, against the SVD of Σ w vec(A) vec(G)ᵀ."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisherfn.linalg.kron import Pair
from fisherfn.linalg.recompression import recompressed
from tests import drawn
from tests.oracles import close

SIZE = st.integers(1, 4)
FORM = st.tuples(st.booleans(), st.booleans())


def terms(count, k, o, i, form, seed=0):
    """Return products of which only the first is PSD."""

    def of(size, diagonal, r):
        full = drawn.psd(k, size, seed + r) if r == 0 else drawn.symmetric(k, size, seed + r)
        return full.diagonal(dim1=1, dim2=2) if diagonal else full

    return [Pair(of(i, form[0], r), of(o, form[1], 10 * r)) for r in range(count)]


def rearranged(pairs, weights):
    """Return `Σ w vec(A) vec(G)ᵀ` of each group."""
    return sum(
        w * pair.A.flatten(1).unsqueeze(-1) * pair.G.flatten(1).unsqueeze(-2)
        for w, pair in zip(weights, pairs, strict=True)
    )


def best(Z, rank):
    U, sigma, Vh = torch.linalg.svd(Z, full_matrices=False)
    return (U[..., :rank] * sigma[:, None, :rank]) @ Vh[:, :rank]


@given(st.integers(2, 4), st.integers(1, 2), st.integers(1, 2), SIZE, SIZE, FORM, drawn.SEEDS)
def test_it_is_the_truncated_svd(count, rank, k, o, i, form, seed):
    pairs = terms(count, k, o, i, form, seed)
    weights = [torch.tensor(0.2 + r).double() for r in range(count)]
    (found,) = recompressed([pairs], weights, rank)
    Z = rearranged(pairs, weights)
    close(rearranged(found, [1.0] * rank), best(Z, rank), tol=1e-6)
    sigma = torch.linalg.svdvals(Z)
    for r, pair in enumerate(found):
        value = sigma[:, r] if r < sigma.shape[1] else torch.zeros(k).double()
        close(pair.A.flatten(1).norm(dim=1), value.sqrt(), tol=1e-5)
        close(pair.G.flatten(1).norm(dim=1), value.sqrt(), tol=1e-5)
        trace = (pair.G if form[1] else pair.G.diagonal(dim1=1, dim2=2)).sum(-1)
        assert (trace >= -1e-9 * value.sqrt()).all(), "the sign is that of a positive trace"


def test_weights_of_a_running_average_are_those_of_the_operators():
    """Not factor by factor: the average of two products is none, and the best one for it is another."""
    old, new = terms(2, 1, 3, 4, (False, False))
    rho = torch.tensor(0.25).double()
    ((pair,),) = recompressed([[old, new]], [rho, 1 - rho], 1)
    close(rearranged([pair], [1.0]), best(rearranged([old, new], [rho, 1 - rho]), 1))
    factorwise = Pair(*(rho * a + (1 - rho) * b for a, b in zip(old, new, strict=True)))
    assert (rearranged([pair], [1.0]) - rearranged([factorwise], [1.0])).norm() > 1e-2
    ((same,),) = recompressed([[old, new]], [1 - rho * 0, rho * 0], 1)
    close(rearranged([same], [1.0]), rearranged([old], [1.0]))


def test_negative_weights_subtract():
    one, two = terms(2, 2, 3, 4, (False, False))
    both = Pair(one.A + two.A, one.G)
    (found,) = recompressed([[both, two._replace(G=one.G)]], [torch.tensor(1.0), torch.tensor(-1.0)], 1)
    close(rearranged(found, [1.0]), rearranged([one], [1.0]))


def test_blocks_together_are_blocks_alone():
    sums = [terms(3, 1, 3, 4, (False, False)), terms(3, 2, 2, 5, (True, False), 7), terms(3, 1, 1, 2, (False, True), 9)]
    weights = [torch.tensor(w).double() for w in (0.5, 0.3, 0.2)]
    for together, pairs in zip(recompressed(sums, weights, 2), sums, strict=True):
        (alone,) = recompressed([pairs], weights, 2)
        close(rearranged(together, [1.0, 1.0]), rearranged(alone, [1.0, 1.0]))


@pytest.mark.parametrize("rank", [1, 2])
def test_a_sum_of_zeros_is_zero_and_nan_stays_in_its_group(rank):
    zeros = [Pair(0 * pair.A, 0 * pair.G) for pair in terms(3, 2, 3, 4, (False, False))]
    ones = [torch.ones(()).double()] * 3
    assert not any(side.any() for pair in recompressed([zeros], ones, rank)[0] for side in pair)
    bad = terms(3, 2, 3, 4, (False, False))
    bad[1].A[0, 0, 0] = torch.nan
    found, clean = recompressed([bad], ones, rank)[0], recompressed([terms(3, 2, 3, 4, (False, False))], ones, rank)[0]
    assert not torch.isfinite(found[0].A[0]).any()
    close(rearranged(found, [1.0] * rank)[1], rearranged(clean, [1.0] * rank)[1])


@pytest.mark.parametrize("power", [-50, -35, 35, 50])
def test_the_scale_of_a_sum_scales_the_result(power):
    """The square of a factor of 2**70 overflows in float32. The result divides the scale between both factors."""
    pairs = [Pair(pair.A.float(), pair.G.float()) for pair in terms(3, 2, 3, 4, (False, False))]
    weights = [torch.tensor(w) for w in (0.5, 0.3, 0.2)]
    scaled = [pair._replace(A=pair.A * 2.0 ** (2 * power)) for pair in pairs]
    for (one, other), (big, second) in zip(
        recompressed([pairs], weights, 2), recompressed([scaled], weights, 2), strict=True
    ):
        for pair, expected in ((big, one), (second, other)):
            torch.testing.assert_close(pair.A * 2.0**-power, expected.A)
            torch.testing.assert_close(pair.G * 2.0**-power, expected.G)
