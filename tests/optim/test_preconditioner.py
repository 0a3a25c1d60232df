"""Gradients rewritten between backward and step: with plain SGD that is the functional loop."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fisherfn as ff
from tests.methods.protocol import METHODS
from tests.optim.problems import CLASSES, SEEDED, Loop, problem, same
from tests.zoo import as_installed

LABELS = ff.Categorical()
E = ff.errors


def made(net, loop, **more):
    """The preconditioner, and the SGD that follows it."""
    sgd = torch.optim.SGD(net.parameters(), lr=loop.lr, momentum=loop.momentum)
    fisher = "mc" if loop.fisher == "empirical" else loop.fisher
    options = {"likelihood": LABELS, "kl_bound": loop.bound, "optimizer": sgd, "fisher": fisher, **loop.options, **more}
    return ff.optim.Preconditioner(net, **options), sgd


def train(net, loop, batches, argument, **more):
    pre, sgd = made(net, loop, **more)
    for x, y in batches:
        sgd.zero_grad()
        F.cross_entropy(net(x), y).backward()
        pre.step(argument(x, y))
        sgd.step()
    return pre


ARGUMENTS = {"mc": lambda x, y: x, "type2": lambda x, y: x, "empirical": lambda x, y: (x, y)}


@METHODS
@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_with_sgd_it_is_the_functional_loop(method, fisher):
    case = problem(steps=20)
    every = {} if method == "exactNG" else {"update_every": 2, "invert_every": 4}
    loop = Loop(method, lr=0.3, fisher=fisher, **every)
    expected = loop.run(case.net, case.batches)
    train(case.net, loop, case.batches, ARGUMENTS[fisher])
    same(case.net, expected)


@pytest.mark.parametrize("fisher", ARGUMENTS)
@pytest.mark.parametrize("more", [{}, {"chunk_size": 3}], ids=str)
@pytest.mark.parametrize("name", ["conv-batch-norm", "transformer"])
def test_every_fisher_with_draws_and_chunks(fisher, more, name):
    if more and name == "conv-batch-norm":
        pytest.skip("batch norm in chunks is another batch norm")
    case = problem(name)
    loop = Loop(fisher=fisher, samples=3)
    expected = loop.run(case.net, case.batches)
    train(case.net, loop, case.batches, ARGUMENTS[fisher], **more)
    same(case.net, expected)  # buffers moved once a step, by the user's own forward


@pytest.mark.parametrize("name", SEEDED)
def test_dropout_has_seeds_of_its_own(name):
    case = problem(name)
    before = torch.get_rng_state()
    pre = ff.optim.Preconditioner(case.net, likelihood=LABELS)
    for p in case.net.parameters():
        p.grad = torch.ones_like(p)
    pre.step(case.batches[0][0])
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad.isfinite().all() and not (p.grad == 1).any() for p in case.net.parameters())


def test_accumulated_gradients_with_the_statistics_of_the_inputs_given():
    case = problem(steps=1, examples=12)
    (x, y), whole = case.batches[0], case.again()
    for parts, net, given in ((1, whole, x), (3, case.net, x)):
        pre, _ = made(net, Loop())
        for part_x, part_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (F.cross_entropy(net(part_x), part_y) / parts).backward()
        pre.step(given)
    for a, b in zip(case.net.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


def test_inputs_are_looked_at_when_statistics_are_due():
    case, loop = problem(), Loop(update_every=3, invert_every=3)
    expected, twin = case.again(), case.again()
    train(expected, loop, case.batches, ARGUMENTS["mc"])
    pre, sgd = made(twin, loop)
    for index, (x, y) in enumerate(case.batches):
        sgd.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        pre.step(x if index % 3 == 0 else None)
        sgd.step()
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), twin.parameters(), strict=True))


FORMS = {
    "groups": lambda net: [{"params": [net.get_parameter("0.weight")]}, {"params": net.get_parameter("0.bias")}],
    "names": lambda net: [(name, p) for name, p in net.named_parameters() if name.startswith("0.")],
    "groups with names": lambda net: [{"params": ((n, p) for n, p in net.named_parameters() if n.startswith("0."))}],
}


@pytest.mark.parametrize("form", FORMS)
def test_parameters_are_given_as_to_torchs_optimizers(form):
    case = problem()
    x, y = case.batches[0]
    F.cross_entropy(case.net(x), y).backward()
    before = {name: p.grad.clone() for name, p in case.net.named_parameters()}
    ff.optim.Preconditioner(case.net, FORMS[form](case.net), likelihood=LABELS).step((x, y))
    changed = {name for name, p in case.net.named_parameters() if not torch.equal(p.grad, before[name])}
    assert changed == {"0.weight", "0.bias"}


# --------------------------------------------------------------------------------------------- gradient scaling


def scaled(net, batch, *, watched, ahead, overflow=False):
    """One step of a scaled loss: the preconditioner, whether the parameters moved, the gradients at the step."""
    x, y = batch
    sgd = torch.optim.SGD(net.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    pre = ff.optim.Preconditioner(
        net, likelihood=LABELS, optimizer=sgd, kl_bound=1e-2, scaler=scaler, example_inputs=x, fisher="type2"
    )
    before = [p.detach().clone() for p in net.parameters()]
    with pre.watch():
        loss = F.cross_entropy(net(x), y)
    scaler.scale(loss * (torch.inf if overflow else 1.0)).backward()
    if ahead:
        scaler.unscale_(sgd)
    pre.step(None if watched else (x, y))
    scaler.step(sgd)
    scaler.update()
    moved = [not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)]
    return pre, any(moved), scaler


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("ahead", [True, False])
def test_a_scaled_loss_makes_the_same_step(watched, ahead):
    case = problem()
    loop = Loop(fisher="empirical", momentum=0.0, damping=0.1)
    expected = loop.run(case.net, case.batches[:1])
    _, moved, _ = scaled(case.net, case.batches[0], watched=watched, ahead=ahead)
    assert moved
    same(case.net, expected)


def test_gradients_that_overflowed_are_left_to_the_scaler():
    case = problem()
    pre, moved, scaler = scaled(case.net, case.batches[0], watched=True, ahead=False, overflow=True)
    assert not moved and scaler.get_scale() == 2.0**9
    assert int(pre.curvature.count) == 0, "what was watched went with the step"
    with pytest.raises(E.StructureError, match="none were collected"):
        x, y = case.batches[1]
        F.cross_entropy(case.net(x), y).backward()
        case.net.zero_grad()
        F.cross_entropy(case.net(x), y).backward()
        pre.step()


def test_a_wrapped_optimizer_is_unscaled_once():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

        @property
        def param_groups(self):
            return self.optimizer.param_groups

    case = problem()
    x, y = case.batches[0]
    sgd = torch.optim.SGD(case.net.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    pre = ff.optim.Preconditioner(case.net, likelihood=LABELS, optimizer=Wrapper(sgd), scaler=scaler)
    scaler.scale(F.cross_entropy(case.net(x), y)).backward()
    pre.step((x, y))
    once = [p.grad.clone() for p in case.net.parameters()]
    scaler.step(sgd)
    assert all(torch.equal(a, p.grad) for a, p in zip(once, case.net.parameters(), strict=True))


def test_preconditioning_after_the_step_is_refused():
    case = problem()
    x, y = case.batches[0]
    sgd = torch.optim.SGD(case.net.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu")
    pre = ff.optim.Preconditioner(case.net, likelihood=LABELS, optimizer=sgd, scaler=scaler)
    scaler.scale(F.cross_entropy(case.net(x), y)).backward()
    scaler.step(sgd)
    with pytest.raises(E.StructureError, match="between backward"):
        pre.step(x)


# --------------------------------------------------------------------------------------------- what goes wrong


def test_gradients_that_are_not_finite_raise_and_stay():
    case = problem()
    x, y = case.batches[0]
    pre, _ = made(case.net, Loop())
    (F.cross_entropy(case.net(x), y) * torch.nan).backward()
    with pytest.raises(E.NonFiniteError, match="gradient"):
        pre.step(x)
    assert all(p.grad.isnan().all() for p in case.net.parameters()) and int(pre.curvature.count) == 0
    case.net.zero_grad()
    F.cross_entropy(case.net(x), y).backward()
    pre.step(x)
    assert int(pre.curvature.count) == 1


def graded(**more):
    net = nn.Linear(4, CLASSES)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    return ff.optim.Preconditioner(net, more.pop("params", None), **{"likelihood": LABELS, **more})


X, Y = torch.ones(6, 4), torch.arange(6) % CLASSES
CALLS = {
    "no net": (lambda: ff.optim.Preconditioner(None), E.StructureError, "Module"),
    "another net's": (lambda: graded(params=nn.Linear(4, 3).parameters()), E.StructureError, "of this net"),
    "a clip without a rate": (lambda: graded(kl_bound=1e-3), E.StructureError, "kl_bound needs the optimizer"),
    "no likelihood": (lambda: graded(likelihood=None).step(X), E.LikelihoodError, "pass likelihood"),
    "nothing": (lambda: graded().step(), E.StructureError, "none were collected"),
    "nothing, the layers found": (lambda: graded(example_inputs=X).step(), E.StructureError, "run the net in"),
    "a batch of three": (lambda: graded().step((X, Y, Y)), E.StructureError, "inputs, targets"),
    "targets out of range": (lambda: graded().step((X, Y + 9)), E.TargetError, "class indices"),
    "broken inputs": (lambda: graded(example_inputs=X).step(X * torch.nan), E.NonFiniteError, "inputs"),
    "a broken first batch": (lambda: graded().step(X * torch.nan), E.NonFiniteError, "first batch"),
    "a scaler alone": (lambda: graded(scaler=torch.amp.GradScaler("cpu")), E.StructureError, "scaler needs"),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_goes_wrong_is_typed(name):
    call, error, said = CALLS[name]
    with as_installed(), pytest.raises(error, match=said):
        call()


def test_missing_gradients_are_named():
    pre = graded()
    pre._curvature.network.net.bias.grad = None
    with pytest.raises(E.StructureError, match=r"'bias' have no gradient: call loss.backward"):
        pre.step(X)


UNLABELLED = {
    "gaussian": (ff.Gaussian(), lambda n: torch.zeros(n, CLASSES, dtype=torch.float64)),
    "gaussian with a scale": (ff.Gaussian(0.5), lambda n: torch.zeros(n, CLASSES, dtype=torch.float64)),
    "bernoulli": (ff.Bernoulli(), lambda n: torch.zeros(n, CLASSES, dtype=torch.float64)),
    "classes": (LABELS, lambda n: torch.zeros(n, dtype=torch.int64)),
    "smoothed classes": (ff.Categorical(label_smoothing=0.1), lambda n: torch.zeros(n, dtype=torch.int64)),
}


@pytest.mark.parametrize("method", ["kfac", "exactNG"])
@pytest.mark.parametrize("fisher", ["mc", "type2"])
@pytest.mark.parametrize("name", UNLABELLED)
def test_inputs_alone_serve_every_likelihood(name, fisher, method):
    """The sampled Fisher does not depend on targets, so it is that of any."""
    likelihood, targets = UNLABELLED[name]
    case = problem()
    x, y = case.batches[0][0], targets(8)
    pre = ff.optim.Preconditioner(case.net, likelihood=likelihood, fisher=fisher, method=method, damping=0.1)
    likelihood.nll(case.net(x), y).mean().backward()
    grads = {n: p.grad.clone() for n, p in case.net.named_parameters()}
    pre.step(x)
    model, params, _ = ff.functional(case.net)
    ng = ff.natural_gradient(model, params, x, likelihood=likelihood, fisher=fisher, method=method, context={})
    stats = ng.stats(params, (x, y), generator=torch.Generator().manual_seed(0), context={})
    nat, _, _ = ng.step_from(ng.init(params, damping=0.1, ema=0.95), grads, stats)
    for n, p in case.net.named_parameters():
        torch.testing.assert_close(p.grad, nat[n], rtol=1e-10, atol=1e-10)


def test_a_parameter_that_the_outputs_ignore_needs_no_gradient_at_the_first_batch():
    case = problem()
    case.net.register_parameter("spare", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    pre = ff.optim.Preconditioner(case.net, likelihood=LABELS)
    x, y = case.batches[0]
    F.cross_entropy(case.net(x), y).backward()
    pre.step(x)
    assert case.net.spare.grad is None and int(pre.curvature.count) == 1


def test_the_empirical_fisher_needs_targets():
    case = problem(steps=1)
    pre = ff.optim.Preconditioner(case.net, likelihood=ff.Categorical(), fisher="empirical")
    x, y = case.batches[0]
    F.cross_entropy(case.net(x), y).backward()
    with pytest.raises(ff.errors.LikelihoodError, match="needs the targets"):
        pre.step(x)
    pre.step((x, y))
