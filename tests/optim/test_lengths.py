"""Watched passes of other sequence lengths than the build: their examples, their layout, and their KL bound."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherfn as ff
from tests.optim.problems import CLASSES

LABELS = ff.Categorical()


E = ff.errors


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
