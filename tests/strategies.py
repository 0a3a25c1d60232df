"""Hypothesis: nets, batches and trees as drawn data. Every draw is small, so that brute force stays quick."""

import torch
from hypothesis import strategies as st
from torch import nn

from tests import zoo


class Residual(nn.Module):
    """x + f(x): inputs and outputs of layers that do not sit in a chain."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return x + self.body(x)


ACTIVATIONS = (None, nn.Tanh, nn.Softplus, nn.ReLU, nn.GELU)
LIKELIHOODS = ("categorical", "bernoulli", "gaussian-0.3")


@st.composite
def problems(draw, likelihoods=LIKELIHOODS, activations=ACTIVATIONS, max_shared=2, max_batch=4):
    """A chain of linear layers, now and then residual: widths, depth, N, T, likelihood, bias and activation drawn."""
    widths = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    likelihood = draw(st.sampled_from(likelihoods))
    net = zoo.mlp(*widths, act=draw(st.sampled_from(activations)), bias=draw(st.booleans()))
    if widths[0] == widths[-1] and draw(st.booleans()):
        net = Residual(net)
    shared = draw(st.lists(st.integers(1, 3), max_size=max_shared))
    shape = (draw(st.integers(1, max_batch)), *shared, widths[0])
    return zoo.from_net(net, shape, likelihood, seed=draw(st.integers(0, 1000)))


def fishers():
    return st.sampled_from(zoo.FISHERS)


@st.composite
def trees(draw, seed=0):
    shapes = draw(st.lists(st.lists(st.integers(1, 3), max_size=3).map(tuple), min_size=1, max_size=4))
    rng = zoo.generator(seed + draw(st.integers(0, 100)))
    return {f"p{i}": torch.randn(shape, generator=rng, dtype=torch.float64) for i, shape in enumerate(shapes)}
