"""Parameters that no layer covers take the plain gradient in the drop-in classes too, uncovered="gradient"."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fisherfn as ff
from tests.nets import outside
from tests.oracles import close
from tests.zoo import as_installed

E, LABELS, CLASSES = ff.errors, ff.Categorical(), 3


class Beside(nn.Module):
    """A scale that no layer covers, behind a batch norm, so that the fallback cannot serve in training mode."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 5))

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x))) * outside(self.scale))


def case():
    rng = torch.Generator().manual_seed(0)
    net = Beside().double()
    x, y = torch.randn(8, 4, generator=rng).double(), torch.randint(CLASSES, (8,), generator=rng)
    return net, x, y, torch.autograd.grad(F.cross_entropy(net(x), y), net.scale)[0]


def optimizer(net, **more):
    return ff.optim.NaturalGradient(net, likelihood=LABELS, lr=0.1, damping=0.1, momentum=0.0, kl_bound=None, **more)


def test_the_optimizers_step_of_such_a_parameter_is_gradient_descent():
    net, x, y, gradient = case()
    before = net.scale.detach().clone()
    optimizer(net, uncovered="gradient").step((x, y))
    close(net.scale.detach(), before - 0.1 * gradient)
    with as_installed(), pytest.raises(E.CoverageError, match="gradient"):
        optimizer(case()[0]).step((x, y))


def test_a_watched_pass_needs_no_fallback():
    net, x, y, gradient = case()
    before = net.scale.detach().clone()
    opt = optimizer(net, uncovered="gradient", fisher="empirical", update_every=1, invert_every=1)
    with opt.watch(x):
        loss = F.cross_entropy(net(x), y)
    loss.backward()
    opt.step()
    close(net.scale.detach(), before - 0.1 * gradient)
    assert [name for name, _ in opt.layout.uncovered] == ["scale"]


def test_a_watched_net_with_a_fallback_is_refused_with_the_remedy():
    net, x, _, _ = case()
    opt = optimizer(net.eval(), example_inputs=x)
    with as_installed(), pytest.raises(E.StructureError, match='uncovered="gradient"'), opt.watch():
        pass


def test_the_preconditioner_leaves_such_a_gradient():
    net, x, y, gradient = case()
    F.cross_entropy(net(x), y).backward()
    first = net.first.weight.grad.clone()
    ff.optim.Preconditioner(net, likelihood=LABELS, uncovered="gradient").step(x)
    close(net.scale.grad, gradient)
    assert not torch.allclose(net.first.weight.grad, first)


@pytest.mark.parametrize("settings", [{}, {"rule": "model"}, {"method": "exactNG"}], ids=str)
def test_adaptive_steps_fall_with_such_a_parameter(settings):
    net, x, y, _ = case()
    model, params, context = ff.functional(net)
    method = settings.pop("method", "kfac")
    ng = ff.natural_gradient(model, params, x, likelihood=LABELS, method=method, context=context, uncovered="gradient")
    opt, losses, start = ff.adaptive(ng, **settings), [], params["scale"]
    state, generator = opt.init(params), torch.Generator().manual_seed(0)
    for _ in range(8):
        params, state, info = opt.step(params, state, (x, y), generator=generator, context=context)
        context = info.context
        losses.append(float(info.loss))
    assert losses[-1] < 0.9 * losses[0] and not torch.equal(params["scale"], start)


def test_the_automatic_optimizer_takes_it():
    net, x, y, _ = case()
    opt = ff.optim.NaturalGradient(net, likelihood=LABELS, uncovered="gradient")
    losses = [float(opt.step((x, y))) for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("make", [ff.optim.NaturalGradient, ff.optim.Preconditioner])
def test_another_word_is_refused_at_once(make):
    with as_installed(), pytest.raises(E.UnknownNameError, match="gradient"):
        make(Beside(), likelihood=LABELS, uncovered="gradients")
