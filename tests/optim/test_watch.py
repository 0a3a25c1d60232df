"""The empirical Fisher of the user's own pass is the one of `fisher="empirical"`, without a second forward."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fisherfn as ff
from tests.methods.protocol import METHODS
from tests.nets import Diagonal, Tied, Transformer
from tests.optim.problems import CLASSES, NETS, Loop, problem, same
from tests.zoo import as_installed

LABELS = ff.Categorical()
E = ff.errors
WATCHED = sorted(set(NETS) - {"dropout", "functional-dropout"})


def descended(net, loop, batches, **more):
    """The user's own loop with the drop-in optimizer: loss and backward are theirs."""
    opt = ff.optim.NaturalGradient(
        net, likelihood=LABELS, lr=loop.lr, momentum=loop.momentum, kl_bound=loop.bound, **loop.options, **more
    )
    for x, y in batches:
        with opt.watch(x):
            loss = F.cross_entropy(net(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
    return opt


@METHODS
def test_a_watched_loop_is_the_functional_loop(method):
    every = {} if method == "exactNG" else {"update_every": 2, "invert_every": 4}
    loop = Loop(method, lr=0.3, fisher="empirical", **every)
    case = problem(steps=50 if method == "kfac" else 12)
    expected = loop.run(case.net, case.batches)
    descended(case.net, loop, case.batches)
    same(case.net, expected)


@pytest.mark.parametrize("name", WATCHED)
def test_every_net(name):
    case, loop = problem(name), Loop(fisher="empirical")
    expected = loop.run(case.net, case.batches)
    descended(case.net, loop, case.batches)
    same(case.net, expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in case.net.modules())


def test_a_sequence_first_layer():
    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = nn.Linear(3, 4), nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.last(torch.tanh(self.inner(x.transpose(0, 1))).mean(0))

    case = problem()
    case.net = TimeFirst().double()
    rng = torch.Generator().manual_seed(0)
    case.batches = [(torch.randn(6, 2, 3, generator=rng).double(), torch.arange(6) % CLASSES) for _ in range(4)]
    loop = Loop(fisher="empirical")
    expected = loop.run(case.net, case.batches)
    descended(case.net, loop, case.batches)
    same(case.net, expected)


def rewritten(net, parts, weights, reduction="mean", **more):
    """Gradients after several passes, the k-th loss times its weight, and one preconditioning."""
    pre = ff.optim.Preconditioner(net, damping=0.1, **more)
    for (x, y), weight in zip(parts, weights, strict=True):
        with pre.watch(x, reduction=reduction):
            loss = F.cross_entropy(net(x), y, reduction=reduction)
        (weight * loss).backward()
    pre.step()
    return [p.grad for p in net.parameters()], pre


@pytest.mark.parametrize("method", ["kfac", "exactNG"])
@pytest.mark.parametrize("sizes", [[12], [6, 6], [7, 3, 2]], ids=str)
def test_passes_add_up_to_one_batch(sizes, method):
    case = problem(steps=1, examples=12)
    x, y = case.batches[0]
    parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
    model, params, context = ff.functional(case.net)
    ng = ff.natural_gradient(model, params, x, likelihood=LABELS, method=method, fisher="empirical", context=context)
    nat, _, _ = ng.step(params, ng.init(params, damping=0.1), (x, y), context=context)
    found, _ = rewritten(case.net, parts, [size / 12 for size in sizes], method=method)
    for name, leaf in zip(nat, found, strict=True):
        torch.testing.assert_close(leaf, nat[name], rtol=1e-10, atol=1e-12)


def test_a_sum_keeps_the_curvature_and_scales_the_gradient():
    case = problem(steps=1, examples=12)
    other = case.again()
    mean, first = rewritten(case.net, case.batches, [1.0])
    total, second = rewritten(other, case.batches, [1.0], reduction="sum")
    for a, b in zip(mean, total, strict=True):
        torch.testing.assert_close(12 * a, b, rtol=1e-10, atol=1e-12)
    for a, b in zip(ff.tree.leaves(first.curvature), ff.tree.leaves(second.curvature), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_watched_pass_with_dropout_uses_the_same_masks():
    case = problem("dropout")
    (x, y), other = case.batches[0], case.again()
    torch.manual_seed(5)
    F.cross_entropy(other(x), y).backward()
    torch.manual_seed(5)
    pre = ff.optim.Preconditioner(case.net, example_inputs=x)
    with pre.watch():
        loss = F.cross_entropy(case.net(x), y)
    loss.backward()
    for a, b in zip(case.net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    pre.step()


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_it_is_the_step_with_the_batch(low):
    torch.manual_seed(0)
    x, y = torch.randn(32, 1, 3, 3), torch.arange(32) % CLASSES
    nets = [NETS["conv-batch-norm"][0]() for _ in range(3)]
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
    start = torch.cat([p.detach().flatten().clone() for p in nets[0].parameters()])
    moves = []
    for net, watches, enabled in zip(nets, (True, False, False), (True, True, False), strict=True):
        opt = ff.optim.NaturalGradient(net, likelihood=LABELS, lr=1.0, damping=0.1, fisher="empirical", kl_bound=None)
        with torch.autocast("cpu", dtype=low, enabled=enabled):
            if watches:
                with opt.watch(x):
                    loss = F.cross_entropy(net(x), y)
            else:
                opt.step((x, y))
        if watches:
            loss.backward()
            opt.step()
        assert {leaf.dtype for leaf in ff.tree.leaves(opt.curvature)} <= {torch.float32, torch.int64}
        moves.append(torch.cat([p.detach().flatten() for p in net.parameters()]) - start)
    watched, given, exact = moves
    assert (watched - given).norm() < 0.05 * exact.norm()
    assert 0 < (watched - exact).norm() < 0.1 * exact.norm(), "near, and not in full precision"


# -------------------------------------------------------------------------------------------------------- closures


def test_a_closure_works_as_in_torch():
    case, loop = problem(), Loop(fisher="empirical")
    expected = loop.run(case.net, case.batches)
    opt = ff.optim.NaturalGradient(
        case.net, likelihood=LABELS, lr=loop.lr, kl_bound=loop.bound, example_inputs=case.batches[0][0], **loop.options
    )
    for index, (x, y) in enumerate(case.batches):

        def closure(x=x, y=y):
            opt.zero_grad()
            with opt.watch():
                loss = F.cross_entropy(case.net(x), y)
            loss.backward()
            return loss

        loss = opt.step(closure) if index % 2 else opt.step(closure=closure)
        torch.testing.assert_close(loss.detach(), expected[2][index], rtol=1e-10, atol=1e-10)
    same(case.net, expected)


# ----------------------------------------------------------------------------------------- other example shapes


# --------------------------------------------------------------------------------------------- what goes wrong


def passed(net, x, runs=1, backward=True, before=None, **more):
    pre = ff.optim.Preconditioner(net, example_inputs=x if before is None else before)
    with pre.watch(**more):
        loss = sum(F.cross_entropy(net(x), torch.zeros(len(x), dtype=torch.long)) for _ in range(runs))
    if backward:
        loss.backward()
    else:
        for p in net.parameters():
            p.grad = torch.ones_like(p)
    pre.step()


def two_lengths(net):
    pre = ff.optim.Preconditioner(net, example_inputs=torch.ones(6, 2, 4))
    for length in (2, 3):
        with pre.watch():
            loss = net(torch.ones(6, length, 4)).square().mean() / 2
        loss.backward()
    pre.step()


def linear():
    return nn.Linear(4, CLASSES)


X = torch.ones(6, 4)
WRONG = {
    "no backward": (lambda: passed(linear(), X, backward=False), E.StructureError, "had no backward pass"),
    "the net run twice": (lambda: passed(linear(), X, runs=2), E.StructureError, "used 2 times while watched, 1"),
    "the net not run": (lambda: passed(linear(), X, runs=0, backward=False), E.StructureError, "used 0 times"),
    "another reduction": (lambda: passed(linear(), X, reduction="none"), E.UnknownNameError, "reduction"),
    "no layers yet": (lambda: ff.optim.Preconditioner(linear()).watch().__enter__(), E.StructureError, "watch\\(x\\)"),
    "a parameter in no layer": (lambda: passed(Diagonal(), torch.ones(6, 3)), E.StructureError, "'scale' belong to no"),
    "sequences of two lengths before a step": (
        lambda: two_lengths(nn.Sequential(linear(), nn.Flatten())),
        E.ShapeError,
        "examples of different shapes",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_goes_wrong_is_typed(name):
    call, error, said = WRONG[name]
    with as_installed(), pytest.raises(error, match=said):
        call()


def test_watch_keeps_nothing_between_statistics():
    case = problem()
    x, y = case.batches[0]
    pre = ff.optim.Preconditioner(case.net, example_inputs=x, update_every=2, invert_every=2)
    for step in range(4):
        case.net.zero_grad()
        with pre.watch():
            loss = F.cross_entropy(case.net(x), y)
        assert len(pre._curvature._passes) == (step + 1) % 2
        loss.backward()
        pre.step()
        assert pre._curvature._passes == []
    assert int(pre.curvature.count) == 2


@pytest.mark.parametrize("make", [Tied, Transformer])
def test_a_watched_pass_computes_the_same_outputs(make):
    net = make().double()
    x = torch.randint(5, (6, 3)) if make is Transformer else torch.randn(6, 3).double()
    pre = ff.optim.Preconditioner(net, example_inputs=x)
    with pre.watch():
        outputs = net(x)
    torch.testing.assert_close(outputs, net(x), rtol=1e-12, atol=1e-12)
