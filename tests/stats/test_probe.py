"""Runs of a build: zeros hide nothing from its checks, and the caller keeps the parameters."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherfn as ff
from fisherfn.errors import CoverageError, ModelError
from fisherfn.stats.probe import Probe
from tests.layers.checks import X, normal
from tests.oracles import close


class Scaled(nn.Module):
    """A layer whose weight is divided by its largest entry, without a gradient, before a head of zeros."""

    def __init__(self, how):
        super().__init__()
        self.how, self.a, self.b, self.head = how, nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        h = self.a(x).tanh()
        if self.how == "scaled":
            with torch.no_grad():
                scale = self.b.weight.abs().max()
            h = F.linear(h, self.b.weight / scale, self.b.bias).tanh()
        else:
            h = self.b(h - h.mean(0))
        return self.head(h)


def test_a_head_of_zeros_hides_nothing_from_the_build():
    """Behind it every gradient is zero at the start, and would confirm any block."""
    model, params, context = ff.functional(Scaled("scaled").double())
    build = {"likelihood": ff.Gaussian(), "method": ff.exact(), "fisher": "type2", "context": context}
    ng = ff.natural_gradient(model, params, X, **build)
    other = {name: p + 0.3 * normal(*p.shape, seed=n) for n, (name, p) in enumerate(params.items())}
    y = normal(5, 3, seed=9)
    found = ng.stats(other, (X, y), context=context).grads
    expected = torch.func.grad(lambda p: 0.5 * (model(p, X, context)[0] - y).square().sum() / len(X))(other)
    close({**found}, expected)
    with pytest.raises(CoverageError, match="couples the examples"):
        model, params, context = ff.functional(Scaled("centred").double())
        ff.natural_gradient(model, params, X, **{**build, "context": context})


def test_the_parameters_of_a_build_stay_the_callers():
    params = {"w": torch.zeros(4, 3, dtype=torch.float64)}
    ff.natural_gradient(lambda p, x: x @ p["w"], params, X, likelihood=ff.Gaussian())
    assert not params["w"].any()


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda a, x: x[:, :3] * (1 + torch.sqrt(a + 1e-6)), (3,)),
        (lambda a, x: x @ torch.linalg.cholesky(torch.eye(4).double() - 40 * (a + a.mT)), (4, 4)),
    ],
    ids=["square root", "Cholesky"],
)
def test_zeros_on_which_a_model_depends_do_not_refuse_it(model, shape):
    """Numbers of both signs, or any at all, are outside of the domain."""
    params = {"a": torch.zeros(shape, dtype=torch.float64)}
    ng = ff.natural_gradient(lambda p, x: model(p["a"], x), params, X, likelihood=ff.Gaussian(), fisher="type2")
    assert torch.isfinite(ng.stats(params, (X, model(params["a"], X))).grads["a"]).all()


def test_a_parameter_under_two_names_stays_one():
    w = normal(4, 4)
    probe = Probe(lambda p, x: x @ p["a"] @ p["b"], {"a": w, "b": w}, X, ()).apart()
    assert probe.params["a"] is probe.params["b"] is not w


class Changing(nn.Module):
    """A net that changes its weight while it runs."""

    def __init__(self, how):
        super().__init__()
        self.how, self.a = how, nn.Linear(4, 3)

    def forward(self, x):
        weight = self.a.weight
        if self.how == "in place":
            with torch.no_grad():
                weight.clamp_(0)
        elif self.how == "data in place":
            weight.data.clamp_(min=0)
        elif self.how == "with a gradient":
            weight.clamp_(min=0)
        elif self.how == "out":
            torch.clamp(weight, min=0, out=weight)
        else:
            weight.data = F.normalize(weight.data)
        return self.a(x)


def test_a_model_that_writes_into_an_existing_tensor_is_refused():
    model, params, context = ff.functional(Changing("out"))
    with pytest.raises(ModelError, match=r"writes a result into a tensor that exists \(out=\)"):
        ff.natural_gradient(model, params, X.float(), likelihood=ff.Gaussian(), context=context)


@pytest.mark.parametrize("before", [lambda w: w, lambda w: F.normalize(w.abs())], ids=["changed", "has these values"])
@pytest.mark.parametrize("how", ["in place", "data in place", "with a gradient", "data"])
def test_a_model_that_changes_its_parameters_is_refused_and_they_are_as_before(how, before):
    model, params, context = ff.functional(Changing(how))
    params = {name: before(p) if p.ndim == 2 else p for name, p in params.items()}
    kept = {name: p.clone() for name, p in params.items()}
    with pytest.raises(ModelError, match="changes a parameter"):
        ff.natural_gradient(model, params, X.float(), likelihood=ff.Gaussian(), context=context)
    assert all(torch.equal(kept[name], p) for name, p in params.items())
