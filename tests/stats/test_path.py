"""A run on another path than the build is refused, whatever differs: the calls, not only their number.

`one` is the path of positive inputs, which the build sees, `other` that of negative ones.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherfn as ff
from tests.oracles import close
from tests.zoo import as_installed, generator

E = ff.errors
N = 5


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def linear(p, x):
    return F.linear(x, p["w"], p["b"])


def ids(x):
    return (x.abs() * 10).long() % 3


# by name: the two paths, and words of the message
PATHS = {
    "no bias": (linear, lambda p, x: F.linear(x, p["w"]), "bias None, at the build with 'b'"),
    "a bias": (lambda p, x: F.linear(x, p["w"]) * p["b"], linear, "another path|bias"),
    "another bias": (
        lambda p, x: F.linear(F.linear(x, p["w"], p["b"]), p["v"]),
        lambda p, x: F.linear(F.linear(x, p["w"]), p["v"], p["b"]),
        "bias None, at the build with 'b'",
    ),
    "transposed": (linear, lambda p, x: x @ p["w"] + p["b"], "as matmul, at the build as linear"),
    "read again": (linear, lambda p, x: linear(p, x) * p["w"].sum(), "'w' of a layer is read by one more call"),
    "transpose read": (linear, lambda p, x: linear(p, x) * p["w"].T.exp().sum(), "'w' of a layer is read"),
    "read in a list": (linear, lambda p, x: linear(p, x) * torch.stack([p["w"], p["v"]]).sum(), "'w' of a layer"),
    "bias read again": (linear, lambda p, x: linear(p, x) * p["b"], "'b' of a layer is read by one more call"),
    "twice": (linear, lambda p, x: linear(p, linear(p, x)), "used 2 times, 1 at the build"),
    "dilation": (
        lambda p, x: F.conv1d(x[:, None], p["k"], padding=1).flatten(1),
        lambda p, x: F.conv1d(x[:, None], p["k"], padding=2, dilation=2).flatten(1),
        r"dilation=\(2,\)",
    ),
    "padding index": (
        lambda p, x: F.embedding(ids(x), p["w"]).flatten(1),
        lambda p, x: F.embedding(ids(x), p["w"], padding_idx=0).flatten(1),
        "padding=0",
    ),
    "groups of another product": (
        lambda p, x: torch.einsum("nki,kio->nko", x[:, None].expand(-1, 3, -1), p["t"]).flatten(1),
        lambda p, x: torch.einsum("nki,iko->nko", x[:, None].expand(-1, 3, -1), p["t"]).flatten(1),
        r"groups=\(1,\).*at the build with .*groups=\(0,\)",
    ),
    "an unused parameter": (linear, lambda p, x: linear(p, x) * p["v"].sum(), "'v' is read, unlike at the build"),
    "an unused layer": (linear, lambda p, x: F.linear(linear(p, x), p["v"]), "'v' is read, unlike at the build"),
}
PARAMS = {
    "w": normal(3, 3),
    "b": normal(3, seed=1),
    "v": normal(3, 3, seed=2),
    "k": normal(2, 1, 3, seed=3),
    "t": normal(3, 3, 3, seed=4),
}


def built(one, other, x):
    def model(p, x):
        return one(p, x) if bool((x > 0).all()) else other(p, x)

    return model, ff.natural_gradient(model, PARAMS, x, likelihood=ff.Gaussian(), fisher="type2", unused="ignore")


@pytest.mark.parametrize("name", PATHS)
def test_another_path_is_refused_and_the_same_path_is_right(name):
    one, other, words = PATHS[name]
    x = normal(N, 3, seed=5).abs() + 0.1
    model, ng = built(one, other, x)
    y = torch.zeros_like(model(PARAMS, x))
    truth = torch.func.grad(lambda p: model(p, x).square().sum() / (2 * N))(PARAMS)
    close(dict(ng.stats(PARAMS, (x, y)).grads), truth)
    with as_installed(), pytest.raises(E.StructureError, match=words) as caught:
        ng.stats(PARAMS, (-x, torch.zeros_like(model(PARAMS, -x))))
    assert "Build with inputs that take the same path" in str(caught.value)


def test_both_sides_of_a_branch_may_make_the_same_calls():
    model, ng = built(lambda p, x: linear(p, x).tanh(), lambda p, x: linear(p, -x).exp(), normal(N, 3).abs())
    x = -normal(N, 3).abs()
    truth = torch.func.grad(lambda p: model(p, x).square().sum() / (2 * N))(PARAMS)
    close(dict(ng.stats(PARAMS, (x, torch.zeros(N, 3, dtype=x.dtype))).grads), truth)


def test_parameters_of_another_precision_are_on_the_same_path():
    """The configuration of an embedding names its type."""

    def model(p, x):
        return F.linear(F.embedding(ids(x), p["e"]).flatten(1), p["h"])

    params, x = {"e": normal(3, 2), "h": normal(4, 6)}, normal(N, 3)
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Gaussian(), fisher="type2")
    single = {name: p.float() for name, p in params.items()}
    assert {block.kind for block in ng.layout.layers} == {"embedding", "linear"}
    y = torch.zeros(N, 4)
    truth = torch.func.grad(lambda p: model(p, x).square().sum() / (2 * N))(single)
    found = ng.stats(single, (x, y)).grads
    close({name: g.float() for name, g in found.items()}, truth, tol=1e-5)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(x) if bool((x > 0).all()) else F.linear(x, self.layer.weight)


def test_a_watched_pass_takes_the_path_of_the_build_too():
    net, x = Branches(), torch.rand(N, 3, generator=generator()) + 0.1
    pre = ff.optim.Preconditioner(net, example_inputs=x, update_every=1)
    with pre.watch():
        net(x).square().mean().backward()
    pre.step()
    with as_installed(), pytest.raises(E.StructureError, match="bias None"), pre.watch():
        net(-x)
