"""Parameters that the outputs do not depend on: an error of the functional build, or left as they are."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fisherfn as ff
from tests.optim.problems import Loop
from tests.zoo import as_installed

E = ff.errors
CLASSES = 3
ALL = list(ff.METHODS)


class Pooled(nn.Module):
    """A layer that is run and not used, as BERT's pooler, and a parameter that is not read at all."""

    def __init__(self):
        super().__init__()
        self.mask = nn.Parameter(torch.randn(5))
        self.first, self.pooler, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        self.pooler(h)
        return self.last(h)


UNUSED = ("mask", "pooler.weight", "pooler.bias")


def batches(steps=4):
    rng = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, 4, generator=rng).double(), torch.randint(CLASSES, (8,), generator=rng)) for _ in range(steps)
    ]


def build(net, x, **more):
    model, params, context = ff.functional(net)
    return ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), context=context, **more), params, context


def test_the_functional_build_refuses_and_names_them():
    with (
        as_installed(),
        pytest.raises(E.UnusedParameterError, match="'mask', 'pooler.weight', 'pooler.bias'") as caught,
    ):
        build(Pooled(), torch.randn(8, 4))
    assert len(str(caught.value)) < 400 and 'unused="ignore"' in str(caught.value)


def test_the_report_leaves_them_out_of_its_shares():
    """Shares are of the covered entries alone: 30 and 21 of 51."""
    ng, _, _ = build(Pooled(), torch.randn(8, 4), unused="ignore")
    lines = {line.split()[0]: line for line in str(ng.layout).splitlines() if line}
    assert " 58.8 " in lines["first"] and " 41.2 " in lines["last"]
    assert all(" unused " in lines[name] for name in UNUSED)
    assert lines["all"].endswith("51 entries covered: 51 by 2 layers; 47 unused")


@pytest.mark.parametrize("method", ALL)
def test_ignored_they_have_zero_steps_and_the_others_those_without_them(method):
    net = Pooled().double()
    (x, y), *_ = batches()
    nats = []
    for ignored in (True, False):
        net.requires_grad_(True)
        if not ignored:
            net.pooler.requires_grad_(False), net.mask.requires_grad_(False)
        ng, params, context = build(net, x, method=method, fisher="type2", unused="ignore")
        nat, state, info = ng.step(params, ng.init(params), (x, y), context=context)
        ff.check(info)
        stats = ng.stats(params, (x, y), context=context)
        assert stats.grads.keys() == params.keys()
        nats.append((nat, stats.grads, ng.matvec(state, params), ng.fisher(stats) @ params))
    for mine, theirs in zip(*nats, strict=True):
        for name, leaf in mine.items():
            torch.testing.assert_close(leaf, theirs.get(name, torch.zeros_like(leaf)), rtol=1e-10, atol=1e-12)
    assert all(not nats[0][0][name].any() for name in UNUSED)


def test_the_report_says_so():
    ng, _, _ = build(Pooled(), torch.randn(8, 4), unused="ignore")
    report = str(ng.layout)
    assert report.count("unused") == 4 and "all 51 entries covered: 51 by 2 layers; 47 unused" in report


def test_an_unknown_name_raises():
    with as_installed(), pytest.raises(E.UnknownNameError, match="ignore"):
        build(Pooled(), torch.randn(8, 4), unused="ignored")


def test_a_net_without_any_used_one_is_refused_all_the_same():
    class Constant(nn.Linear):
        def forward(self, x):
            return x

    with as_installed(), pytest.raises(E.UnusedParameterError):
        ff.optim.NaturalGradient(Constant(4, 4), likelihood=ff.Categorical(), lr=0.1).step(
            (torch.randn(8, 4), torch.zeros(8).long())
        )


def test_the_drop_in_leaves_them_as_they_are_weight_decay_or_not():
    net, steps = Pooled().double(), batches()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for name, p in net.named_parameters():
        p.requires_grad_(name not in UNUSED)
    expected = Loop(weight_decay=0.1).run(net, steps)
    net.requires_grad_(True)
    opt = ff.optim.NaturalGradient(
        net,
        likelihood=ff.Categorical(),
        lr=0.5,
        damping=0.1,
        weight_decay=0.1,
        kl_bound=1e-2,
        ema=0.9,
        update_every=1,
        invert_every=1,
    )
    for batch in steps:
        opt.step(batch)
    assert opt.layout.unused == UNUSED
    assert all(torch.equal(before[name], dict(net.named_parameters())[name]) for name in UNUSED)
    net.requires_grad_(False)
    for name, wanted in expected[0].items():
        torch.testing.assert_close(dict(net.named_parameters())[name].detach(), wanted, rtol=1e-10, atol=1e-10)


def test_the_drop_in_without_numbers_leaves_them_as_they_are_too():
    net, steps = Pooled().double(), batches()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    opt = ff.optim.NaturalGradient(net, likelihood=ff.Categorical(), weight_decay=0.1, kl_bound=None)
    for batch in steps:
        opt.step(batch)
    after = dict(net.named_parameters())
    assert all(torch.equal(before[name], after[name]) == (name in UNUSED) for name in before)


@pytest.mark.parametrize("watches", [False, True], ids=["inputs", "watch"])
def test_a_preconditioner_leaves_their_gradients(watches):
    net, ((x, y), *_) = Pooled().double(), batches()
    pre = ff.optim.Preconditioner(net, likelihood=ff.Categorical(), example_inputs=x)
    if watches:
        with pre.watch():
            loss = F.cross_entropy(net(x), y)
    else:
        loss = F.cross_entropy(net(x), y)
    loss.backward()
    net.mask.grad = torch.ones_like(net.mask)  # of a loss that uses it
    pre.step() if watches else pre.step(x)
    assert net.pooler.weight.grad is None and torch.equal(net.mask.grad, torch.ones_like(net.mask))
