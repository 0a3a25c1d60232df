"""Statistics in chunks are those of the whole batch, or a typed error."""

import pytest
import torch
from torch.func import functional_call, grad
from torch.nn import functional as F

import fisherfn as ff
from tests.zoo import as_installed

E = ff.errors
N = 12
encoder = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
PARAMS = {name: p.detach() for name, p in encoder.named_parameters()}


def model(params, x):
    return functional_call(encoder, params, (x,))


def info_nce(f, y):
    return F.cross_entropy(f @ f.T, torch.arange(len(f)), reduction="none")


def centred(f, y):
    return (f - f.mean(0)).square().sum(1)


def averaged(f, y):
    """A mean over the batch inside, given to each example."""
    return (f - y).square().sum(1).mean().expand(len(f))


def squares(f, y):
    return (f - y).square().sum(1)


def signed(f, y):
    """Terms of both signs, whose sum nearly cancels."""
    return (f * y).sum(1)


def problem(likelihood):
    x, y = torch.randn(N, 5).double(), torch.randn(N, 3).double()
    ng = ff.natural_gradient(model, PARAMS, x, likelihood=likelihood, fisher="empirical")
    return ng, (x, y), grad(lambda p: likelihood(model(p, x), y).mean())(PARAMS)


@pytest.mark.parametrize("likelihood", [info_nce, centred, averaged])
def test_a_likelihood_that_couples_examples_is_exact_whole_and_refused_in_chunks(likelihood):
    ng, batch, truth = problem(likelihood)
    found = ng.stats(PARAMS, batch).grads
    for name in truth:
        torch.testing.assert_close(found[name], truth[name], rtol=1e-8, atol=1e-12)
    for size in (1, 5, N - 1):
        with as_installed(), pytest.raises(E.LikelihoodError, match="couples the examples") as caught:
            ng.stats(PARAMS, batch, chunk_size=size)
        assert len(str(caught.value)) < 400
    ng.stats(PARAMS, batch, chunk_size=N)


@pytest.mark.parametrize("likelihood", [squares, signed])
def test_any_other_is_taken_in_chunks_of_any_size(likelihood):
    ng, batch, truth = problem(likelihood)
    for size in (1, 5, N - 1):
        stats = ng.stats(PARAMS, batch, chunk_size=size)
        assert stats.checks["chunks"]
        for name in truth:
            torch.testing.assert_close(stats.grads[name], truth[name], rtol=1e-8, atol=1e-12)


def test_rounding_in_single_precision_is_no_coupling():
    net = torch.nn.Linear(50, 2000)
    ng_model, params, _ = ff.functional(net)
    x, y = 100 * torch.randn(64, 50), torch.randint(2000, (64,))
    ng = ff.natural_gradient(ng_model, params, x, likelihood=ff.Categorical(), fisher="empirical", context={})
    for size in (1, 7, 32):
        assert ng.stats(params, (x, y), context={}, chunk_size=size).checks["chunks"]


def test_an_infinite_loss_is_no_coupling():
    ng, (x, y), _ = problem(squares)
    x[0] = torch.inf
    stats = ng.stats(PARAMS, (x, y), chunk_size=5)
    assert stats.checks["chunks"] and not stats.checks["inputs"]


def test_under_vmap_the_mask_says_so_and_the_state_stays():
    ng, batch, _ = problem(info_nce)
    members = {name: torch.stack([p, 2 * p]) for name, p in PARAMS.items()}
    state = ng.init(PARAMS)

    def member(params):
        return ng.step(params, state, batch, chunk_size=5)

    nat, new, info = torch.vmap(member)(members)
    assert not info.checks["chunks"].any() and not new.count.any()
    with pytest.raises(E.LikelihoodError, match="members 0, 1"):
        ff.check(info)


def test_running_statistics_go_on_from_chunk_to_chunk():
    """They are those of one forward pass per chunk, in order; the given ones stay."""
    net = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3)).double().train()
    plain, params, context = ff.functional(net)
    x, y = torch.randn(N, 5).double(), torch.arange(N) % 3
    ng = ff.natural_gradient(plain, params, x, likelihood=ff.Categorical(), fisher="empirical", context=context)
    found = ng.stats(params, (x, y), context=context, chunk_size=5).context
    expected = context
    for part in x.split(5):
        _, expected = plain(params, part, expected)
    assert found.keys() == context.keys() and context["1.num_batches_tracked"] == 0
    for name in context:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("examples", [1, 2, 3, N])
def test_outputs_that_compare_the_examples_say_what_they_are(examples):
    x = torch.randn(examples, 5).double()
    with as_installed(), pytest.raises(E.ShapeError, match="similarity matrix") as caught:
        ff.natural_gradient(
            lambda p, x: model(p, x) @ model(p, x).T, PARAMS, x, likelihood=info_nce, fisher="empirical"
        )
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("sizes", [(5, 5, 2), (2, 5, 5), (1, 11), (3, 9)])
def test_parts_with_and_without_chunks_join_to_the_whole_batch(sizes):
    """The last batch of a data set may be no longer than one chunk."""
    ng, (x, y), expected = problem(squares)
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    chunked = [ng.stats(PARAMS, batch, chunk_size=3) for batch in batches]
    mixed = [ng.stats(PARAMS, batch, chunk_size=2 if n % 2 else None) for n, batch in enumerate(batches)]
    for parts in (chunked, mixed):
        joined = ff.join(parts)
        assert all(bool(mask) for mask in joined.checks.values())
        torch.testing.assert_close(joined.grads, expected)


def test_a_false_mask_of_any_part_is_that_of_the_joined_statistics():
    ng, (x, y), _ = problem(squares)
    parts = [ng.stats(PARAMS, (x[:8], y[:8]), chunk_size=4), ng.stats(PARAMS, (x[8:], y[8:]))]
    parts[0].checks["chunks"] = torch.tensor(False)
    for given in (parts, parts[::-1]):
        assert not ff.join(given).checks["chunks"] and ff.join(given).checks["inputs"]
