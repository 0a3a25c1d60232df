"""A copy of a net and its optimizer goes on as the original would, on the copied net, and on it alone."""

import copy
import importlib
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fisherfn as ff
from fisherfn.methods.kfac import KFAC
from tests.optim.problems import problem
from tests.zoo import as_installed

E = ff.errors


def pickled(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = pytest.mark.parametrize("way", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])


def all_equal(net, other):
    pairs = zip(net.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@WAYS
@pytest.mark.parametrize("seen", [0, 3], ids=["before the first batch", "after three"])
@pytest.mark.parametrize("name", ["mlp", "conv-batch-norm", "dropout", "tied"])
def test_a_copied_optimizer_makes_the_same_steps(name, seen, way):
    case = problem(name, steps=7)
    opt = ff.optim.NaturalGradient(case.net, likelihood=ff.Categorical(), lr=0.3, method="ekfac", update_every=2)
    for batch in case.batches[:seen]:
        opt.step(batch)
    with as_installed():
        net, other = way((case.net, opt))
    for batch in case.batches[seen:]:
        assert torch.equal(opt.step(batch), other.step(batch))
        assert all_equal(case.net, net)
    assert other.param_groups[0]["params"][0] is next(net.parameters())
    assert (
        other.skipped == 0 and opt.defaults.items() <= other.defaults.items() and str(other.layout) == str(opt.layout)
    )


@WAYS
def test_steps_of_the_copy_leave_the_original_alone_and_the_other_way_round(way):
    case = problem("conv-batch-norm", steps=6)
    opt = ff.optim.NaturalGradient(case.net, likelihood=ff.Categorical(), lr=0.3)
    opt.step(case.batches[0])
    net, other = way((case.net, opt))
    before, state = copy.deepcopy(case.net.state_dict()), ff.tree.flatten(opt.curvature)
    for batch in case.batches[1:]:
        other.step(batch)
    assert all(torch.equal(before[n], t) for n, t in case.net.state_dict().items())
    assert all(torch.equal(state[n], t) for n, t in ff.tree.flatten(opt.curvature).items())
    assert not all_equal(case.net, net)


@WAYS
def test_watched_passes_stay_with_the_original(way):
    """The copied net did not run in them."""
    case = problem("mlp", steps=1)
    x, y = case.batches[0]
    opt = ff.optim.NaturalGradient(case.net, likelihood=ff.Categorical(), lr=0.3)
    with opt.watch(x):
        loss = F.cross_entropy(case.net(x), y)
    loss.backward()
    net, other = way((case.net, opt))
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    with as_installed(), pytest.raises(E.StructureError, match="none were collected"):
        other.step()
    opt.step()


@pytest.mark.parametrize("watches", [False, True], ids=["inputs", "watch"])
@WAYS
def test_a_copied_preconditioner_looks_at_the_copied_net(way, watches):
    """Its frozen layer, too, which is no parameter of the curvature."""
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    net[0].requires_grad_(False)
    x, y = torch.randn(16, 4).double(), torch.randint(3, (16,))
    options = {"likelihood": ff.Categorical(), "fisher": "type2", "example_inputs": x}
    other, copied = way((net, ff.optim.Preconditioner(net, **options)))
    other[0].weight.data.mul_(3)
    found = []
    for pre in (ff.optim.Preconditioner(other, **options), copied):
        other.zero_grad()
        if watches:
            with pre.watch():
                loss = F.cross_entropy(other(x), y)
        else:
            loss = F.cross_entropy(other(x), y)
        loss.backward()
        pre.step() if watches else pre.step(x)
        found.append([p.grad.clone() for p in other[2].parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_copy_alone_brings_its_net_along():
    case = problem()
    opt = ff.optim.NaturalGradient(case.net, likelihood=ff.Categorical(), lr=0.3)
    opt.step(case.batches[0])
    other, before = copy.deepcopy(opt), copy.deepcopy(case.net.state_dict())
    other.step(case.batches[1])
    assert all(torch.equal(before[n], t) for n, t in case.net.state_dict().items())


def test_a_copied_optimizer_has_its_schedule():
    case = problem(steps=5)
    opt = ff.optim.NaturalGradient(case.net, likelihood=ff.Categorical(), lr=0.3)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    opt.step(case.batches[0]), schedule.step()
    _, other, its = copy.deepcopy((case.net, opt, schedule))
    other.step(case.batches[1]), its.step()
    assert opt.param_groups[0]["lr"] == 0.15 and other.param_groups[0]["lr"] == 0.075


class Local(KFAC):
    """A method that looks local: pickle does not find it under its name."""

    __qualname__ = "test.<locals>.Local"


def test_an_optimizer_with_a_method_is_pickled():
    case = problem()
    opt = ff.optim.NaturalGradient(case.net, likelihood=ff.Categorical(), method=ff.lanczos(iterations=3), lr=0.3)
    opt.step(case.batches[0])
    with as_installed():
        net, other = pickled((case.net, opt))
    assert torch.equal(opt.step(case.batches[1]), other.step(case.batches[1])) and all_equal(case.net, net)


@pytest.mark.parametrize("what", ["method", "likelihood"])
def test_an_unpicklable_likelihood_or_method_raises_but_can_be_copied(what):
    case = problem()
    options = {"method": Local(), "likelihood": ff.Categorical(), "fisher": "type2"}
    if what == "likelihood":
        options = {"likelihood": lambda f, y: F.cross_entropy(f, y, reduction="none"), "fisher": "empirical"}
    opt = ff.optim.NaturalGradient(case.net, lr=0.3, **options)
    opt.step(case.batches[0])
    with as_installed(), pytest.raises(E.StructureError, match=f"this {what} cannot be pickled") as caught:
        pickled(opt)
    assert len(str(caught.value)) < 400
    net, other = copy.deepcopy((case.net, opt))
    assert torch.equal(opt.step(case.batches[1]), other.step(case.batches[1])) and all_equal(case.net, net)


@pytest.mark.parametrize("lacking", ["_options", "_form"])
def test_a_pickle_of_an_older_version_says_how_to_go_on(lacking):
    case = problem()
    curvature = ff.optim.NaturalGradient(case.net, likelihood=ff.Categorical())._curvature
    older = {name: value for name, value in curvature.__getstate__().items() if name != lacking}
    with pytest.raises(E.StructureError, match="older version.*load_state_dict"):
        curvature.__setstate__(older)


def test_the_former_place_of_the_optimizer_is_an_alias():
    assert importlib.import_module("fisherfn.optim.natural_gradient").NaturalGradient is ff.optim.NaturalGradient


def test_a_copy_trains_its_own_net_although_a_scheduler_wrapped_the_step_of_the_original():
    case = problem(steps=3)
    opt = ff.optim.NaturalGradient(case.net, likelihood=ff.Categorical(), lr=0.3)
    torch.optim.lr_scheduler.StepLR(opt, 1)
    assert "step" in vars(opt)
    opt.step(case.batches[0])
    before = copy.deepcopy(case.net.state_dict())
    for way in (copy.deepcopy, pickled):
        net, other = way((case.net, opt))
        other.step(case.batches[1])
        assert not all_equal(case.net, net)
        assert all(torch.equal(case.net.state_dict()[name], leaf) for name, leaf in before.items())
