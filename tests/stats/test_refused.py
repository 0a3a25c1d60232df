"""A refused net gets a short message with the model's line, and what the message advises was tried here."""

import inspect
import re

import pytest
import torch
from torch import nn

import fisherfn as ff
from fisherfn.stats.border import LONGEST, brief, listed, with_line
from tests.nets import OldSquare, outside
from tests.zoo import as_installed

E = ff.errors
N, CLASSES = 8, 3


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, CLASSES)
        self.scale = nn.Parameter(torch.randn(6))

    def hidden(self, x):
        return torch.tanh(self.first(x))

    def forward(self, x):
        return self.last(self.hidden(x) * self.scale)


class Noisy(Base):
    def hidden(self, x):
        return self.first(x) + torch.randn(6)  # here


class NoisyByInput(Base):
    def forward(self, x, noise):
        return self.last((self.first(x) + noise) * self.scale)


class Shaped(Base):
    def hidden(self, x):
        return self.first(x.reshape(N, 4))  # here


class ShapedFreely(Base):
    def hidden(self, x):
        return self.first(x.reshape(-1, 4))


class Renormalising(Base):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 6, max_norm=1.0)

    def hidden(self, x):
        return self.embedding(x.argmax(1)) + self.first(x)  # here


class RenormalisingBetween(Renormalising):
    def __init__(self):
        super().__init__()
        self.embedding.max_norm = None


class Normed(Base):
    """Per-example gradients of the scale would need batch norm of one example."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        h = self.first(x)
        h = self.norm(h) * outside(self.scale)  # here
        return self.last(h)


class NormedFrozen(Normed):
    def __init__(self):
        super().__init__()
        self.scale.requires_grad_(False)


class OldFunction(Base):
    def hidden(self, x):
        return OldSquare.apply(self.first(x))  # here


class Infers(Base):
    def hidden(self, x):
        with torch.inference_mode():
            shift = x.sum(1, keepdim=True)
        return self.first(x) * shift  # here


class InfersNot(Base):
    def hidden(self, x):
        with torch.no_grad():
            shift = x.sum(1, keepdim=True)
        return self.first(x) * shift


class Unused(Base):
    def __init__(self):
        super().__init__()
        self.poolers = nn.ModuleList(nn.Linear(6, 6) for _ in range(20))


class Similar(Base):
    def forward(self, x):
        h = self.hidden(x) * self.scale
        return h @ h.T


def noise(x):
    return x, torch.randn(N, 6)


def plain(x):
    return x


# by name: the net, the error, whether a line is to be named, the net with the remedy, its inputs, more for the build
REFUSED = {
    "random": (Noisy, E.NoiseError, True, NoisyByInput, noise, {}),
    "batch size": (Shaped, E.ShapeError, True, ShapedFreely, plain, {}),
    "max_norm": (Renormalising, E.CoverageError, True, RenormalisingBetween, plain, {}),
    "batch norm": (Normed, E.FisherfnError, False, NormedFrozen, plain, {}),
    "old function": (OldFunction, E.ModelError, True, Base, plain, {}),
    "inference mode": (Infers, E.ModelError, True, InfersNot, plain, {}),
    "unused": (Unused, E.UnusedParameterError, False, Unused, plain, {"unused": "ignore"}),
    "coupled": (Similar, E.ShapeError, False, Base, plain, {}),
}


def build(net, x, **more):
    model, params, context = ff.functional(net)
    with as_installed():
        return ff.natural_gradient(model, params, x, likelihood=ff.Gaussian(), context=context, **more)


@pytest.mark.parametrize("name", REFUSED)
def test_the_message_is_short_and_names_the_line(name):
    net, error, named, *_ = REFUSED[name]
    with pytest.raises(error) as caught:
        build(net(), torch.randn(N, 4))
    text = str(caught.value)
    assert len(text) < 400, (len(text), text)
    if named:
        lines, start = inspect.getsourcelines(net)
        (here,) = [start + at for at, line in enumerate(lines) if "# here" in line]
        assert f"test_refused.py, line {here}" in text


@pytest.mark.parametrize("name", REFUSED)
def test_the_remedy_was_tried(name):
    _, _, _, net, inputs, more = REFUSED[name]
    torch.manual_seed(0)
    assert build(net(), inputs(torch.randn(N, 4)), **more).layout.layers


def test_the_line_is_the_models_own_where_a_library_raises_below_it():
    class Deep(nn.Sequential):
        def forward(self, x):
            return super().forward(x)

    with pytest.raises(E.NoiseError) as caught:
        build(Deep(Noisy()), torch.randn(N, 4))
    assert "self.first(x) + torch.randn(6)" in str(caught.value)


def test_no_line_is_named_for_what_the_caller_did():
    with pytest.raises(E.ShapeError) as caught:
        build(Base(), torch.tensor(1.0))
    assert "line" not in str(caught.value)


def test_a_long_message_stays_without_the_line():
    with pytest.raises(E.NoiseError) as caught:
        build(Noisy(), torch.randn(N, 4))
    assert with_line("x" * LONGEST, caught.value) == "x" * LONGEST
    assert re.fullmatch(r"x+ It is test_refused.py, line \d+\.", with_line("x" * (LONGEST - 40), caught.value))


def test_a_name_is_said_once():
    with pytest.raises(E.NoiseError) as caught:
        build(Noisy(), torch.randn(N, 4))
    assert str(caught.value).count("test_refused.py") == 1


def test_lists_and_errors_are_cut():
    assert listed(["a"]) == "'a'" and listed(["a", "b"]) == "'a', 'b'"
    assert listed([f"encoder.layers.{n}.attention.weight" for n in range(9)]).endswith(" and 7 more")
    assert brief(ValueError("a\nb")) == "a" and len(brief(ValueError("word " * 99))) <= 100
    assert brief(ValueError()) == "ValueError"
