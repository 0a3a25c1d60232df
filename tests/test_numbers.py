"""Hyperparameters outside their range: an error where their value can be read, a false mask where it cannot."""

import math

import pytest
import torch

import fisherfn as ff
from fisherfn.errors import expect_count, expect_number
from tests import zoo
from tests.methods.protocol import METHODS

Wrong = ff.errors.HyperparameterError
RATES = [-0.5, 1.0, 2.0, math.nan, math.inf]


def problem(method="kfac"):
    p = zoo.pick("mlp-categorical")
    return p.build(method=method, fisher="type2"), p.params, p.batch


@pytest.mark.parametrize("as_given", [float, torch.tensor], ids=["float", "tensor"])
def test_values_that_can_be_read_are_checked(as_given):
    ng, params, batch = problem()
    stats = ng.stats(params, batch)
    state, _ = ng.update(ng.init(params), stats)
    for wrong in (-1e-3, math.nan, math.inf):
        for call in (
            lambda w: ng.init(params, damping=w),
            lambda w: ng(params, stats, damping=w),
            lambda w: ng.fisher(stats).solve(params, w),
            lambda w: ng.fisher(stats).logdet(w),
            lambda w: ng.approximation(state).logdet(w),
            lambda w: ng.approximation(state).to_scipy(w),
            lambda w: ng.update(state, stats, weight=w),
            lambda w: ff.Gaussian(w),
            lambda w: ff.Categorical(label_smoothing=w),
            lambda w: ff.sum_of_terms({"a": ff.Term(ng.model, batch[0], ff.Categorical(), weight=w)}, params),
        ):
            with pytest.raises(Wrong, match=r"got (tensor\()?(-0\.001|nan|inf|-1\.0000e-03)"):
                call(as_given(wrong))
    for wrong in RATES:
        with pytest.raises(Wrong, match="ema must lie in"):
            ng.init(params, ema=as_given(wrong))
    with pytest.raises(Wrong, match="weight must be positive"):
        ng.update(state, stats, weight=as_given(0.0))
    assert ng.init(params, damping=as_given(0.25), ema=as_given(0.5)).damping == 0.25


@pytest.mark.parametrize("wrong", [torch.ones(3), torch.ones(1), torch.ones(0)], ids=lambda t: str(tuple(t.shape)))
def test_a_tensor_with_dimensions_is_not_one_number(wrong):
    ng, params, batch = problem()
    stats = ng.stats(params, batch)
    for call in (
        lambda: ng.init(params, damping=wrong),
        lambda: ng.init(params, ema=wrong),
        lambda: ng.update(ng.init(params), stats, weight=wrong),
        lambda: ng.fisher(stats).logdet(wrong),
    ):
        with pytest.raises(Wrong, match=rf"one number, got a tensor of shape \({wrong.shape[0]},\).*vmap"):
            call()


def test_tensors_of_other_kinds_are_no_numbers():
    for wrong in (torch.tensor(True), torch.tensor(1j)):
        with pytest.raises(Wrong):
            expect_number("n", wrong, lambda v: True, "must be a number")
    with pytest.raises(Wrong):
        expect_count("n", torch.tensor(2.5))
    expect_count("n", torch.tensor(2))


@METHODS
def test_negative_damping_of_one_member_is_a_false_mask(method):
    """Under vmap no value can be read; the other members are sound."""
    ng, params, batch = problem(method)

    def step(damping):
        return ng.step(params, ng.init(params, damping=damping), batch)[2].ok

    ok = torch.vmap(step)(torch.tensor([0.1, -0.01, 0.1, torch.nan], dtype=torch.float64))
    for mask in ok.values():
        assert mask.tolist() == [True, False, True, False]


@pytest.mark.parametrize("method", ["kfac", "ekfac", "kpsvd", "lanczos"])
def test_a_running_average_of_one_member_outside_its_range_is_a_false_mask(method):
    ng, params, batch = problem(method)
    stats = ng.stats(params, batch)

    def update(ema, weight):
        return ng.update(ng.init(params, ema=ema), stats, weight=weight)

    fine = torch.tensor(0.9, dtype=torch.float64)
    for name, wrong in [("ema", each) for each in (-0.5, 2.0, math.nan)] + [("weight", 0.0), ("weight", -1.0)]:
        values = {key: torch.stack([fine, fine]) for key in ("ema", "weight")}
        values[name] = torch.tensor([0.9, wrong], dtype=torch.float64)
        _, info = torch.vmap(update)(values["ema"], values["weight"])
        assert all(mask.tolist() == [True, False] for mask in info.ok.values())
        with pytest.raises(ff.errors.NonFiniteError, match="ema or the weight"):
            ff.check(info)
