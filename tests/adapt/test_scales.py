"""Factors on the learning rate, from schedules and parameter groups, and weight decay."""

import pytest
import torch

import fisherfn as ff
from fisherfn import errors
from fisherfn.adapt.scales import Scales, decay
from tests.adapt.problems import built, flat, mlp, steps, unflat

SETTINGS = {
    "model": {},
    "model, given rate": {"lr": 0.1},
    "model, given momentum": {"momentum": 0.9},
    "model, both given": {"lr": 0.1, "momentum": 0.9},
    "line_search": {"rule": "line_search"},
    "clip": {"rule": "clip"},
}


def step(factor, **settings):
    """The update and the info of the first step, which has no momentum yet."""
    problem = mlp(ff.Gaussian(), examples=40)
    opt = ff.adaptive(built(problem), damping=0.1, **settings)
    params, _, info = opt.step(
        problem.params, opt.init(problem.params), (problem.x, problem.y), generator=torch.Generator().manual_seed(0),
        lr_scale=factor,
    )  # fmt: skip
    return ff.tree.add(params, problem.params, scale=-1.0), info


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "clip"])
def test_a_factor_scales_the_step_once(name):
    whole, part = step(1.0, **SETTINGS[name])[0], step(0.5, **SETTINGS[name])[0]
    torch.testing.assert_close(flat(part), 0.5 * flat(whole))


def test_within_the_kl_bound_a_factor_scales_the_rate_once():
    (_, free), (_, part) = (step(factor, rule="clip", lr=1e-6) for factor in (1.0, 0.5))
    assert float(part.adapted.learning_rate) == pytest.approx(0.5 * float(free.adapted.learning_rate))
    (long, _), (longer, _) = (step(factor, rule="clip") for factor in (1.0, 10.0))
    torch.testing.assert_close(flat(long), flat(longer))  # both have the length of the bound


@pytest.mark.parametrize("name", SETTINGS)
def test_one_factor_for_each_parameter_is_the_common_one_where_they_agree(name):
    common, same = step(0.3, **SETTINGS[name])[0], step({"a": 0.3, "b": 0.3}, **SETTINGS[name])[0]
    torch.testing.assert_close(flat(same), flat(common))


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "clip"])
def test_a_schedule_scales_groups_with_different_rates(name):
    whole, part = (step({"a": s, "b": 0.5 * s}, **SETTINGS[name])[0] for s in (1.0, 0.1))
    torch.testing.assert_close(flat(part), 0.1 * flat(whole))
    assert flat(whole).norm() > 0


def test_groups_do_not_lengthen_the_step_beyond_the_kl_bound():
    common, nearly = (step(factors, rule="clip")[0] for factors in (10.0, {"a": 10.0, "b": 9.999}))
    torch.testing.assert_close(flat(nearly), flat(common), rtol=1e-3, atol=0)


def test_the_largest_factor_is_that_of_the_rate():
    params = mlp().params
    scales = Scales.of({"a": 0.2, "b": torch.tensor(0.8)}, params)
    assert float(scales.largest) == pytest.approx(0.8)
    nat, previous = scales.directions(params, params)
    torch.testing.assert_close(nat, {"a": 0.25 * params["a"], "b": params["b"]})
    torch.testing.assert_close(previous, params, rtol=0, atol=0)
    none = Scales.of({"a": 0.0, "b": 0.0}, params)
    assert float(none.largest) == 0 and not any(flat(each).any() for each in none.directions(params, params))


def second(factor, **settings):
    """The update and the learning rate of a second step, after one with the factor 1."""
    problem = mlp(ff.Gaussian(), examples=40)
    opt = ff.adaptive(built(problem), damping=0.1, **settings)
    rng, batch = torch.Generator().manual_seed(0), (problem.x, problem.y)
    first, state, _ = opt.step(problem.params, opt.init(problem.params), batch, generator=rng)
    params, _, info = opt.step(first, state, batch, generator=rng, lr_scale=factor)
    assert not info.adapted.rejected and flat(state.update).any()
    return ff.tree.add(params, first, scale=-1.0), info.adapted


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("zero", [0.0, torch.tensor(0.0), {"a": 0.0, "b": 0.0}], ids=str)
def test_the_factor_zero_stops_the_parameters_with_their_momentum(name, zero):
    assert not flat(second(zero, weight_decay=0.1, **SETTINGS[name])[0]).any()


def test_the_factor_of_a_free_step_scales_its_momentum_too():
    (whole, _), (half, found) = second(1.0), second(0.5)
    torch.testing.assert_close(flat(half), 0.5 * flat(whole))
    assert float(found.momentum) != 0


@pytest.mark.parametrize("name", SETTINGS)
def test_a_frozen_parameter_neither_moves_nor_decays(name):
    moved, _ = second({"a": 1.0, "b": 0.0}, weight_decay=0.1, **SETTINGS[name])
    assert moved["a"].any() and not moved["b"].any()


@pytest.mark.parametrize("name", SETTINGS)
def test_weight_decay_subtracts_each_parameters_share_of_the_old_value(name):
    scales = {"a": 1.0, "b": 0.5}
    (free, rates), (decayed, again) = (step(scales, weight_decay=w, **SETTINGS[name]) for w in (0.0, 0.1))
    assert not rates.adapted.rejected and rates.adapted.learning_rate == again.adapted.learning_rate
    share = 0.1 * float(rates.adapted.learning_rate)
    old = mlp(ff.Gaussian(), examples=40).params
    expected = {"a": free["a"] - share * old["a"], "b": free["b"] - 0.5 * share * old["b"]}
    torch.testing.assert_close(decayed, expected)


@pytest.mark.parametrize(
    ("factors", "error", "words"),
    [
        ({"a": 1.0, "b": 1.0, "typo": 100.0}, errors.StructureError, "typo"),
        ({"a": 1.0}, errors.StructureError, "b"),
        ({}, errors.StructureError, "a"),
        (-1.0, errors.HyperparameterError, "lr_scale must be >= 0"),
        (float("nan"), errors.HyperparameterError, "lr_scale must be >= 0"),
        ({"a": 1.0, "b": -0.5}, errors.HyperparameterError, "lr_scale of b"),
    ],
    ids=str,
)
def test_factors_that_fit_no_parameter_raise(factors, error, words):
    with pytest.raises(error, match=words):
        step(factors)


def test_parameters_decay_by_at_most_all_and_never_grow():
    shares = [float(decay(torch.tensor(rate), 0.5)) for rate in (-1.0, 0.0, 0.4, 10.0)]
    assert shares == pytest.approx([0.0, 0.0, 0.2, 1.0])


def test_a_step_against_the_direction_does_not_enlarge_the_parameters():
    """The given momentum repeats an update that went too far, so the model goes back: α < 0, and nothing decays."""
    problem = mlp(ff.Gaussian(), examples=40)
    batch = problem.x, problem.model(problem.params, problem.x) + 1e-3
    params, rates = {}, {}
    for w in (0.0, 0.1):
        opt = ff.adaptive(built(problem), damping=0.1, momentum=0.9, weight_decay=w, look_back=False, model_examples=40)
        first = opt.init(problem.params)
        nat, _, _ = opt.ng.step(problem.params, first.curvature, batch, generator=torch.Generator().manual_seed(0))
        state = first._replace(update=unflat(problem, -3 * flat(nat)))
        params[w], _, info = opt.step(problem.params, state, batch, generator=torch.Generator().manual_seed(0))
        assert not info.adapted.rejected
        rates[w] = float(info.adapted.learning_rate)
    assert rates[0.1] == rates[0.0] < 0
    torch.testing.assert_close(params[0.1], params[0.0], rtol=0, atol=0)


def test_a_given_rate_decays_as_it_is_whatever_the_kl_bound_leaves_of_the_step():
    problem = mlp(examples=40)
    moved = {}
    for w in (0.0, 0.1):
        opt = ff.adaptive(built(problem), lr=0.5, kl_bound=1e-8, momentum=0.0, damping=0.1, weight_decay=w)
        moved[w], _, (info,) = steps(problem, opt, 1)
        assert not info.adapted.rejected and info.adapted.learning_rate < 0.1
    for name, start in problem.params.items():
        torch.testing.assert_close(moved[0.0][name] - moved[0.1][name], 0.05 * start, rtol=1e-9, atol=1e-12)
