"""Calls in place on tensors that no example enters: activations of a net on a grid, scaled tables of positions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.layers.checks import check_chunks, check_fisher, check_gradients, check_vmap, kinds
from tests.nets import Readout
from tests.zoo import from_net, sampled

POSITIONS = 3


class Net(nn.Module):
    """`how(net)` is added to the inputs `[N, 3, 4]`."""

    def __init__(self, how):
        super().__init__()
        self.first, self.second = nn.Linear(1, 5), nn.Linear(5, 4)
        self.table, self.scale, self.how = nn.Embedding(POSITIONS, 4), nn.Parameter(torch.empty(4)), how

    def forward(self, x):
        return Readout(2)(torch.tanh(x + self.how(self)))


def points(net):
    return net.first(torch.linspace(-1, 1, POSITIONS, dtype=net.scale.dtype).unsqueeze(1))


def table(net):
    return net.table(torch.arange(POSITIONS))


def divided(x):
    x /= 3
    return x


def view_only(x):
    """Change a view, and use only that."""
    return x.unsqueeze(0).div_(3).squeeze(0)


GRID, TABLE = {"first": "linear", "second": "linear"}, {"table": "embedding"}
LAYERS = {
    "relu": (lambda net: net.second(F.relu(points(net), inplace=True)), GRID),
    "relu, by place": (lambda net: net.second(F.relu(points(net), True)), GRID),
    "module": (lambda net: net.second(nn.ReLU(True)(points(net))), GRID),
    "twice": (lambda net: net.second(nn.ELU(inplace=True)(points(net).mul_(2))), GRID),
    "no value": (lambda net: net.second((h := points(net), h.exp_())[0]), GRID),
    "divided": (lambda net: divided(table(net)), TABLE),
    "a view": (lambda net: view_only(table(net)), TABLE),
    "by a parameter": (lambda net: table(net).mul_(net.scale), TABLE | {"scale": "elementwise"}),
    "a copy of a parameter": (lambda net: net.scale.clone().mul_(2).sin_(), {"scale": "elementwise"}),
}


def stale(net):
    """Change a view, and read the table."""
    h = table(net)
    h.unsqueeze(0).mul_(2)
    return h


def written(net):
    h = table(net)
    h[0] = 1.0
    return h


@pytest.mark.parametrize("name", LAYERS)
def test_they_are_exact_layers(name):
    how, blocks = LAYERS[name]
    check(Net(how), blocks)


@pytest.mark.parametrize("how", [stale, written])
def test_others_fall_back(how):
    check(Net(how), {"table.weight": "fallback"})


def check(net, blocks):
    names = {key.partition(".")[0] for key in blocks}
    problem = from_net(net, (4, POSITIONS, 4), "categorical", trained=lambda name: name.partition(".")[0] in names)
    run = sampled(problem, "type2")
    assert kinds(run.ng) == blocks
    check_gradients(problem, run.ng, run.stats)
    check_fisher(problem, run, "type2")
    check_chunks(problem, run)
    check_vmap(lambda params: dict(run.ng.stats(params, problem.batch).grads), problem.params)
