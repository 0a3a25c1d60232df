"""Affine parts of normalisations: a 1×1 layer (1×2 with bias) for each entry or channel. Batch norm: test_norm.py."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import nn

import fisherfn as ff
from tests import oracles, strategies, zoo
from tests.layers.checks import check, exact_blocks, kfac_matrix, kinds, normal
from tests.nets import Readout
from tests.oracles import close
from tests.zoo import from_net, sampled


def kind_of(layer):
    """The name in the report."""
    names = {nn.LayerNorm: "layer norm", nn.RMSNorm: "rms norm", nn.GroupNorm: "group norm"}
    name = "instance norm" if "Instance" in type(layer).__name__ else "batch norm"
    return names.get(type(layer), name)


@given(strategies.read_out(strategies.norms()), strategies.fishers(), strategies.kfac_options())
def test_drawn_norms_are_exact(problem, fisher, options):
    check(problem, {"0": kind_of(problem.net[0])}, fisher, **options)


NORMS = {
    "layer-two-axes": (nn.LayerNorm((2, 3)), (4, 2, 3), (6, 4)),
    "layer-no-positions": (nn.LayerNorm(3, bias=False), (3,), (3, 1)),
    "rms": (nn.RMSNorm(4), (2, 4), (4, 2)),
    "rms-eps": (nn.RMSNorm((2, 2), eps=0.3), (3, 2, 2), (4, 3)),
    "group": (nn.GroupNorm(2, 4, eps=0.1), (4, 2, 3), (4, 6)),
    "group-no-positions": (nn.GroupNorm(2, 6), (6,), (6, 1)),
    "instance": (nn.InstanceNorm2d(2, affine=True), (2, 2, 3), (2, 6)),
    "instance-tracking": (nn.InstanceNorm1d(3, affine=True, track_running_stats=True).eval(), (3, 4), (3, 4)),
    "instance-3d": (nn.InstanceNorm3d(2, affine=True), (2, 1, 2, 2), (2, 4)),
}


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_has_a_group_for_each_of_its_entries(norm):
    layer, shape, (groups, positions) = NORMS[norm]
    run = check(from_net(nn.Sequential(layer, Readout(2)), (3, *shape), "categorical"), {"0": kind_of(layer)})
    columns = 1 if getattr(layer, "bias", None) is None else 2
    tap = run.stats.tap("0")
    assert tap.a.shape == (groups, 3, positions, columns) and tap.g.shape == (groups, 2, 3, positions, 1)


CALLS = {
    "F.layer_norm": (lambda p, x: F.layer_norm(x, (4,), p["w"], p["b"]), "layer norm"),
    "layer-norm-keywords": (
        lambda p, x: F.layer_norm(eps=0.1, bias=p["b"], normalized_shape=[4], weight=p["w"], input=x),
        "layer norm",
    ),
    "torch.layer_norm": (lambda p, x: torch.layer_norm(x, (4,), p["w"], p["b"]), "layer norm"),
    "F.group_norm": (lambda p, x: F.group_norm(x.mT, 2, p["w"], p["b"], 0.2), "group norm"),
    "F.instance_norm": (lambda p, x: F.instance_norm(x.mT, weight=p["w"], bias=p["b"], eps=0.2), "instance norm"),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_way_to_call_a_norm(call):
    function, kind = CALLS[call]
    params = {"w": normal(4), "b": normal(4, seed=1)}

    def model(params, x):
        return Readout(2)(function(params, x))

    problem = zoo.from_model(model, params, normal(3, 2, 4, seed=2), "categorical", zoo.generator(), {})
    run = sampled(problem, "type2")
    close(run.ng.fisher(run.stats).dense(), oracles.fisher_matrix(problem, "type2"))
    close(dict(run.stats.grads), oracles.mean_gradient(problem))
    if call != "torch.layer_norm":  # below the functional that the families know
        assert kinds(run.ng) == {"w": kind}


def test_a_bias_alone_is_a_shift():
    """weight=None: no product of a parameter and an input."""

    def model(p, x):
        return Readout(2)(F.layer_norm(x, (4,), None, p["b"]))

    problem = zoo.from_model(model, {"b": normal(4)}, normal(3, 4, seed=2), "categorical", zoo.generator(), {})
    run = sampled(problem, "type2")
    assert kinds(run.ng) == {"b": "elementwise"}
    close(run.ng.fisher(run.stats).dense(), oracles.fisher_matrix(problem, "type2"))


def test_a_norm_between_layers_has_the_cross_terms():
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.RMSNorm(4), nn.Linear(4, 3))
    problem = from_net(net, (4, 2, 3), "categorical")
    check(problem, {"0": "linear", "1": "layer norm", "3": "rms norm", "4": "linear"})


def test_one_datum_at_one_position_is_exact():
    """Within an entry's 1×2 block; between entries K-FAC has nothing."""
    problem = from_net(nn.Sequential(nn.LayerNorm(3), Readout(2)), (1, 3), "categorical")
    matrix, run = kfac_matrix(problem)
    exact, same_entry = exact_blocks(problem, run), torch.eye(3, dtype=torch.float64).repeat(2, 2)
    close(matrix, exact * same_entry)


@pytest.mark.parametrize("training", [True, False])
def test_instance_norm_with_running_statistics(training):
    """Examples are coupled by no such norm; in training the buffers move as torch moves them."""
    net = (
        nn.Sequential(nn.InstanceNorm1d(3, affine=True, track_running_stats=True), Readout(2)).double().train(training)
    )
    with torch.no_grad():
        net[0].running_mean.copy_(normal(3, seed=1))
    x, y = normal(4, 3, 5), torch.tensor([0, 1, 1, 0])
    model, params, context = ff.functional(net)
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), fisher="empirical", context=context)
    assert kinds(ng) == {"0": "instance norm"}
    stats = ng.stats(params, (x, y), context=context)

    def plain(params, x):
        return model(params, x, context)[0]

    problem = zoo.Problem(plain, params, x, y, ff.Categorical(), zoo.LIKELIHOODS["categorical"][1], {})
    close(ng.fisher(stats).dense(), oracles.fisher_matrix(problem, "empirical"))
    close(dict(stats.grads), oracles.mean_gradient(problem))
    net(x)
    close(stats.context["0.running_mean"], net[0].running_mean)
    close(stats.context["0.running_var"], net[0].running_var)
