"""Factors on the learning rate, from schedules and parameter groups, and weight decay."""

import pytest
import torch

import fisherfn as ff
from fisherfn.adapt.scales import decay, scaled
from tests.adapt.problems import built, flat, mlp, unflat

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
    problem = mlp()
    nat, largest = scaled(problem.params, {"a": 0.2, "b": torch.tensor(0.8)})
    assert float(largest) == pytest.approx(0.8)
    torch.testing.assert_close(nat, {"a": 0.25 * problem.params["a"], "b": problem.params["b"]})
    nothing, zero = scaled(problem.params, {"a": 0.0, "b": 0.0})
    assert float(zero) == 0 and not flat(nothing).any()


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
