"""Embeddings: linear layers of one-hot inputs, whose input factor is a diagonal."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import nn

import fisherfn as ff
from tests import oracles, strategies, zoo
from tests.layers import unit_weights
from tests.layers.checks import check, dense, exact_blocks, kfac_matrix, kinds, normal, stepped
from tests.nets import Readout
from tests.oracles import close
from tests.zoo import from_net, sampled


@given(strategies.embeddings(), strategies.fishers(), strategies.kfac_options())
def test_drawn_embeddings_are_exact(problem, fisher, options):
    run = check(problem, {"0": "embedding"}, fisher, **options)
    vocabulary, width = problem.params["0.weight"].shape
    assert run.ng.layout.block("0").shape == (1, width, vocabulary)


@pytest.mark.parametrize("padding", [None, 2])
def test_rows_are_one_hot(padding):
    net = nn.Sequential(nn.Embedding(5, 2, padding_idx=padding), Readout(2))
    problem = from_net(net, (3, 4), "categorical", vocabulary=5)
    a = sampled(problem).stats.tap("0").a
    rows = F.one_hot(problem.x, 5).double()
    if padding is not None:
        assert (problem.x == padding).any()
        rows[problem.x == padding] = 0.0
    close(dense(a).double(), rows[None])
    assert not isinstance(a, torch.Tensor), "a dense one-hot row is as wide as the vocabulary"


@pytest.mark.parametrize("form", ["factored", "eigen"])
@pytest.mark.parametrize(("shape", "sharing"), [((6,), "expand"), ((6,), "reduce"), ((4, 3), "expand")], ids=str)
def test_an_embedding_is_a_linear_layer_of_one_hot_inputs(form, shape, sharing):
    """The second moment of one-hot rows is a diagonal: nothing is left out."""
    problem = from_net(nn.Sequential(nn.Embedding(5, 3), Readout(2)), shape, "categorical", vocabulary=5)
    linear = from_net(nn.Sequential(nn.Linear(5, 3, bias=False), Readout(2)), (*shape, 5), "categorical")
    hot = F.one_hot(problem.x, 5).double()
    linear = zoo.replace(linear, params={"0.weight": problem.params["0.weight"].T}, x=hot, y=problem.y)
    steps = [stepped(p, ff.kfac(damping_form=form, sharing=sharing)) for p in (problem, linear)]
    close(steps[0]["0.weight"].T, steps[1]["0.weight"], tol=1e-9)


def test_reduce_keeps_the_diagonal_of_the_averaged_rows():
    """A mean of one-hot rows is not one-hot; the factor stays as long as the vocabulary all the same."""
    problem = from_net(nn.Sequential(nn.Embedding(5, 3), Readout(2)), (4, 3), "categorical", vocabulary=5)
    matrix, run = kfac_matrix(problem, ff.kfac(sharing="reduce"))
    a, g = unit_weights.taps(problem, "type2")["0"]
    A, G = unit_weights.factors(a[0], g[0], "reduce")
    assert oracles.differs(A, A.diagonal().diag(), 1e-3), "the rows are averages of one token"
    close(matrix, unit_weights.kfac_dense(problem, {"0": [(A.diagonal().diag(), G)]}, oracles.kfac_block))


def test_sparse_gradients_make_no_difference():
    """No gradient of the weight is taken: it is made from indices and output-gradients."""
    ids, rng = torch.tensor([[0, 1], [4, 1], [2, 2]]), zoo.generator(0)
    params = {"w": torch.randn(5, 3, generator=rng, dtype=torch.float64)}
    found = []
    for sparse in (False, True):
        ng = ff.natural_gradient(
            lambda p, x, sparse=sparse: torch.tanh(F.embedding(x, p["w"], sparse=sparse)),
            params, ids, likelihood=ff.Gaussian(), fisher="type2",
        )  # fmt: skip
        assert kinds(ng) == {"w": "embedding"}
        nat, _, info = ng.step(params, ng.init(params), (ids, torch.ones(3, 2, 3, dtype=torch.float64)))
        ff.check(info)
        found.append((nat["w"], (ng.implicit_fisher(params, ids) @ params)["w"]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "model",
    [
        lambda p, x: F.embedding(x, 2 * p["w"], sparse=True),
        lambda p, x: p["w"].sum(0) * F.embedding(x, p["w"], sparse=True).mean(1),
    ],
)
def test_sparse_gradients_outside_a_layer_are_refused(model):
    ids, params = torch.tensor([[0, 1], [4, 1], [2, 2]]), {"w": torch.ones(5, 3, dtype=torch.float64)}
    with pytest.raises(ff.errors.ModelError, match="Pass sparse=False"):
        ff.natural_gradient(model, params, ids, likelihood=ff.Gaussian())


def test_a_token_that_never_came_has_no_gradient_and_a_finite_step():
    problem = from_net(nn.Sequential(nn.Embedding(6, 2), Readout(2)), (3,), "categorical", vocabulary=6)
    absent = [v for v in range(6) if v not in problem.x.tolist()]
    assert absent
    nat = stepped(problem)["0.weight"]
    assert torch.isfinite(nat).all() and not nat[absent].any() and nat.any()


def test_one_datum_at_one_position_is_exact():
    problem = from_net(nn.Sequential(nn.Embedding(4, 2), Readout(2)), (1,), "categorical", vocabulary=4)
    matrix, run = kfac_matrix(problem)
    close(matrix, exact_blocks(problem, run))


def test_an_embedding_used_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(5, 2)

        def forward(self, x):
            return Readout(2)(self.words(x) * self.words(x.flip(1)[:, :2]).sum(1, keepdim=True))

    run = check(from_net(Twice(), (4, 3), "categorical", vocabulary=5), {"words": "embedding"})
    assert dense(run.stats.tap("words").a).shape == (1, 4, 3 + 2, 5)


def test_an_embedding_tied_to_the_head_is_exact():
    """One parameter, two kinds of use."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(4, 3)

        def forward(self, x):
            return F.linear(torch.tanh(self.words(x)).mean(1), self.words.weight)

    problem = from_net(Tied(), (3, 2), "categorical", vocabulary=4)
    run = sampled(problem, "type2")
    close(run.ng.fisher(run.stats).dense(), oracles.fisher_matrix(problem, "type2"))
    close(dict(run.stats.grads), oracles.mean_gradient(problem))


@pytest.mark.parametrize("option", ["max_norm", "scale_grad_by_freq"])
def test_special_embeddings_use_the_fallback_or_raise(option):
    """max_norm renormalises the table in place; scale_grad_by_freq has gradients that no loss has."""
    calls = {"max_norm": {"max_norm": 0.5}, "scale_grad_by_freq": {"scale_grad_by_freq": True}}

    def model(p, x):
        return Readout(2)(F.embedding(x, p["w"].clone(), **calls[option]))

    def direct(p, x):
        return Readout(2)(F.embedding(x, p["w"], **calls[option]))

    x = torch.tensor([[0, 1], [2, 1], [3, 3]])
    for call in (model, direct):
        try:
            ng = ff.natural_gradient(call, {"w": normal(4, 2)}, x, likelihood=ff.Categorical())
        except (ff.errors.CoverageError, RuntimeError):
            continue
        assert kinds(ng) == {"w": "fallback"}


def test_a_large_vocabulary_is_never_made_dense():
    """100 000 tokens: a dense factor would be 80 GB."""
    net = nn.Sequential(nn.Embedding(100_000, 2), Readout(2))
    problem = from_net(net, (3, 2), "categorical", vocabulary=100_000)
    nat = stepped(problem)["0.weight"]
    seen = nat.any(dim=1).nonzero().flatten().tolist()
    assert seen == sorted(set(problem.x.flatten().tolist()))
