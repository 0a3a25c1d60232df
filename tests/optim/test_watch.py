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


def test_a_scaler_skips_the_step_and_zero_grad_drops_what_was_watched():
    case = problem()
    (x, y), (x2, y2) = case.batches[:2]
    twin = case.again()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    fixed = {"likelihood": LABELS, "lr": 0.5, "damping": 0.1}
    opt = ff.optim.NaturalGradient(case.net, **fixed, example_inputs=x, scaler=scaler, generator=0)
    for batch_x, batch_y, weight in ((x, y, torch.inf), (x2, y2, 1.0)):
        opt.zero_grad()
        with opt.watch():
            loss = F.cross_entropy(case.net(batch_x), batch_y)
        scaler.scale(weight * loss).backward()
        scaler.step(opt)
        scaler.update()
    other = ff.optim.NaturalGradient(twin, **fixed, fisher="empirical")
    other.step((x2, y2))
    for a, b in zip(case.net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def scaled_steps(net, batches, how, weight=1.0, updated=True):
    """Parameters after watched steps with a gradient scaler, and the scaler's last scale."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=how != "a disabled scaler")
    scaler = None if how == "no scaler" else scaler
    fixed = {"lr": 0.5, "damping": 0.1, "kl_bound": None, "scaler": scaler}
    opt = ff.optim.NaturalGradient(net, likelihood=LABELS, **fixed, example_inputs=batches[0][0])
    for x, y in batches:
        opt.zero_grad()
        with opt.watch():
            loss = weight * F.cross_entropy(net(x), y)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if how == "unscaled by the caller":
            scaler.unscale_(opt)
        if how == "stepped by the scaler":
            scaler.step(opt)
        else:
            opt.step()
        if scaler is not None and updated:
            scaler.update()
    return [p.detach() for p in net.parameters()], scaler and scaler.get_scale()


@pytest.mark.parametrize(
    "how", ["stepped by the scaler", "unscaled by the caller", "unscaled by the step", "a disabled scaler"]
)
def test_a_scaled_loss_is_unscaled_once(how):
    case = problem(steps=3)
    expected, _ = scaled_steps(case.again(), case.batches, "no scaler")
    found, _ = scaled_steps(case.again(), case.batches, how)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_step_with_overflowed_gradients_is_left_out_and_lowers_the_scale():
    case = problem(steps=1)
    found, scale = scaled_steps(case.again(), case.batches, "unscaled by the step", weight=torch.inf)
    assert all(torch.equal(a, b) for a, b in zip(found, case.net.parameters(), strict=True)) and scale == 2.0**9


def test_a_loss_without_its_scale_is_an_error():
    case = problem(steps=1)
    (x, y), scaler = case.batches[0], torch.amp.GradScaler("cpu")
    opt = ff.optim.NaturalGradient(case.net, likelihood=LABELS, lr=0.5, damping=0.1, example_inputs=x, scaler=scaler)
    with opt.watch():
        loss = F.cross_entropy(case.net(x), y)
    loss.backward()
    with pytest.raises(E.StructureError, match=r"between backward\(\) of the scaled loss"):
        opt.step()


def test_a_scaler_that_is_not_updated_is_an_error():
    case = problem(steps=2)
    with pytest.raises(E.StructureError, match=r"call scaler\.update\(\) after each step"):
        scaled_steps(case.net, case.batches, "unscaled by the step", updated=False)


# ----------------------------------------------------------------------------------------- other example shapes


class Merged(nn.Module):
    """A net that merges examples and positions."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        rows = torch.tanh(self.first(x.reshape(-1, 4)))
        return self.last(rows).reshape(*x.shape[:2], CLASSES)


def sequences(length, examples=6):
    rng = torch.Generator().manual_seed(length)
    x = torch.randn(examples, length, 4, generator=rng, dtype=torch.float64)
    return x, torch.randint(CLASSES, (examples, length), generator=rng)


def summed_loss(outputs, y):
    return F.cross_entropy(outputs.flatten(0, 1), y.flatten(), reduction="sum") / len(y)


CALLS = {
    "by position": (lambda x: x, lambda net, x: net(x)),
    "by name": (lambda x: x, lambda net, x: net(x=x)),
    "from a dict": (lambda x: {"x": x}, lambda net, x: net(x)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("method", ["kfac", "ekfac"])
@pytest.mark.parametrize("built", [1, 2, 4])
def test_a_net_that_merges_positions_is_watched_at_another_length(built, method, call):
    form, run = CALLS[call]
    net, found = Merged().double(), []
    x, y = sequences(4)
    for length in (built, 4):
        pre = ff.optim.Preconditioner(net, damping=0.1, method=method, example_inputs=form(sequences(length, 2)[0]))
        net.zero_grad()
        with pre.watch():
            loss = summed_loss(run(net, x), y)
        loss.backward()
        pre.step()
        assert float(pre.curvature.examples) == 6
        found.append([p.grad.clone() for p in net.parameters()])
    for other, same_length in zip(*found, strict=True):
        torch.testing.assert_close(other, same_length, rtol=1e-12, atol=1e-12)
    assert not net._forward_pre_hooks


def test_an_unknown_number_of_examples_is_an_error():
    net, (x, y) = Merged().double(), sequences(4)
    pre = ff.optim.Preconditioner(net, example_inputs=sequences(2)[0])
    with pre.watch():
        loss = summed_loss(net.forward(x), y)
    loss.backward()
    with pytest.raises(E.StructureError, match=r"number of examples is unknown: call the module"):
        pre.step()
    net.zero_grad()
    with pre.watch(x):
        loss = summed_loss(net.forward(x), y)
    loss.backward()
    pre.step()
    assert float(pre.curvature.examples) == 6


@pytest.mark.parametrize("updates", [True, False])
def test_the_default_bound_of_a_watched_step_has_the_labels_of_its_own_length(updates):
    moves, (x, y) = [], sequences(8)
    base = Merged().double()
    for how in ("watched", "with a batch"):
        net = Merged().double()
        net.load_state_dict(base.state_dict())
        opt = ff.optim.NaturalGradient(
            net, likelihood=LABELS, lr=10.0, damping=0.1, momentum=0.0, fisher="empirical", invert_every=1,
            example_inputs=sequences(2)[0], update_every=2,
        )  # fmt: skip
        if not updates:
            opt.step(sequences(2))
        before = [p.detach().clone() for p in net.parameters()]
        if how == "watched":
            opt.zero_grad()
            with opt.watch():
                loss = summed_loss(net(x), y)
            loss.backward()
        opt.step(None if how == "watched" else (x, y))
        moves.append([p.detach() - old for p, old in zip(net.parameters(), before, strict=True)])
    for watched, given in zip(*moves, strict=True):
        torch.testing.assert_close(watched, given, rtol=1e-9, atol=1e-12)


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
