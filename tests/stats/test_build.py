"""A build is made with a few examples where they are enough, with all of them where they are not."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

import fisherfn as ff
from tests.zoo import as_installed

E = ff.errors
N, CLASSES = 32, 3


class Seen(nn.Module):
    """Notes how many examples every run has."""

    def __init__(self, *, unused=False):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES)
        self.other = nn.Linear(2, 2) if unused else None
        self.sizes = []

    def forward(self, x):
        self.sizes.append(len(x))
        return self.last(torch.tanh(self.norm(self.first(x))))


def build(net, x, **more):
    model, params, context = ff.functional(net)
    return ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), context=context, **more)


def test_the_runs_of_a_build_do_not_grow_with_the_batch():
    net, x = Seen(), torch.randn(N, 4)
    layout = build(net, x).layout
    assert net.sizes and max(net.sizes) <= 5
    assert layout == build(Seen(), x[:4]).layout


def test_only_seemingly_unused_parameters_are_checked_on_all_examples():
    net, x = Seen(unused=True), torch.randn(N, 4)
    layout = build(net, x, unused="ignore").layout
    assert sorted(net.sizes)[-2:] == [5, N] and layout.unused == ("other.weight", "other.bias")


class Routed(nn.Module):
    """Positive inputs go through one more layer; the first examples have none."""

    def __init__(self, by_values):
        super().__init__()
        self.by_values = by_values
        self.first, self.expert, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def looks(self, x):
        return (x[:, 0] > 0).any() if self.by_values else len(x) > 6

    def forward(self, x):
        h = torch.tanh(self.first(x))
        if self.looks(x):
            h = h + self.expert(h) * (x[:, :1] > 0)
        return self.last(h)


@pytest.mark.parametrize("by_values", [True, False])
def test_a_layer_that_the_first_examples_do_not_use_is_found_with_all(by_values):
    x = torch.randn(N, 4)
    x[:8, 0] = -1
    layout = build(Routed(by_values), x).layout
    assert {block.key for block in layout.layers} == {"first", "expert", "last"}


@pytest.mark.parametrize("where", ["dropout", "own"])
def test_per_example_entries_of_the_context_follow_the_examples(where):
    x = torch.randn(N, 4)
    if where == "dropout":
        net = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, CLASSES))
        model, params, context = ff.functional(net)
        context = context | {"dropout": torch.arange(N)}
    else:
        net = nn.Linear(4, CLASSES)
        params, context = dict(net.named_parameters()), {"noise": torch.randn(N, 4), "scale": torch.ones(())}

        def model(p, x, context):
            return functional_call(net, p, (x + context["noise"],)) * context["scale"], context

    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), context=context, fisher="type2")
    assert dict(ng.layout.context_by_example)["dropout" if where == "dropout" else "noise"]
    stats = ng.stats(params, (x, torch.zeros(N).long()), context=context, chunk_size=10)
    assert torch.isfinite(stats.loss)


class Reshapes(nn.Module):
    """A batch size written into a reshape."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.last(x.reshape(N, 2, 2).flatten(1))


def test_an_error_is_that_of_all_examples():
    with as_installed(), pytest.raises(E.ShapeError, match=f"runs on {N} examples and not on {N + 1}"):
        build(Reshapes(), torch.randn(N, 4))


class Padded(nn.Module):
    """A table that is added where nothing is padded, and chosen by the mask where something is."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, CLASSES)
        self.table = nn.Parameter(torch.randn(1, 5))

    def forward(self, inputs):
        x, mask = inputs["x"], inputs["mask"]
        table = self.table.expand(len(x), -1)
        if not mask.all():
            table = torch.where(mask[:, None], self.table, -1.0)
        return self.last(torch.tanh(self.first(x)) + table)


def test_the_few_examples_are_from_everywhere():
    mask = torch.arange(N) < N // 2
    batch = {"x": torch.randn(N, 4), "mask": mask}, torch.randint(CLASSES, (N,))
    net = Padded()
    model, params, context = ff.functional(net)
    ng = ff.natural_gradient(model, params, batch[0], likelihood=ff.Categorical(), context=context, fisher="empirical")
    assert not ng.layout.fallbacks
    found = ng.stats(params, batch, context=context).grads
    nn.functional.cross_entropy(net(batch[0]), batch[1]).backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6)


def masked(p, x, context):
    return nn.functional.linear(x * context["mask"], p["w"]) + context["table"], context


def test_one_example_does_not_show_which_entries_of_the_context_are_its_own():
    """A leaf `[1, …]` may be a mask per example, or a table that all examples share."""
    params, y = {"w": torch.randn(CLASSES, 4)}, torch.zeros(N, CLASSES)
    x, mask, table = torch.randn(N, 4), torch.rand(N, 4), torch.randn(1, CLASSES)
    first = {"mask": mask[:1], "table": table}
    ng = ff.natural_gradient(masked, params, x[:1], likelihood=ff.Gaussian(), context=first, fisher="type2")
    of_one = ng.stats(params, (x[:1], y[:1]), context=first).loss
    torch.testing.assert_close(of_one, masked(params, x[:1], first)[0].square().sum() / 2)
    same = ng.stats(params, (x, y), context=first, chunk_size=5).loss
    torch.testing.assert_close(same, masked(params, x, first)[0].square().sum() / (2 * N))
    for chunk_size in (None, 2):
        with as_installed(), pytest.raises(E.ShapeError, match=r"context\['mask'\].*two or more examples"):
            ng.stats(params, (x, y), context={"mask": mask, "table": table}, chunk_size=chunk_size)


@pytest.mark.parametrize("where", ["parameters", "inputs"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_not_taken_for_coupled_examples(where, number):
    net, x = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(6, 5)
    with torch.no_grad():
        (net[0].weight if where == "parameters" else x)[0, 0] = number
        net[0].weight[1] = torch.nan if where == "parameters" else 0.1
    model, params, context = ff.functional(net)
    what = r"params\['0.weight'\]" if where == "parameters" else "the example inputs"
    with pytest.raises(ff.errors.NonFiniteError, match=f"there is NaN or infinity in {what}: build with finite"):
        ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), context=context)
