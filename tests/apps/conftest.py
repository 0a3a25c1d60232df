"""One's own data and models, as a user writes them: small enough for whole runs."""

import re
import subprocess
import sys

import pytest
from matplotlib.figure import Figure

from tests.forked import Forked

OWN = """
import torch
from torch import nn
import fisherfn as ff
from common.data import Data, Split

def load(data_path, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(48, 1, 3, 4, generator=generator)
    labels = (x.flatten(1).sum(1) > 6).long()
    return Data("SMALL", Split(x[:32], labels[:32]), Split(x[32:], labels[32:]), "own:build", ff.Bernoulli(),
                ff.Categorical())

def digits(data_path, seed):
    generator = torch.Generator().manual_seed(seed)
    part = [Split(torch.rand(n, 1, 28, 28, generator=generator), torch.arange(n) % 3) for n in (24, 9)]
    return Data("TINY", *part, "AE_MNIST", ff.Bernoulli(), ff.Categorical())

def build(data):
    return nn.Sequential(nn.Linear(12, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))

def relu(data):
    return nn.Sequential(nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2))

def autoencoder(data):
    return nn.Sequential(nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 12))
autoencoder.task = "reconstruct"

def convolutional(data):
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2))

def transposed(data):
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.ConvTranspose2d(3, 1, 2))
transposed.task = "reconstruct"
"""


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    """Have the apps started as copies of this process; those that a job file starts (test_cluster.py) are real."""
    monkeypatch.setattr(subprocess, "Popen", Forked)


@pytest.fixture(autouse=True)
def plain_numbers(monkeypatch):
    """Have every picture that a test draws checked: logarithmic axes say 0.05, not 5 × 10⁻² or 5e-2."""
    save = Figure.savefig

    def checked(figure, *where, **how):
        save(figure, *where, **how)
        for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) if axis.get_scale() == "log"):
            shown = [label.get_text() for label in (*axis.get_ticklabels(), *axis.get_ticklabels(minor=True))]
            low, high = axis.get_view_interval()
            wrong = "times|e" if high <= 10 * low else "times"
            assert not any(re.search(wrong, text) for text in shown if "mathdefault{10" not in text), shown

    monkeypatch.setattr(Figure, "savefig", checked)


@pytest.fixture
def drawn():
    """Have the pictures of runs drawn: for a test of each program."""


@pytest.fixture
def own(request, tmp_path, monkeypatch):
    """A folder with a module of one's own, as the current one. Pictures stay empty: they take most of a small run."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(Figure, "savefig", lambda figure, file, **how: None)
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # before the folders of earlier tests, which have a module of that name, too
    monkeypatch.delitem(sys.modules, "own", raising=False)
    return tmp_path
