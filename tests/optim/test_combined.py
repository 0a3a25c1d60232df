"""Several features of the drop-in optimizer together: saving, groups, weight decay, bounds and watched losses."""

import copy

import pytest
import torch
from torch import nn

import fisherfn as ff
from tests.zoo import as_installed


def regression(**options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x = torch.randn(64, 4).double()
    opt = ff.optim.NaturalGradient(net, likelihood=ff.Gaussian(), **options)
    return net, opt, (x, x[:, :2].sin())


@pytest.mark.parametrize("how", ["loaded", "copied"])
@pytest.mark.parametrize("changed", [False, True])
def test_weights_that_were_changed_before_saving_or_copying_are_known_to_be_changed(how, changed):
    """The loss before, infinite, then undoes no update."""
    net, opt, batch = regression()
    for _ in range(3):
        opt.step(batch)
    if changed:
        with torch.no_grad():
            net[0].weight.mul_(2.0)
    if how == "copied":
        _, again = copy.deepcopy((net, opt))
    else:
        other, again, _ = regression()
        other.load_state_dict(net.state_dict()), again.load_state_dict(opt.state_dict())
    state = again.state_dict()["curvature"]["state"]
    assert bool(state["loss"].isinf()) == changed and bool(state["alive"].any()) != changed


def test_weight_decay_is_that_of_a_given_rate_whatever_the_kl_bound_leaves_of_the_step():
    for given in ({"damping": 1.0}, {"damping": "auto", "momentum": 0.0}):
        moved = []
        for decay in (0.0, 0.1):
            net, opt, batch = regression(lr=0.5, kl_bound=1e-6, weight_decay=decay, **given)
            before = [p.detach().clone() for p in net.parameters()]
            opt.step(batch)
            moved.append([p.detach().clone() for p in net.parameters()])
        for start, plain, decayed in zip(before, *moved, strict=True):
            torch.testing.assert_close(plain - decayed, 0.05 * start, rtol=1e-9, atol=1e-12)


def test_the_rate_of_a_group_that_is_not_trained_does_not_count_for_the_kl_bound():
    moved = []
    for rate in (0.1, 50.0):
        net, _, batch = regression()
        net[0].requires_grad_(False)
        groups = [{"params": net[0].parameters(), "lr": rate}, {"params": net[2].parameters()}]
        opt = ff.optim.NaturalGradient(net, groups, likelihood=ff.Gaussian(), lr=0.1, damping=0.1, kl_bound=1e-3)
        opt.step(batch)
        moved.append(net[2].weight.detach().clone())
    assert torch.equal(*moved)


def test_a_state_with_rates_is_not_loaded_where_groups_have_factors():
    _, given, batch = regression(lr=0.1)
    _, automatic, _ = regression()
    given.step(batch), automatic.step(batch)
    for one, other in ((given, automatic), (automatic, given)):
        with pytest.raises(ff.errors.StructureError, match="means something else"):
            one.load_state_dict(other.state_dict())
    old = {name: value for name, value in given.state_dict().items() if name != "auto_lr"}
    given.load_state_dict(old)  # of a version that did not say it


def test_a_watched_step_does_what_a_rejected_one_asked_for_once():
    net, opt, batch = regression(lr=0.1, damping="auto", update_every=10, invert_every=10)
    for _ in range(2):
        opt.step(batch)
    rest = opt._curvature._rest
    opt._curvature._rest = rest._replace(rejected=torch.ones_like(rest.rejected))
    inverted = []
    for _ in range(3):
        inverted.append(opt._curvature.inverts)
        opt.zero_grad()
        with opt.watch():
            loss = 0.5 * (net(batch[0]) - batch[1]).square().sum(1).mean()
        loss.backward()
        opt.step()
    assert inverted == [True, False, False]


WRONG = {
    "lr must be one number": {"lr": torch.ones(2)},
    'lr must be a number or "auto"': {"lr": [0.1]},
    "momentum is a number": {"momentum": "fast"},
    "scaler must be a torch.amp.GradScaler": {"scaler": "x"},
}


@pytest.mark.parametrize("message", WRONG)
def test_settings_of_a_wrong_kind_are_typed_errors(message):
    with as_installed(), pytest.raises(ff.FisherfnError, match=message):
        regression(**WRONG[message])


def test_what_all_groups_share_is_not_taken_from_one():
    net, opt, _ = regression()
    with pytest.raises(ff.errors.StructureError, match="all parameter groups share damping"):
        ff.optim.NaturalGradient(net, [{"params": net.parameters(), "damping": 0.1}], likelihood=ff.Gaussian())
    with as_installed(), pytest.raises(ff.FisherfnError, match="pass what state_dict"):
        opt.load_state_dict(None)
