"""Rows chosen by values belong to examples that vary: the fallback covers their layers; all other rows stay layers."""

import pytest
import torch
from torch import nn

import fisherfn as ff
from tests.drawn import N, labelled
from tests.layers.checks import kinds, normal


class Masked(nn.Module):
    """A net that applies a layer to the true tokens alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x, mask):
        h = self.a(x).tanh()
        z = torch.zeros_like(h)
        z[mask] = self.b(h[mask])
        return self.out(z.sum(1))


def masks(*counts):
    return torch.arange(5) < torch.tensor(counts)[:, None]


def test_rows_that_a_mask_selects_belong_to_their_examples():
    """Three tokens in every example look like three rows per example; the next batch has four, two, …"""
    torch.manual_seed(0)
    model, params, context = ff.functional(Masked().double())
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 5, 4, generator=g).double(), torch.randint(0, 3, (6,), generator=g)
    ng = ff.natural_gradient(
        model, params, (x, masks(*[3] * 6)), likelihood=ff.Categorical(), method=ff.exact(), fisher="type2",
        context=context,
    )  # fmt: skip
    assert "rows are chosen by values" in str(ng.layout)
    batch = (x, masks(4, 2, 3, 3, 1, 5)), y
    found = ng.fisher(ng.stats(params, batch, context=context)).dense()

    def logits(p, x, m):
        h = nn.functional.linear(x, p["a.weight"], p["a.bias"]).tanh()
        z = nn.functional.linear(h, p["b.weight"], p["b.bias"]) * m.unsqueeze(-1)
        return nn.functional.linear(z.sum(0), p["out.weight"], p["out.bias"])

    expected = 0
    for n in range(6):
        J = torch.func.jacrev(logits)(params, x[n], batch[0][1][n])
        J = torch.cat([J[name].reshape(3, -1) for name in params], 1)
        p = logits(params, x[n], batch[0][1][n]).softmax(-1)
        expected = expected + J.mT @ (torch.diag(p) - torch.outer(p, p)) @ J / 6
    torch.testing.assert_close(found, expected)


class Experts(nn.Module):
    """A mixture of experts, each on the rows that chose it."""

    def __init__(self):
        super().__init__()
        self.gate, self.out = nn.Linear(4, 3), nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        total = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            rows = (chosen == k).nonzero().squeeze(-1)
            total = total.index_add(0, rows, expert(x[rows]) * weight[rows, None])
        return self.out(total)


@pytest.mark.parametrize("seed", range(3))
def test_experts_on_the_rows_that_chose_them_train_on_any_batch(seed):
    """An expert may have no row among the examples of the build, or all of them."""
    torch.manual_seed(seed)
    opt = ff.optim.NaturalGradient(Experts(), likelihood=ff.Categorical())
    for k in range(3):
        x, y = labelled(seed=10 * seed + k)
        assert torch.isfinite(opt.step((x, y)))
    assert str(opt.layout).count("chosen by values") == 6


class Chosen(nn.Module):
    """A layer on rows that are chosen in one of many ways."""

    def __init__(self, kind):
        super().__init__()
        self.b, self.out, self.kind = nn.Linear(4, 4), nn.Linear(4, 3), kind
        self.register_buffer("keep", torch.tensor([True, False, True, True]))
        self.table = nn.Parameter(torch.randn(4, 4))

    def forward(self, x, mask):
        flat, rows, z = x.flatten(0, 1), mask.flatten(), torch.zeros_like(x).flatten(0, 1)
        if self.kind == "where":
            (index,) = torch.where(rows)
            z = z.index_add(0, index, self.b(flat[None, index].reshape(-1, 4)))
        elif self.kind == "tuple":
            z = z.index_put((rows,), self.b(flat[(rows,)]))
        elif self.kind == "repeats":
            counts = mask.sum(1)
            owner = torch.arange(len(x)).repeat_interleave(counts)
            z = torch.zeros_like(x[:, 0]).index_add(0, owner, self.b(x[:, 0].repeat_interleave(counts, 0)))
            return self.out(z)
        elif self.kind == "written back":
            z = z.index_put((rows,), flat[rows])
            z = self.b(z)
        elif self.kind == "inverse":
            kinds, inverse = torch.where(mask, 1, 0).flatten().unique(return_inverse=True)
            z = self.b(flat) * (1 + kinds[inverse]).unsqueeze(-1)
        elif self.kind == "buffer":
            z = self.b(flat) + self.b(self.table[self.keep]).sum(0)
        return self.out(z.reshape(x.shape).sum(1))


@pytest.mark.parametrize(
    ("kind", "selected"),
    [
        ("where", True),
        ("tuple", True),
        ("repeats", True),
        ("written back", False),
        ("inverse", False),
        ("buffer", False),
    ],
)
@pytest.mark.parametrize("count", [3, 5])
def test_only_rows_whose_choice_depends_on_the_inputs_are_selected(kind, selected, count):
    model, params, context = ff.functional(Chosen(kind))
    x = labelled(length=5)[0]
    ng = ff.natural_gradient(
        model, params, (x, masks(*[count] * N)), likelihood=ff.Categorical(), context=context, unused="ignore"
    )
    assert ("chosen by values" in str(ng.layout)) is selected
    assert "out" in [block.key for block in ng.layout.blocks if block.kind == "linear"]


class Ragged(nn.Module):
    """A layer on the rows that a mask chooses, by several calls."""

    def __init__(self, how):
        super().__init__()
        self.how, self.a, self.b, self.out = how, nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.head = nn.Linear(2, 2)

    def forward(self, x, mask):
        h = self.a(x).tanh()
        z = torch.zeros_like(h)
        if self.how == "masked_select":
            rows = self.b(h.masked_select(mask.unsqueeze(-1)).view(-1, 4))
        elif self.how == "lengths":
            rows = self.b(torch.cat([h[i, :n] for i, n in enumerate(mask.sum(1).tolist())]))
        elif self.how == "heads":
            rows = self.head(h[mask].view(-1, 2, 2).flatten(0, 1)).view(-1, 4)
        else:
            rows = self.b(torch.cat([h[mask], x[mask]])).unflatten(0, (2, -1)).sum(0)
        z[mask] = rows
        return self.out(z.sum(1))


@pytest.mark.parametrize("how", ["masked_select", "lengths", "heads", "two selections"])
def test_chosen_rows_stay_chosen_through_other_calls(how):
    torch.manual_seed(0)
    net = Ragged(how).double()
    unused = (net.b if how == "heads" else net.head).requires_grad_(False)
    model, params, context = ff.functional(net)
    mask = torch.arange(5) < torch.full((6, 1), 3)
    x = normal(6, 5, 4)
    ng = ff.natural_gradient(model, params, (x, mask), likelihood=ff.Gaussian(), context=context)
    assert "rows are chosen by values" in str(ng.layout) and not unused.weight.requires_grad


class Visible(nn.Module):
    """A masked autoencoder: the same number of patches of each example."""

    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x, mask):
        rows = x[mask].reshape(len(x), -1, 4)
        return self.out(self.a(rows).tanh().sum(1))


def test_as_many_rows_of_each_example_are_a_layer():
    model, params, context = ff.functional(Visible().double())
    mask = torch.arange(5) < torch.full((6, 1), 3)
    ng = ff.natural_gradient(model, params, (normal(6, 5, 4), mask), likelihood=ff.Gaussian(), context=context)
    assert set(kinds(ng).values()) == {"linear"}


class Looped(nn.Module):
    """Nets that read a length from their inputs, and join tensors of all examples."""

    def __init__(self, how):
        super().__init__()
        self.how, self.a, self.l, self.out = how, nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x, n):
        steps, h = int(n.max()), self.a(x).tanh()
        if self.how == "recurrence":
            h = torch.stack([h[:, t] for t in range(steps)]).transpose(0, 1)
        elif self.how == "mean of two":
            h = torch.stack([h[:, :steps], 2 * h[:, :steps]]).mean(0)
        else:
            h = torch.cat([h[:, :1].transpose(0, 1), h[:, :steps].transpose(0, 1)]).transpose(0, 1)
        return self.out(self.l(h).sum(1))


@pytest.mark.parametrize("how", ["recurrence", "mean of two", "time first"])
def test_joins_along_other_axes_choose_no_rows(how):
    model, params, context = ff.functional(Looped(how).double())
    x = normal(6, 5, 4), torch.full((6,), 5)
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Gaussian(), context=context)
    assert set(kinds(ng).values()) == {"linear"}
