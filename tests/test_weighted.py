"""A weight per example: a weight of 2 is an example seen twice, whatever the batches, and bad weights are errors."""

import pytest
import torch

import fisherfn as ff
from fisherfn.errors import ShapeError, StructureError, TargetError
from tests import zoo
from tests.oracles import close, vec

COUNTS = torch.tensor([2.0, 1.0, 0.0, 3.0, 1.0, 2.0, 1.0])


def problem(id):
    """A problem with weights, and the same examples, each as often as its weight says."""
    p = zoo.pick(id)
    weights = COUNTS[: len(p.x)].double()
    again = torch.repeat_interleave(torch.arange(len(p.x)), weights.long())
    return p, weights, (p.x[again], p.y[again])


def build(p, likelihood, method="exact", fisher="type2"):
    return ff.natural_gradient(p.model, p.params, p.x, likelihood=likelihood, method=method, fisher=fisher)


@pytest.mark.parametrize("id", ["mlp-gaussian", "mlp-categorical", "sequence-pooled"])
def test_a_weight_of_two_is_an_example_seen_twice(id):
    p, weights, repeated = problem(id)
    share = len(repeated[0]) / len(p.x)
    batch = p.x, (p.y, weights)
    ng, alone = build(p, ff.Weighted(p.likelihood)), build(p, p.likelihood)
    stats, expected = ng.stats(p.params, batch), alone.stats(p.params, repeated)
    close(stats.loss, share * expected.loss)
    close(vec(stats.grads), share * vec(expected.grads))
    close(ng.fisher(stats).dense(), share * alone.fisher(expected).dense())
    close(ng.loss(p.params, batch), share * expected.loss)
    along = [zoo.random_tree(p.params)]
    models = [ff.quadratic_model(n, p.params, b, along) for n, b in ((ng, batch), (alone, repeated))]
    close(models[0].curvature, share * models[1].curvature)
    close(models[0].slope, share * models[1].slope)


def test_weights_multiply_those_of_the_likelihood():
    p, weights, _ = problem("mlp-categorical")
    both, once = (weights, (p.y, weights)), (weights.square(), p.y)
    found = [build(p, ff.Weighted(ff.Categorical())).stats(p.params, (p.x, (y, w))) for w, y in (both, once)]
    fishers = [build(p, ff.Categorical()).fisher(each).dense() for each in found]
    close(fishers[0], fishers[1])


@pytest.mark.parametrize("method", ["kfac", "exact"])
def test_a_data_set_with_weights_is_one_large_batch(method):
    p, weights, _ = problem("mlp-gaussian")
    ng = build(p, ff.Weighted(p.likelihood), method)
    n, v = len(p.x), zoo.random_tree(p.params)
    states = []
    for size in (2, n):
        loader = list(zip(p.x.split(size), zip(p.y.split(size), weights.split(size), strict=True), strict=True))
        state, info = ng.fit(p.params, loader, damping=0.1)
        ff.check(info)
        states.append(vec(ng.matvec(state, v)))
    close(states[0], states[1])


def test_labels_are_sampled_from_the_likelihood():
    p, weights, _ = problem("mlp-categorical")
    ng, alone = (build(p, each, fisher="mc") for each in (ff.Weighted(p.likelihood), p.likelihood))
    ones, plain = (p.x, (p.y, torch.ones_like(weights))), (p.x, p.y)
    drawn = [n.stats(p.params, b, generator=zoo.generator(3)) for n, b in ((ng, ones), (alone, plain))]
    close(ng.fisher(drawn[0]).dense(), alone.fisher(drawn[1]).dense())
    assert not hasattr(ff.Weighted(ff.Gaussian()), "score")


@pytest.mark.parametrize("bad", [torch.full((7,), -1.0), torch.zeros(7), torch.full((7,), torch.nan)])
def test_bad_weights_are_an_error(bad):
    p, weights, _ = problem("mlp-gaussian")
    ng = build(p, ff.Weighted(p.likelihood))
    bad = torch.where(torch.arange(len(p.x)) == 1, bad[: len(p.x)].double(), weights if bad.sum() else 0.0)
    _, _, info = ng.step(p.params, ng.init(p.params), (p.x, (p.y, bad)))
    with pytest.raises((TargetError, ff.errors.NonFiniteError)):
        ff.check(info)


def test_bad_targets_are_an_error_as_without_weights():
    p, weights, _ = problem("mlp-categorical")
    ng = build(p, ff.Weighted(p.likelihood))
    _, _, info = ng.step(p.params, ng.init(p.params), (p.x, (p.y + 99, weights)))
    with pytest.raises(TargetError):
        ff.check(info)
    with pytest.raises(StructureError, match="pair"):
        ng.stats(p.params, (p.x, p.y))
    with pytest.raises(ShapeError, match="each example"):
        ng.stats(p.params, (p.x, (p.y, weights.unsqueeze(1))))
    assert ff.Weighted(ff.Gaussian()).observed(torch.zeros(2, 1), None) == (ff.Gaussian(), None)
    assert ff.Weighted(ff.Categorical()).observed(torch.zeros(2, 1), None)[1] is None


@pytest.mark.parametrize("ignored", [0, 2])
def test_the_quadratic_model_counts_what_the_loss_counts(ignored):
    """Positions without a label have no curvature."""
    outputs, labels = torch.randn(3, 4, 5, generator=zoo.generator(0)).double(), torch.zeros(3, 4).long()
    labels[:, :ignored] = -100
    params = {"w": torch.zeros(5, dtype=torch.float64)}
    ng = ff.natural_gradient(
        lambda p, x: x + p["w"], params, outputs, likelihood=ff.Categorical(), method="exact", fisher="type2"
    )
    along = {"w": torch.arange(5.0).double()}
    model = ff.quadratic_model(ng, params, (outputs, labels), [along])
    fisher = ng.fisher(ng.stats(params, (outputs, labels)))
    close(model.curvature[0, 0], vec(along) @ fisher.dense() @ vec(along))
