"""Samples of the Laplace approximation: their distribution, noise made before the call, members, unused parameters."""

import pytest
import torch

import fisherfn as ff
from tests import zoo
from tests.oracles import close
from tests.test_laplace import fitted, precision


@pytest.mark.parametrize("method", ["kfac", "lanczos"])
def test_samples_have_the_mean_and_the_covariance_of_the_posterior(method):
    """The covariance of 40,000 samples in the basis where that of the posterior is the identity."""
    problem, posterior, state = fitted(method=method)
    L = torch.linalg.cholesky(precision(problem, posterior, state, 0.7))
    samples = posterior.sample(state, zoo.generator(), samples=40_000)
    flat = torch.cat([(leaf - problem.params[name]).flatten(1) for name, leaf in samples.items()], 1) @ L
    eye = torch.eye(len(L), dtype=zoo.DTYPE)
    assert flat.mean(0).abs().max() < 0.03
    assert (flat.mT @ flat / len(flat) - eye).abs().max() < 0.05
    again = posterior.sample(state, zoo.generator(), samples=40_000)
    assert all(torch.equal(samples[name], again[name]) for name in samples)


def with_precision(posterior, state, δ):
    """Return the state with one prior for all blocks."""
    return state._replace(prior={key: δ.double() for key in state.prior})


def test_noise_made_before_the_call_gives_the_samples_of_its_generator():
    problem, posterior, state = fitted()
    noise = posterior.noise(zoo.generator(3), samples=5)
    samples = posterior.sample(state, zoo.generator(3), samples=5)
    for found in (posterior.sample(state, noise=noise), posterior.sample(state, noise=noise, samples=5)):
        assert all(torch.equal(found[name], samples[name]) for name in samples)
    assert posterior.sample(state, zoo.generator())["0.weight"].shape == (1, *problem.params["0.weight"].shape)


def test_samples_of_several_priors_at_once_are_those_of_each():
    _, posterior, state = fitted()
    δs = torch.tensor([0.3, 2.0, 50.0])
    noises = [posterior.noise(zoo.generator(seed), samples=2) for seed in range(3)]

    def sample(δ, noise):
        return posterior.sample(with_precision(posterior, state, δ), noise=noise)

    for found, each in (
        (torch.vmap(sample)(δs, ff.members.stack(noises)), noises),
        (torch.vmap(sample, (0, None))(δs, noises[0]), [noises[0]] * 3),
    ):
        expected = ff.members.stack([sample(δ, noise) for δ, noise in zip(δs, each, strict=True)])
        for name in expected:
            close(found[name], expected[name])


def test_a_generator_inside_vmap_is_refused_with_the_remedy():
    problem, posterior, state = fitted()
    ng = problem.build(method=ff.kfac(), fisher="mc")
    for remedy, call in (
        ("posterior.noise", lambda δ: posterior.sample(with_precision(posterior, state, δ), zoo.generator())),
        ("posterior.noise", lambda δ: posterior.noise(zoo.generator())),
        ("ng.noise", lambda δ: ng.stats(problem.params, problem.batch, generator=zoo.generator()).loss * δ),
        ("before the call", lambda δ: ff.dropout_seeds(3, zoo.generator())),
    ):
        with pytest.raises(ff.errors.NoiseError, match=rf"torch\.vmap.*{remedy}"):
            torch.vmap(call)(torch.ones(2))
    both = torch.vmap(lambda δ: posterior.sample(state, zoo.generator())["0.weight"] * δ, randomness="different")
    assert both(torch.ones(2)).shape[0] == 2


def test_noise_that_does_not_fit_is_refused():
    _, posterior, state = fitted()
    noise = posterior.noise(zoo.generator(), samples=3)
    key = next(iter(noise))
    with zoo.as_installed(), pytest.raises(ff.errors.HyperparameterError, match="samples must be a whole number"):
        posterior.sample(state, noise=noise, samples="3")
    with pytest.raises(ff.errors.HyperparameterError, match="samples"):
        posterior.sample(state, noise={key: numbers[:0] for key, numbers in noise.items()})
    for error, match, bad in (
        (ff.errors.StructureError, "posterior.noise", {key: noise[key]}),
        (ff.errors.StructureError, "posterior.noise", noise[key]),
        (ff.errors.StructureError, f"{key!r} of noise", noise | {key: 1.0}),
        (ff.errors.ShapeError, "of noise has shape .* as posterior.noise returns", noise | {key: noise[key][:2]}),
        (ff.errors.ShapeError, "of noise has shape .* as posterior.noise returns", noise | {key: noise[key][..., :1]}),
    ):
        with zoo.as_installed(), pytest.raises(error, match=match):
            posterior.sample(state, noise=bad)
    with pytest.raises(ff.errors.ShapeError, match="expected"):
        posterior.sample(state, noise=noise, samples=2)
    with pytest.raises(ff.errors.NoiseError, match=r"torch\.Generator.*posterior\.noise"):
        posterior.sample(state)
    with pytest.raises(ff.errors.HyperparameterError, match="samples"):
        posterior.noise(zoo.generator(), samples=0)
    with zoo.as_installed(), pytest.raises(ff.errors.StructureError, match="generator"):
        posterior.sample(state, 7)


def test_unused_parameters_are_sampled_from_their_prior():
    """The data say nothing about them: neither about their values nor about the precision of their prior."""
    problem = zoo.pick("mlp-categorical")
    params = {"idle": torch.full((3, 2), 5.0, dtype=zoo.DTYPE)} | problem.params
    ng = ff.natural_gradient(
        lambda p, x: problem.model({name: p[name] for name in problem.params}, x), params, problem.x,
        likelihood=problem.likelihood, method=ff.kfac("eigen"), fisher="type2", unused="ignore",
    )  # fmt: skip
    posterior = ff.laplace(ng)
    keys = [block.key for block in ng.layout.blocks]
    state, _ = posterior.fit(params, [problem.batch], prior=dict.fromkeys(keys, 0.7) | {"idle": 4.0})
    deviations = posterior.sample(state, zoo.generator(), samples=4000)["idle"] - params["idle"]
    assert (deviations.mean(0).abs() < 0.05).all() and (deviations.std(0) - 0.5).abs().max() < 0.03
    _, without, known = fitted()
    close(posterior.log_marginal_likelihood(state), without.log_marginal_likelihood(known))
    chosen = posterior.choose_prior(state)
    assert chosen.prior["idle"] == 4.0
    one = posterior.choose_prior(state, per_block=False).prior
    assert all(torch.equal(one["idle"], δ) for δ in one.values())
    with pytest.raises(ff.errors.StructureError, match="'idle'.*per unused parameter"):
        posterior.init(params, prior=dict.fromkeys(keys, 1.0))
