"""The prior that maximises the evidence: against bisection, against its neighbours, from any start."""

import pytest
import torch
from torch import Tensor
from torch.func import grad

import fisherfn as ff
from fisherfn.linalg import solve
from fisherfn.priors import BlockEigenvalues, fixed_point
from tests import zoo
from tests.oracles import close


def bisected(σ: Tensor, square: Tensor, examples: int) -> Tensor:
    """Return the zero of the decreasing function `Σ σ/(σ + δ/N) − δ‖θ‖²`, twice the slope of the evidence in log δ."""
    low, high = -200.0, 200.0
    for _ in range(120):
        δ = torch.tensor((low + high) / 2, dtype=torch.float64).exp()
        slope = (σ / (σ + δ / examples)).sum() - δ * square
        low, high = ((low + high) / 2, high) if slope > 0 else (low, (low + high) / 2)
    return δ


def linear(scales, dtype=torch.float64, examples=40, **options):
    """Return a posterior of a linear net with a block per scale, and its state: the Fisher of each block is I ⊗ A."""
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(examples, 5, generator=g).to(dtype) for _ in scales]
    y = torch.randn(examples, 3, generator=g).to(dtype)
    params = {str(n): (scale * torch.randn(3, 5, generator=g).double()).to(dtype) for n, scale in enumerate(scales)}

    def model(p, x):
        return sum(torch.nn.functional.linear(each, w) for each, w in zip(x, p.values(), strict=True))

    ng = ff.natural_gradient(model, params, tuple(x), likelihood=ff.Gaussian(), method=ff.kfac("eigen"), fisher="type2")
    posterior = ff.laplace(ng)
    σ = {
        str(n): torch.linalg.eigvalsh(each.double().mT @ each.double() / examples).repeat(3) for n, each in enumerate(x)
    }
    squares = {name: w.double().square().sum() for name, w in params.items()}
    return posterior, posterior.fit(params, [(tuple(x), y)], **options)[0], σ, squares


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [30.0, 1e-3, 1e-16])
@pytest.mark.parametrize("start", [1e-9, 1.0, 1e30])
def test_the_chosen_prior_is_that_of_a_bisection_from_any_start(scale, start, dtype):
    posterior, state, σ, squares = linear([scale], dtype, prior=start)
    expected = bisected(σ["0"], squares["0"], 40)
    torch.testing.assert_close(
        posterior.choose_prior(state).prior["0"], expected, rtol=1e-10 if dtype == torch.float64 else 1e-5, atol=0
    )


@pytest.mark.parametrize("scales", [(1.0, 1e-4), (1e-6, 1e-7)])
def test_one_prior_for_several_blocks_is_that_of_their_bisection(scales):
    posterior, state, σ, squares = linear(scales, prior={"0": 0.01, "1": 3.0})
    one = posterior.choose_prior(state, per_block=False).prior
    assert torch.equal(one["0"], one["1"])
    expected = bisected(torch.cat(list(σ.values())), sum(squares.values()), 40)
    torch.testing.assert_close(one["0"], expected, rtol=1e-10, atol=0)


def test_one_prior_for_a_block_of_zeros_and_another_counts_both():
    posterior, state, σ, squares = linear((0.0, 1.0), prior=2.0)
    one = posterior.choose_prior(state, per_block=False).prior
    torch.testing.assert_close(one["0"], bisected(torch.cat(list(σ.values())), squares["1"], 40), rtol=1e-10, atol=0)
    per_block = posterior.choose_prior(state).prior
    assert per_block["0"] == 2.0
    torch.testing.assert_close(per_block["1"], bisected(σ["1"], squares["1"], 40), rtol=1e-10, atol=0)


@pytest.mark.parametrize("scale", [10.0, 1e-2, 1e-5])
@pytest.mark.parametrize("start", [1e-6, 1e12])
def test_each_iteration_at_least_halves_the_distance_and_stays_on_its_side(scale, start):
    posterior, state, σ, squares = linear([scale], prior=start)
    goal, distances = bisected(σ["0"], squares["0"], 40).log(), []
    for _ in range(12):
        distances.append(state.prior["0"].log() - goal)
        state = posterior.choose_prior(state, iterations=1)
    before, after = torch.stack(distances[:-1]), torch.stack(distances[1:])
    assert (after.abs() <= 0.5 * before.abs() + 1e-9).all()
    assert ((after.sign() == before.sign()) | (after.abs() < 1e-9)).all()


@pytest.mark.parametrize("method", ["kfac", "ekfac", "lanczos", "kfac_cor"])
@pytest.mark.parametrize("scale", [1e-2, 1e-9])
def test_no_prior_nearby_has_more_evidence_where_a_layer_is_small(scale, method):
    """A layer scaled down has λ ≫ F, where MacKay's own map alternates between two values."""
    problem = zoo.pick("mlp-categorical")
    last = list(problem.params)[-1].split(".")[0]
    params = {name: leaf * (scale if name.startswith(last) else 1.0) for name, leaf in problem.params.items()}
    posterior = ff.laplace(problem.build(method=ff.METHODS[method](damping_form="eigen"), fisher="type2"))
    state, _ = posterior.fit(params, [problem.batch])
    chosen = posterior.choose_prior(state)
    later = posterior.choose_prior(state, iterations=51)
    best = posterior.log_marginal_likelihood(chosen)
    for key, δ in chosen.prior.items():
        assert δ != 1.0  # its own optimum
        torch.testing.assert_close(later.prior[key], δ, rtol=1e-12, atol=0)
        for factor in (1e-6, 0.01, 0.5, 2.0, 100.0, 1e6):
            assert posterior.log_marginal_likelihood(chosen, chosen.prior | {key: δ * factor}) <= best + 1e-9


def test_denominators_at_their_floor_count_as_in_the_evidence():
    """A second product can be so negative that the inverse is that of a share of the leading product plus λ."""
    g = torch.Generator().manual_seed(0)
    leading = torch.rand(30, generator=g).double()
    total = leading - 1.5 * leading * (torch.arange(30) % 3 == 0)  # every third is negative
    square, N = torch.tensor(4.0, dtype=torch.float64), torch.tensor(100.0, dtype=torch.float64)

    def evidence(log):
        λ = log.exp() / N
        denominators = torch.maximum(total + λ, 0.1 * (leading + λ))
        return (30 * log - denominators.log().sum() - log.exp() * square) / 2

    δ = fixed_point([BlockEigenvalues(leading, total, 0.1)], square, N, torch.tensor(1.0, dtype=torch.float64), 50)
    assert (total + δ / N < 0.1 * (leading + δ / N)).any()
    assert grad(evidence)(δ.log()).abs() < 1e-9


def test_the_factors_are_decomposed_once(monkeypatch):
    posterior, state, *_ = linear((1.0, 1.0))
    decompose, calls = solve.eigh, []
    monkeypatch.setattr(solve, "eigh", lambda matrix: calls.append(1) or decompose(matrix))
    counts = []
    for iterations in (1, 50):
        calls.clear()
        posterior.choose_prior(state, iterations=iterations)
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0


def test_priors_of_several_posteriors_are_chosen_at_once():
    posterior, state, *_ = linear((1.0, 1e-3))
    starts = torch.tensor([0.1, 10.0], dtype=torch.float64)
    found = torch.vmap(lambda δ: posterior.choose_prior(state._replace(prior=dict.fromkeys(state.prior, δ))).prior)(
        starts
    )
    for key, δ in posterior.choose_prior(state).prior.items():
        close(found[key] / δ, torch.ones(2, dtype=torch.float64))
