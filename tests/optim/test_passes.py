"""Watched passes between two steps: which count, which are dropped, and what may not change meanwhile."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherfn as ff
from fisherfn.errors import StructureError
from tests.drawn import N, labelled
from tests.optim.problems import problem

LABELS = ff.Categorical()


E = ff.errors


def watched_step(net, sgd, pre, batch, *, dropped=None):
    """A step after a batch whose gradients were dropped; the gradients of the second batch."""
    for x, y in [dropped, batch] if dropped else [batch]:
        sgd.zero_grad()
        with pre.watch(x):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
    pre.step()
    return [p.grad.clone() for p in net.parameters()]


@pytest.mark.parametrize("to_none", [True, False])
def test_nor_does_one_that_is_erased_between_the_next_pass_and_its_backward_pass(to_none):
    case = problem(steps=2)
    net, examples = case.net, len(case.batches[0][0])
    pre = ff.optim.Preconditioner(net, damping=0.1, example_inputs=case.batches[0][0])
    for x, y in case.batches:
        with pre.watch():
            loss = F.cross_entropy(net(x), y)
        net.zero_grad(to_none)
        loss.backward()
    pre.step()
    assert float(pre.curvature.examples) == examples


@pytest.mark.parametrize("sum_first", [True, False])
def test_passes_with_one_backward_pass_or_one_each_all_count(sum_first):
    case = problem(steps=2)
    net, losses = case.net, []
    pre = ff.optim.Preconditioner(net, damping=0.1, example_inputs=case.batches[0][0])
    for x, y in case.batches:
        with pre.watch():
            losses.append(F.cross_entropy(net(x), y) / 2)
    for loss in [sum(losses)] if sum_first else losses:
        loss.backward()
    pre.step()
    assert float(pre.curvature.examples) == 2 * len(case.batches[0][0])


def test_a_batch_whose_gradients_were_dropped_does_not_count():
    case = problem(steps=2)
    found = []
    for dropped in (None, case.batches[0]):
        net = case.again()
        sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        pre = ff.optim.Preconditioner(net, damping=0.1)
        found.append(watched_step(net, sgd, pre, case.batches[1], dropped=dropped))
    for alone, after in zip(*found, strict=True):
        torch.testing.assert_close(after, alone)


@pytest.mark.parametrize("drop_in", [ff.optim.NaturalGradient, ff.optim.Preconditioner])
def test_a_pass_without_backward_stops_one_step_only(drop_in):
    case = problem(steps=1)
    x, y = case.batches[0]
    options = {"lr": 0.1} if drop_in is ff.optim.NaturalGradient else {}
    opt = drop_in(case.net, likelihood=ff.Categorical(), fisher="empirical", damping=0.1, **options)
    F.cross_entropy(case.net(x), y).backward()
    with opt.watch(x):
        case.net(x)
    with pytest.raises(ff.errors.StructureError, match="no backward pass"):
        opt.step()
    for p in case.net.parameters():
        p.grad = None
    with opt.watch(x):
        loss = F.cross_entropy(case.net(x), y)
    loss.backward()
    opt.step()
    assert int(opt.curvature.count) == 1


def test_inputs_that_change_between_watch_and_step_are_refused():
    net, (x, y) = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), labelled()
    for change in (False, True):
        pre = ff.optim.Preconditioner(net, likelihood=ff.Categorical(), damping=0.1, example_inputs=x)
        net.zero_grad()
        with pre.watch():
            loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        if change:
            x.copy_(torch.randn_like(x))
            with pytest.raises(StructureError, match="changed in place between"):
                pre.step()
        else:
            pre.step()


def test_a_dropped_batch_is_dropped_however_its_gradients_were_erased():
    net, (x, y) = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), labelled()
    found = []
    for erase in (None, True, False):
        pre = ff.optim.Preconditioner(net, likelihood=ff.Categorical(), damping=0.1, example_inputs=x)
        for batch in [x] if erase is None else [3 * x, x]:
            with pre.watch():
                loss = nn.functional.cross_entropy(net(batch), y)
            loss.backward()
            if batch is not x:
                net.zero_grad(set_to_none=erase)
        pre.step()
        found.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
        net.zero_grad()
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_momentum_outlives_the_gradient_that_it_started_from():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.a = nn.Linear(4, 3), nn.Parameter(torch.ones(4, 4))

        def forward(self, x):
            return self.layer(x @ torch.linalg.matrix_exp(0.1 * self.a))

    net, (x, y) = Own(), labelled()
    opt = ff.optim.NaturalGradient(
        net, likelihood=ff.Categorical(), lr=0.1, damping=0.1, kl_bound=None, uncovered="gradient", example_inputs=x
    )
    with opt.watch():
        loss = nn.functional.cross_entropy(net(x), y)
    loss.backward()
    opt.step()
    before = opt.state[net.a]["momentum_buffer"].clone()
    opt.zero_grad(set_to_none=False)
    assert before.any() and torch.equal(opt.state[net.a]["momentum_buffer"], before)


def test_sparse_gradients_are_preconditioned():
    net = nn.Sequential(nn.Embedding(6, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    x, y = torch.randint(0, 6, (N, 2), generator=torch.Generator().manual_seed(0)), labelled()[1]
    pre = ff.optim.Preconditioner(net, likelihood=ff.Categorical(), damping=0.1, example_inputs=x)
    with pre.watch():
        loss = nn.functional.cross_entropy(net(x), y)
    loss.backward()
    pre.step()
    assert torch.isfinite(net[0].weight.grad).all()


def test_a_microbatch_without_gradient_counts():
    net, (x, y) = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), labelled()
    found = []
    for order in ((0.0, 1.0), (1.0, 0.0)):
        net.zero_grad()
        pre = ff.optim.Preconditioner(net, likelihood=ff.Categorical(), damping=0.1, example_inputs=x)
        for weight in order:
            with pre.watch():
                loss = weight * nn.functional.cross_entropy(net((2 - weight) * x), y)
            (loss / 2).backward()
        pre.step()
        found.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    torch.testing.assert_close(found[1], found[0])
