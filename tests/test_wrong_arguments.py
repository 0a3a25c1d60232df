"""Arguments of the wrong kind: every one raises a typed error that names it, and none is accepted silently."""

import math

import pytest
import torch
from torch.nn import functional as F

import fisherfn as ff
from tests import zoo
from tests.oracles import close

E = ff.errors


@pytest.fixture(scope="module")
def known():
    """Return a natural gradient, parameters, a state, statistics and a batch."""
    problem = zoo.pick("mlp-categorical")
    ng = problem.build(fisher="type2")
    stats = ng.stats(problem.params, problem.batch)
    state, _ = ng.update(ng.init(problem.params, damping=0.1), stats)
    return ng, problem.params, ng.invert(state)[0], stats, problem.batch


def wrong_trees(params):
    first, *_ = params
    return {
        "a list": [1, 2],
        "nothing": None,
        "a name missing": {name: p for name, p in params.items() if name != first},
        "a name too many": {**params, "more": params[first]},
        "no tensors": dict.fromkeys(params, 1.0),
        "None as leaves": dict.fromkeys(params),
        "another shape": {**params, first: params[first].unsqueeze(0)},
        "integers": {name: torch.ones(p.shape, dtype=torch.int64) for name, p in params.items()},
        "flags": {name: torch.ones(p.shape, dtype=torch.bool) for name, p in params.items()},
    }


CASES = list(wrong_trees({"w": torch.ones(2)}))
CALLS = {
    "F @": lambda ng, params, state, stats, x, v: ng.fisher(stats) @ v,
    "F.solve": lambda ng, params, state, stats, x, v: ng.fisher(stats).solve(v, 0.1),
    "approximation @": lambda ng, params, state, stats, x, v: ng.approximation(state) @ v,
    "inverse @": lambda ng, params, state, stats, x, v: ng.inverse(state) @ v,
    "implicit.solve": lambda ng, params, state, stats, x, v: ng.implicit_fisher(params, x).solve(v, 0.1, iterations=1),
    "start": lambda ng, params, state, stats, x, v: ng.implicit_fisher(params, x).solve(params, 0.1, start=v or 0),
    "precondition": lambda ng, params, state, stats, x, v: ng.precondition(state, v),
    "matvec": lambda ng, params, state, stats, x, v: ng.matvec(state, v),
    "step_from": lambda ng, params, state, stats, x, v: ng.step_from(state, v),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("case", CASES)
def test_a_tree_that_is_not_like_params_is_refused(known, call, case):
    ng, params, state, stats, (x, _) = known
    with zoo.as_installed(), pytest.raises((E.StructureError, E.ShapeError), match=r"tree|has (shape|type)|cannot be"):
        call(ng, params, state, stats, x, wrong_trees(params)[case])


@pytest.mark.parametrize(
    "make",
    [
        lambda: ff.Gaussian("x"),
        lambda: ff.Gaussian(None),
        lambda: ff.Gaussian(True),
        lambda: ff.Gaussian(math.inf),
        lambda: ff.Gaussian(torch.ones(4)),
        lambda: ff.lanczos(floor="x"),
        lambda: ff.lanczos(floor=math.nan),
        lambda: ff.kfac(diagonal_above="x"),
        lambda: ff.kfac(diagonal_above=2.5),
        lambda: ff.kfac(diagonal_above=math.nan),
        lambda: ff.kfac(diagonal_above=-1),
        lambda: ff.two_level(vectors=2.5),
        lambda: ff.two_level(vectors="2"),
    ],
)
def test_hyperparameters_of_the_wrong_kind_are_refused(make):
    with (
        zoo.as_installed(),
        pytest.raises(E.HyperparameterError, match="(variance|floor|above|vectors) must"),
    ):
        make()


@pytest.mark.parametrize("likelihood", [ff.Gaussian(), ff.Bernoulli()])
def test_complex_targets_are_refused(likelihood):
    with pytest.raises(E.TargetError, match="real numbers, got torch.complex64"):
        likelihood.nll(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.complex64))


def test_flags_are_no_targets_of_a_gaussian():
    for call in (ff.Gaussian().nll, ff.Gaussian().score):
        with pytest.raises(E.TargetError, match=r"torch\.bool.*Bernoulli"):
            call(torch.ones(2, 3), torch.ones(2, 3).bool())


# ----------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("shared", [2.0, torch.tensor(2.0, dtype=torch.float64)], ids=["number", "tensor"])
def test_targets_shared_by_all_examples_are_not_cut_into_chunks(shared):
    """The loss scales with the number, and so does the gradient."""
    rng = zoo.generator(0)
    params = {"w": torch.randn(2, 3, generator=rng, dtype=torch.float64)}
    x, y = (torch.randn(5, d, generator=rng, dtype=torch.float64) for d in (3, 2))
    ng = ff.natural_gradient(
        lambda p, x: F.linear(x, p["w"]), params, x, fisher="empirical",
        likelihood=lambda f, t: (f - t[0]).square().sum(-1) * t[1],
    )  # fmt: skip
    stats = ng.stats(params, (x, (y, shared)), chunk_size=2)
    residual = F.linear(x, params["w"]) - y
    close(stats.grads["w"], 2 * 2 * residual.mT @ x / 5)
    close(stats.loss, 2 * residual.square().sum(1).mean())


def test_statistics_are_joined_from_any_iterable_of_them(known):
    ng, params, _, stats, (x, y) = known
    parts = [ng.stats(params, (x[:2], y[:2])), ng.stats(params, (x[2:], y[2:]))]
    close(ff.join(part for part in parts).grads, stats.grads)
    mc = [ng.stats(params, (x, y), fisher="mc", samples=s, generator=zoo.generator(0)) for s in (1, 2)]
    for wrong, says in ((stats, "list"), (None, "list"), ([1], "list"), (mc, "numbers of samples")):
        with zoo.as_installed(), pytest.raises(E.StructureError, match=says):
            ff.join(wrong)
    with pytest.raises(E.EmptyBatchError):
        ff.join(iter([]))
