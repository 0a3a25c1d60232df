"""Evidence and predictive covariances of `ff.laplace` equal those of laplace-torch's "kron", in float64."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import fisherfn as ff
from tests.optional.installed import need

laplace = need("laplace", how="pip install --no-deps -r requirements-peers.txt")
pytestmark = pytest.mark.filterwarnings("ignore")

PRIOR, SIGMA = 2.0, 0.3


def mlp(bias):
    return nn.Sequential(nn.Linear(5, 8, bias=bias), nn.Tanh(), nn.Linear(8, 3, bias=bias))


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3, bias=False)
    )  # fmt: skip


def apart(params, x):
    """An MLP whose biases are added to the outputs: they are blocks of their own, as in laplace-torch."""
    h = torch.tanh(nn.functional.linear(x, params["0.weight"]) + params["0.bias"])
    return nn.functional.linear(h, params["2.weight"]) + params["2.bias"]


CASES = {
    "classifier": (lambda: mlp(False), (40, 5), "classification", None),
    "regression": (lambda: mlp(False), (40, 5), "regression", None),
    "biases": (lambda: mlp(True), (40, 5), "classification", apart),
    "convolution": (cnn, (30, 2, 6, 6), "classification", None),
}


@pytest.mark.parametrize("name", CASES)
def test_evidence_and_variances_are_those_of_laplace_torch(name):
    torch.manual_seed(0)
    make, shape, kind, model = CASES[name]
    net, x = make().double(), torch.randn(shape).double()
    y = torch.arange(len(x)) % 3 if kind == "classification" else torch.randn(len(x), 3).double()
    theirs = laplace.Laplace(
        copy.deepcopy(net), kind, subset_of_weights="all", hessian_structure="kron",
        prior_precision=torch.tensor(PRIOR).double(), **({} if kind == "classification" else {"sigma_noise": SIGMA}),
    )  # fmt: skip
    theirs.fit(DataLoader(TensorDataset(x, y), batch_size=len(x)))
    evidence = theirs.log_marginal_likelihood()
    variances = theirs.functional_variance(theirs.backend.jacobians(x[:4])[0])

    params = {key: p.detach().clone() for key, p in net.named_parameters()}
    likelihood = ff.Categorical() if kind == "classification" else ff.Gaussian(SIGMA**2)
    model = model or (lambda params, x: functional_call(net, params, (x,)))
    ng = ff.natural_gradient(model, params, x, likelihood=likelihood, method=ff.kfac("eigen"), fisher="type2")
    posterior = ff.laplace(ng)
    state, info = posterior.fit(params, list(zip(x.split(13), y.split(13), strict=True)), prior=PRIOR)
    ff.check(info)
    mine = posterior.log_marginal_likelihood(state)
    if kind == "regression":  # the constant that the likelihood leaves out
        mine = mine - y.numel() * math.log(SIGMA * math.sqrt(2 * math.pi))
    assert abs(mine - evidence) < 1e-6 * abs(evidence)
    covariances = posterior.predict(state, x[:4])[1]
    assert (covariances - variances).norm() < 1e-6 * variances.norm()
    other = posterior.log_marginal_likelihood(state, 1.1 * PRIOR)
    assert abs(other - mine) > 1e-5 * abs(evidence), "the comparison sees another prior"
