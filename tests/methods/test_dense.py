"""The dense block of each layer against the sampled Fisher, its averages, and its solves."""

import pytest
import torch

import fisherfn as ff
from fisherfn import methods
from fisherfn.errors import HyperparameterError
from tests import zoo
from tests.oracles import close, vec


def halves(problem, ng):
    """The statistics of two batches of equal size, and the blocks of their sampled Fishers, by key."""
    n = len(problem.x) // 2
    batches = [(problem.x[:n], problem.y[:n]), (problem.x[n : 2 * n], problem.y[n : 2 * n])]
    stats = [ng.stats(problem.params, batch) for batch in batches]
    return stats, [{b.key: ng.fisher(each).block(b.key) for b in ng.layout.blocks} for each in stats]


@pytest.mark.parametrize("id", ["mlp-categorical", "conv", "sequence-pooled"])
def test_updates_average_the_matrices_and_steps_solve_with_the_average(id):
    problem = zoo.pick(id)
    ng = problem.build(method=ff.dense(), fisher="type2")
    (one, two), (first, second) = halves(problem, ng)
    state = ng.init(problem.params, damping=0.1, ema=0.3)
    for stats in (one, two):
        state, info = ng.update(state, stats)
        ff.check(info)
    state, info = ng.invert(state)
    ff.check(info)
    expected = {key: 0.3 * first[key] + 0.7 * second[key] for key in first}
    close(ng.trace(state), sum(block.trace() for block in expected.values()))
    v = zoo.random_tree(problem.params)
    products, solved = ng.matvec(state, v), ng.precondition(state, v)
    for block in ng.layout.blocks:
        flat, F = block.matrix(v).flatten(), expected[block.key]
        close(block.matrix(products).flatten(), F @ flat)
        damped = F + 0.1 * torch.eye(len(F), dtype=F.dtype)
        close(block.matrix(solved).flatten(), torch.linalg.solve(damped, flat))


def test_a_data_set_in_batches_is_one_large_batch():
    problem = zoo.pick("mlp-gaussian")
    ng = problem.build(method=ff.dense(), fisher="type2")
    v = zoo.random_tree(problem.params)
    loader = list(zip(problem.x.split(2), problem.y.split(2), strict=True))
    states = [ng.fit(problem.params, each, damping=0.1)[0] for each in (loader, [problem.batch])]
    close(vec(ng.precondition(states[0], v)), vec(ng.precondition(states[1], v)))


def test_before_the_first_update_a_step_is_the_gradient_over_the_damping():
    problem = zoo.pick("mlp-gaussian")
    ng = problem.build(method=ff.dense(), fisher="type2")
    v = zoo.random_tree(problem.params)
    close(vec(ng.precondition(ng.init(problem.params, damping=0.5), v)), 2 * vec(v))


def test_a_wide_layer_is_refused():
    params, x = {"w": torch.zeros(65, 64)}, torch.zeros(2, 64)
    ng = ff.natural_gradient(
        lambda p, x: x @ p["w"].T, params, x, likelihood=ff.Gaussian(), method=ff.dense(), fisher="type2"
    )
    with pytest.raises(HyperparameterError, match="4,160 parameters"):
        ng.init(params)


@pytest.mark.parametrize("name", ["dense", "kfac_by_term"])
def test_a_method_without_a_name_says_how_to_pass_it(name):
    with pytest.raises(ff.errors.UnknownNameError, match=rf"method=ff\.{name}\(\)") as caught:
        methods.named(name)
    assert "deflation" not in str(caught.value)
    assert methods.named(getattr(ff, name)()).name == name


def test_every_builder_has_a_name_or_is_listed_as_one_without():
    builders = {getattr(methods, name) for name in methods.__all__ if name not in ("METHODS", "named")}
    assert builders - set(methods.METHODS.values()) == {getattr(methods, name) for name in methods.UNNAMED}
