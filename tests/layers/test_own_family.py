"""A family of one's own decides about its calls: it refuses some, and says how others are without coupling."""

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function

import fisherfn as ff
from fisherfn import layers
from fisherfn.layers import LINEAR, Family
from tests import zoo
from tests.layers.checks import normal
from tests.oracles import close


def centred(x):
    """Subtract the mean over the batch: a call that mixes examples."""
    if has_torch_function((x,)):
        return handle_torch_function(centred, (x,), x)
    return x - x.mean(0)


def model(params, x):
    return centred(F.linear(x, params["w"]))


def family(**functions):
    parts = LINEAR.rows, LINEAR.columns, LINEAR.to_matrix, LINEAR.from_matrix
    return Family("centring", (centred,), lambda function, args, kwargs: None, *parts, **functions)


def built(monkeypatch, **functions):
    monkeypatch.setitem(layers._BY_FUNCTION, centred, [family(**functions)])
    params = {"w": normal(3, 2)}
    likelihood = ff.Categorical()
    with zoo.as_installed():
        ng = ff.natural_gradient(model, params, normal(5, 2, seed=1), likelihood=likelihood, fisher="empirical")
    return params, ng


def test_it_refuses_a_call(monkeypatch):
    def refuse(function, args, kwargs):
        raise ff.errors.CoverageError(f"no run contains {function.__name__}")

    with pytest.raises(ff.errors.CoverageError, match="no run contains centred"):
        built(monkeypatch, refuse=refuse)


def test_a_call_that_couples_examples_is_refused_where_no_family_knows_it(monkeypatch):
    with pytest.raises(ff.errors.CoverageError, match="couples the examples"):
        built(monkeypatch)


def test_it_couples_examples_by_design(monkeypatch):
    """The layer before it stays one, with the cross terms in its output-gradients."""

    def frozen(function, args, kwargs):
        return lambda: args[0] - args[0].mean(0).detach()

    params, ng = built(monkeypatch, uncoupled=frozen)
    assert ng.layout.couples and [block.kind for block in ng.layout.blocks] == ["linear"]
    batch = normal(6, 2, seed=2), torch.tensor([0, 1, 2, 0, 1, 2])
    loss = lambda p: F.cross_entropy(model(p, batch[0]), batch[1])  # noqa: E731
    close(ng.stats(params, batch).grads, torch.func.grad(loss)(params))
