"""E-KFAC influence scores of `ng.fit` equal those of kronfluence at the same damping, in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.data import TensorDataset

import fisherfn as ff
from tests.optional.installed import need

need("kronfluence", how="pip install --no-deps -r requirements-peers.txt")
from kronfluence.analyzer import Analyzer, prepare_model  # noqa: E402
from kronfluence.arguments import FactorArguments, ScoreArguments  # noqa: E402
from kronfluence.task import Task  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

DAMPING = 0.01


class Regression(Task):
    def compute_train_loss(self, batch, model, sample=False):
        x, y = batch
        return 0.5 * ((model(x) - y) ** 2).sum()

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)


class Classification(Regression):
    def compute_train_loss(self, batch, model, sample=False):
        x, y = batch
        return nn.functional.cross_entropy(model(x), y, reduction="sum")


def problem(task):
    """A net, 60 training examples and 7 queries."""
    torch.manual_seed(0)
    x, queries = torch.randn(60, 5).double(), torch.randn(7, 5).double()
    if task is Classification:
        net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4)).double()
        return net, (x, torch.arange(60) % 4), (queries, torch.arange(7) % 4), ff.Categorical()
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    return net, (x, torch.randn(60, 2).double()), (queries, torch.randn(7, 2).double()), ff.Gaussian()


def theirs(net, task, train, queries, strategy, folder):
    exact = torch.float64
    factors = FactorArguments(
        strategy=strategy, use_empirical_fisher=True, amp_dtype=None, activation_covariance_dtype=exact,
        gradient_covariance_dtype=exact, per_sample_gradient_dtype=exact, lambda_dtype=exact,
        eigendecomposition_dtype=exact,
    )  # fmt: skip
    scores = ScoreArguments(
        damping_factor=DAMPING, per_sample_gradient_dtype=exact, precondition_dtype=exact, score_dtype=exact
    )
    analyzer = Analyzer(
        "test", prepare_model(copy.deepcopy(net), task()), task(), cpu=True, output_dir=str(folder), disable_tqdm=True,
        disable_model_save=True,
    )  # fmt: skip
    train, queries = TensorDataset(*train), TensorDataset(*queries)
    analyzer.fit_all_factors("factors", train, per_device_batch_size=20, factor_args=factors)
    analyzer.compute_pairwise_scores(
        "scores", "factors", queries, train, per_device_query_batch_size=7, per_device_train_batch_size=20,
        score_args=scores,
    )  # fmt: skip
    return analyzer.load_pairwise_scores("scores")["all_modules"]


def ours(net, train, queries, likelihood, method):
    params = {name: p.detach().clone() for name, p in net.named_parameters()}

    def model(params, x):
        return functional_call(net, params, (x,))

    ng = ff.natural_gradient(model, params, train[0], likelihood=likelihood, method=method, fisher="empirical")
    loader = list(zip(*(leaf.split(25) for leaf in train), strict=True))  # other batches: the factors are the same
    state, info = ng.fit(params, loader, damping=DAMPING)
    ff.check(info)
    gradients = ff.example_gradients(ng.stats(params, queries, curvature=False))
    directions = torch.vmap(lambda v: ng.precondition(state, v))(gradients)
    scores = [ff.influence_scores(ng.stats(params, batch, curvature=False), directions) for batch in loader]
    return torch.cat(scores, 1)


@pytest.mark.parametrize("task", [Regression, Classification])
@pytest.mark.parametrize(("strategy", "method"), [("ekfac", ff.ekfac("eigen")), ("kfac", ff.kfac("eigen"))])
def test_scores_are_those_of_kronfluence(task, strategy, method, tmp_path):
    net, train, queries, likelihood = problem(task)
    mine = ours(net, train, queries, likelihood, method)
    reference = theirs(net, task, train, queries, strategy, tmp_path)
    assert (mine - reference).norm() < 1e-5 * reference.norm()
    other = ours(net, train, queries, likelihood, ff.kpsvd("eigen"))
    assert (other - reference).norm() > 1e-3 * reference.norm(), "the comparison sees another approximation"
