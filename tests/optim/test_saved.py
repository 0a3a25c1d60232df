"""Saved and loaded, a run goes on as if it had not been interrupted, bit for bit."""

import copy
import io

import pytest
import torch
from torch.nn import functional as F

import fisherfn as ff
from fisherfn.optim.saved import renamed
from tests.methods.protocol import METHODS
from tests.optim.problems import problem
from tests.zoo import as_installed

E = ff.errors
HALF, ALL = 6, 9  # not where the cadence of a fresh optimizer would be


def through_a_file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def optimizer(net, method="kfac", **more):
    options = {
        "lr": 0.3,
        "damping": 0.1,
        "kl_bound": 1e-2,
        "update_every": 2,
        "invert_every": 4,
        "generator": 7,
        **more,
    }
    if method == "exactNG":
        options |= {"update_every": 1, "invert_every": 1}
    return ff.optim.NaturalGradient(net, likelihood=ff.Categorical(), method=method, **options)


def equal(net, other):
    return all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))


@METHODS
@pytest.mark.parametrize("built", [False, True], ids=["before the first batch", "after some"])
def test_a_run_goes_on_bit_for_bit(method, built):
    case = problem(steps=ALL)
    straight, resumed = case.again(), case.again()
    opt, first = optimizer(straight, method), optimizer(resumed, method)
    for batch in case.batches:
        opt.step(batch)
    for batch in case.batches[:HALF]:
        first.step(batch)
    saved = through_a_file({"net": resumed.state_dict(), "opt": first.state_dict()})
    resumed = case.again()
    resumed.load_state_dict(saved["net"])
    second = optimizer(resumed, method, generator=0, lr=9.0, damping=5.0)
    if built:
        second.step([part[:3] for part in case.batches[0]])
        resumed.load_state_dict(saved["net"])
    second.load_state_dict(saved["opt"])
    for batch in case.batches[HALF:]:
        second.step(batch)
    assert equal(resumed, straight)
    assert second.damping == opt.damping


@pytest.mark.parametrize("built", [False, True], ids=["before the first batch", "after some"])
def test_a_run_without_numbers_goes_on_bit_for_bit(built):
    case = problem(steps=ALL)
    straight, resumed = case.again(), case.again()

    def make(net):
        return ff.optim.NaturalGradient(net, likelihood=ff.Categorical(), kl_bound=None, generator=7)

    opt, first = make(straight), make(resumed)
    for batch in case.batches:
        opt.step(batch)
    for batch in case.batches[:HALF]:
        first.step(batch)
    saved = through_a_file({"net": resumed.state_dict(), "opt": first.state_dict()})
    resumed = case.again()
    second = make(resumed)
    if built:
        second.step(case.batches[0])
    resumed.load_state_dict(saved["net"])
    second.load_state_dict(saved["opt"])
    for batch in case.batches[HALF:]:
        second.step(batch)
    assert equal(resumed, straight)
    assert float(second.info.adapted.damping) == opt.damping


def test_schedulers_and_dropout_go_on_too():
    case = problem("dropout", steps=ALL)
    straight, resumed = case.again(), case.again()

    def made(net):
        opt = optimizer(net)
        return opt, torch.optim.lr_scheduler.OneCycleLR(opt, 0.3, total_steps=ALL + 1)

    def run(net, opt, scheduler, batches):
        for batch in batches:
            opt.step(batch)
            scheduler.step()

    run(straight, *made(straight), case.batches)
    first = made(resumed)
    run(resumed, *first, case.batches[:HALF])
    saved = through_a_file([part.state_dict() for part in first])
    second = made(resumed)
    for part, state in zip(second, saved, strict=True):
        part.load_state_dict(state)
    run(resumed, *second, case.batches[HALF:])
    assert equal(resumed, straight)


def test_a_loaded_state_can_be_saved_before_the_first_batch():
    case = problem()
    opt = optimizer(case.net)
    opt.step(case.batches[0])
    saved = opt.state_dict()
    other = optimizer(case.again())
    other.load_state_dict(saved)
    again = other.state_dict()
    assert again["curvature"]["steps"] == 1 and again["curvature"]["state"].keys() == saved["curvature"]["state"].keys()
    empty = optimizer(case.again())
    empty.load_state_dict(optimizer(case.again()).state_dict())
    empty.step(case.batches[0])


def test_loading_copies_the_tensors():
    case = problem()
    opt = optimizer(case.net)
    opt.step(case.batches[0])
    saved = opt.state_dict()
    copies = {path: leaf.clone() for path, leaf in ff.tree.flatten(saved).items() if isinstance(leaf, torch.Tensor)}
    other = optimizer(case.again())
    other.load_state_dict(saved)
    for batch in case.batches[1:4]:
        other.step(batch)
    now = ff.tree.flatten(saved)
    assert all(torch.equal(leaf, now[path]) for path, leaf in copies.items())


@pytest.mark.parametrize("watched", [False, True])
def test_a_preconditioner_goes_on_too(watched):
    case = problem(steps=ALL)

    def made(net):
        pre = ff.optim.Preconditioner(net, likelihood=ff.Categorical(), update_every=2, invert_every=4, generator=3)
        return pre, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    def run(net, pre, sgd, batches):
        for x, y in batches:
            sgd.zero_grad()
            with pre.watch(x):
                loss = F.cross_entropy(net(x), y)
            loss.backward()
            pre.step(None if watched else x)
            sgd.step()

    straight, resumed = case.again(), case.again()
    run(straight, *made(straight), case.batches)
    first = made(resumed)
    run(resumed, *first, case.batches[:HALF])
    saved = through_a_file([part.state_dict() for part in first])
    second = made(resumed)
    for part, state in zip(second, saved, strict=True):
        part.load_state_dict(state)
    run(resumed, *second, case.batches[HALF:])
    assert equal(resumed, straight)


# --------------------------------------------------------------------------------------------- what goes wrong


def other_state(method="ekfac", name="mlp"):
    case = problem(name)
    opt = optimizer(case.net, method)
    opt.step(case.batches[0])
    return opt.state_dict()


SAVED = {
    "another optimizer's": lambda: torch.optim.SGD(problem().net.parameters(), lr=0.1).state_dict(),
    "another version's": lambda: (s := other_state("kfac")) | {"curvature": s["curvature"] | {"version": 0}},
    "another form": lambda: other_state("kfac") | {"curvature": {"state": {}}},
    "a list": lambda: other_state("kfac") | {"curvature": []},
    "another method's": other_state,
    "another net's": lambda: other_state("kfac", "conv-batch-norm"),
}


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("name", SAVED)
def test_states_of_another_optimizer_raise(name, built):
    saved, case = SAVED[name](), problem()
    opt = optimizer(case.net, example_inputs=case.batches[0][0] if built else None)
    with as_installed(), pytest.raises(E.StructureError):
        opt.load_state_dict(saved)
        opt.step(case.batches[0])  # a state of another method is found out when the layers are


@pytest.mark.parametrize("method", ["kfac", "exactNG"])
def test_a_saved_state_takes_the_type_of_the_net(method):
    """The factors of a float32 net go on in float64."""
    x, y = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1] * 4)
    net = torch.nn.Linear(3, 2)
    saved = None
    for dtype in (torch.float32, torch.float64):
        net.to(dtype).zero_grad()
        pre = ff.optim.Preconditioner(net, likelihood=ff.Categorical(), method=method, example_inputs=x.to(dtype))
        if saved is not None:
            pre.load_state_dict(saved)
        torch.nn.functional.cross_entropy(net(x.to(dtype)), y).backward()
        pre.step(x.to(dtype))
        saved = pre.state_dict()
    assert all(leaf.dtype == torch.float64 for leaf in saved["state"].values() if leaf.is_floating_point())


WRAPPERS = {
    "plain": lambda net: net,
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "data-parallel": torch.nn.DataParallel,
    "both": lambda net: torch.compile(torch.nn.DataParallel(net), backend="eager"),
}


@pytest.mark.parametrize("fixed", [{}, {"lr": 0.3, "damping": 0.1}], ids=["adaptive", "fixed"])
@pytest.mark.parametrize(
    ("first", "second"), [("compiled", "plain"), ("plain", "data-parallel"), ("data-parallel", "both")]
)
@pytest.mark.parametrize("single", [False, True], ids=["net", "single layer"])
def test_a_state_of_a_wrapped_net_can_be_loaded_without_the_wrapper(single, first, second, fixed):
    case = problem(steps=2)
    net = torch.nn.Linear(4, 3).double() if single else case.net

    def wrapped(how):
        own = copy.deepcopy(net)
        return own, ff.optim.NaturalGradient(WRAPPERS[how](own), likelihood=ff.Categorical(), generator=7, **fixed)

    (net, before), (other, after) = wrapped(first), wrapped(second)
    before.step(case.batches[0])
    other.load_state_dict(net.state_dict())
    after.load_state_dict(before.state_dict())
    before.step(case.batches[1])
    after.step(case.batches[1])
    assert equal(net, other)


def test_names_that_wrappers_do_not_make_unclear_stay():
    saved = {"factors/module.a/A": torch.ones(1), "factors/a/A": torch.zeros(1)}
    assert renamed(saved, list(saved)) is saved
