"""Running averages of Kronecker sums: of the operators, not of their factors.

KPSVD keeps the best product for ρ old + (1 − ρ) new, Deflation and Lanczos the best two; K-FAC corrected averages A and
G like K-FAC and keeps the best product for what is left; E-KFAC turns its scalings into the new eigenbasis.
"""

import pytest
import torch
from hypothesis import strategies as st

from tests import kron_oracles
from tests.methods.kronecker import (
    FAMILY,
    ITERATIVE,
    TIGHT,
    as_installed,  # noqa: F401
    blocks,
    dense,
    drawn,
    drawn_taps,
    given,
    norm,
    optimum,
    pairs_of,
    taps_of,
)
from tests.oracles import close, differs

RANKS = {"kpsvd": 1, "deflation": 2, "lanczos": 2}
EVERY = pytest.mark.parametrize("method", FAMILY)
RECOMPRESSED = pytest.mark.parametrize("method", RANKS)
EMAS = st.sampled_from([0.3, 0.5, 0.95])


def build(name):
    return FAMILY[name](iterations=TIGHT) if name in ITERATIVE else FAMILY[name]()


def other_batch(a, g, seed=7):
    """Return a batch with another size, other numbers and another scale."""
    k, s, n, t, o, i = (*g.shape, a.shape[-1])
    a2, g2 = taps_of((k, s, n + 1, t, o, i), seed)
    return 2 * a2, g2


def course(problem, batches, ema):
    """The factors after each batch."""
    ng, factors = problem.run.ng, []
    state = ng.init(problem.params, ema=ema)
    for batch in batches:
        state, info = ng.update(state, problem.stats(*batch))
        assert all(info.ok.values())
        factors.append(state.factors["weight"])
    return factors


def alone(problem, batch):
    """The factors of one batch."""
    return course(problem, [batch], 0.0)[0]


def second_weight(taps, ema):
    """ρ of the second batch, which has one example more than the first.

    Examples count alike until ema caps the old ones, at what it stands for in batches of the mean size.
    """
    n, n_new = taps[0].shape[1], taps[0].shape[1] + 1
    size = (n + n_new) / 2
    return min(n / (n + n_new), ema * size / (ema * size + (1 - ema) * n_new))


def two_batches(name, taps, ema):
    """(running factors, old fit, new fit, ρ, F̂ averaged as operators) after a second batch."""
    problem = given(*taps, method=build(name))
    old, both = course(problem, [taps, other_batch(*taps)], ema)
    rho = second_weight(taps, ema)
    new = alone(problem, other_batch(*taps))
    return both, old, new, rho, rho * dense(old) + (1 - rho) * dense(new)


# ------------------------------------------------------------------------------------------------- all the methods


@EVERY
@drawn(0.12, taps=drawn_taps(), ema=EMAS)
def test_the_same_batch_again_changes_nothing(method, taps, ema):
    """Neither a free sign of the second term nor a swap of terms shrinks what is averaged."""
    problem = given(*taps, method=build(method))
    states = course(problem, [taps] * 3, ema)
    for factors in states[1:]:
        close(dense(factors), dense(states[0]), tol=1e-6)


@EVERY
def test_every_update_counts(method):
    """ρ = min(1 − 1/k, ema) with k the updates: the second weighs half, and none is passed over."""  # D2, D16
    taps = taps_of((1, 2, 5, 2, 3, 3))
    problem = given(*taps, method=build(method))
    batches = [other_batch(*taps, seed) for seed in (0, 10, 20)]
    states = course(problem, batches, 0.95)
    exact = [blocks(problem.stats(*batch))["weight"] for batch in batches]
    for k in (1, 2):
        assert differs(dense(states[k]), dense(states[k - 1]), 1e-2)
        mean = torch.stack(exact[: k + 1]).mean(0)
        ages = [norm(dense(states[k]) - rho * exact[0] - (1 - rho) * mean) for rho in (0.0, 0.5, 0.95)]
        assert ages[0] < ages[1] < ages[2], "the first batch weighs too much"


@EVERY
def test_without_memory_the_newest_batch_is_all(method):
    taps = taps_of((1, 1, 4, 1, 3, 3))
    problem = given(*taps, method=build(method))
    states = course(problem, [taps, other_batch(*taps)], 0.0)
    close(dense(states[1]), dense(alone(problem, other_batch(*taps))), tol=1e-6)


# -------------------------------------------------------------------------------------------------- recompression


@RECOMPRESSED
@drawn(0.2, taps=drawn_taps(), ema=EMAS)
def test_the_average_is_the_best_fit_of_the_averaged_operators(method, taps, ema):
    factors, _, _, _, mean = two_batches(method, taps, ema)
    least = optimum(mean, factors, RANKS[method])
    assert norm(mean - dense(factors)) <= (1 + 1e-6) * least + 1e-7 * norm(mean)


@RECOMPRESSED
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_average_is_the_truncated_svd(method, seed):
    factors, old, new, rho, mean = two_batches(method, taps_of((2, 1, 5, 2, 3, 4), seed), 0.4)
    expected = torch.stack([kron_oracles.best(one, 3, 4, RANKS[method]) for one in mean])
    close(dense(factors), expected, tol=1e-6)
    (A, G), (A_old, G_old), (A_new, G_new) = (pairs_of(one)[0] for one in (factors, old, new))
    by_factors = [rho * x + (1 - rho) * y for x, y in ((A_old, A_new), (G_old, G_new))]
    differing = kron_oracles.kron(by_factors[0][0], by_factors[1][0])
    assert differs(kron_oracles.kron(A[0], G[0]), differing, 1e-3), "factor-wise would do: the test is blind"


@RECOMPRESSED
def test_an_average_within_the_rank_is_kept_to_the_last_digit(method):
    """Two batches of one example: with the same input their average is one product, else two."""
    a, g = taps_of((1, 1, 1, 1, 3, 4))
    batches = [(a, g), (a if method == "kpsvd" else a.flip(-1), 3 * g.flip(-1))]
    problem = given(a, g, method=build(method))
    states = course(problem, batches, 0.95)
    exact = [blocks(problem.stats(*batch))["weight"] for batch in batches]
    close(dense(states[-1]), (exact[0] + exact[1]) / 2)


@RECOMPRESSED
def test_the_leading_pair_stays_positive_over_many_batches(method):
    taps = taps_of((2, 1, 4, 2, 3, 3))
    problem = given(*taps, method=build(method))
    states = course(problem, [other_batch(*taps, seed) for seed in range(0, 60, 10)], 0.9)
    for factors in states:
        for M in (M for factor in pairs_of(factors)[0] for M in factor):
            assert torch.linalg.eigvalsh(M)[0] >= -1e-10 * M.norm()
            assert M.trace() > 0


# ------------------------------------------------------------------------------------------------ K-FAC corrected


@drawn(0.2, taps=drawn_taps(), ema=EMAS)
def test_kfac_corrected_averages_its_first_term_like_kfac(taps, ema):
    factors, _, _, rho, _ = two_batches("kfac_cor", taps, ema)
    moments = []
    for a, g in (taps, other_batch(*taps)):
        moments.append([kron_oracles.kfac_pair(*one) for one in zip(a, g, strict=True)])
    for k, (old, new) in enumerate(zip(*moments, strict=True)):
        for mine, x, y in zip((factors.first.A[k], factors.first.G[k]), old, new, strict=True):
            close(mine, rho * x + (1 - rho) * y)


@drawn(0.2, taps=drawn_taps(), ema=EMAS)
def test_kfac_correcteds_second_term_makes_up_for_averaging_factors(taps, ema):
    """Best product for ρ C_old + (1−ρ) C_new + ρ(1−ρ)(A_old−A_new)⊗(G_old−G_new), so that the sum averages sums."""
    factors, old, new, rho, mean = two_batches("kfac_cor", taps, ema)
    gaps = zip(old.first.A - new.first.A, old.first.G - new.first.G, strict=True)
    between = torch.stack([kron_oracles.kron(A, G) for A, G in gaps])
    wanted = rho * dense(old.second) + (1 - rho) * dense(new.second) + rho * (1 - rho) * between
    close(wanted, mean - dense(factors.first))
    least = optimum(wanted, factors, 1)
    assert norm(mean - dense(factors)) <= (1 + 1e-6) * least + 1e-7 * norm(mean)


# --------------------------------------------------------------------------------------------------------- E-KFAC


@drawn(0.2, taps=drawn_taps(), ema=EMAS)
def test_ekfac_rotates_its_scalings_into_the_new_basis(taps, ema):
    """ρ diag(Qᵀ F̂_old Q) + (1 − ρ) diag(Qᵀ F_new Q), Q the eigenbasis of the running A and G; never negative."""
    problem = given(*taps, method=FAMILY["ekfac"]())
    batches = [taps, other_batch(*taps)]
    states = course(problem, batches, ema)
    rho, new = second_weight(taps, ema), blocks(problem.stats(*batches[1]))["weight"]
    after, F_old = states[1], dense(states[0])
    for k in range(len(after.A)):
        Q = torch.kron(after.QG[k].contiguous(), after.QA[k].contiguous())
        expected = rho * kron_oracles.diagonal_in(Q, F_old[k]) + (1 - rho) * kron_oracles.diagonal_in(Q, new[k])
        close(after.scale[k].reshape(-1), expected)
        rotated = Q.T @ kron_oracles.kron(after.A[k], after.G[k]) @ Q
        close(rotated, torch.diag(rotated.diagonal()), tol=1e-8)
    assert after.scale.min() >= 0


def test_ekfac_without_the_turn_would_be_another_operator():
    """The guard of the test above: the basis does move."""
    taps = taps_of((1, 1, 5, 1, 3, 3))
    problem = given(*taps, method=FAMILY["ekfac"]())
    states = course(problem, [taps, other_batch(*taps)], 0.5)
    unturned = 0.5 * states[0].scale + 0.5 * alone(problem, other_batch(*taps)).scale
    assert differs(states[1].scale, unturned, 1e-2)
