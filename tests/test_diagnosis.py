"""An error names a cause that was tested: neighbouring causes with the same symptom are told apart."""

import pytest
import torch
from torch import nn

import fisherfn as ff
from tests.nets import outside
from tests.zoo import as_installed

E = ff.errors
N, CLASSES = 16, 3


class Masked(nn.Module):
    """A policy whose forbidden actions have logits of minus infinity."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, CLASSES)

    def forward(self, x, allowed):
        return self.body(x).masked_fill(~allowed, -torch.inf)


def policy():
    x, allowed = torch.randn(N, 4), torch.ones(N, CLASSES, dtype=torch.bool)
    allowed[:, 2] = False
    return Masked(), (x, allowed)


def step(net, x, y, **more):
    opt = ff.optim.NaturalGradient(net, lr=0.1, **{"likelihood": ff.Categorical(), **more})
    with as_installed():
        return opt.step((x, y))


@pytest.mark.parametrize("fisher", ["mc", "type2", "empirical"])
def test_forbidden_classes_are_no_error(fisher):
    net, x = policy()
    assert torch.isfinite(step(net, x, torch.zeros(N).long(), fisher=fisher))
    soft = torch.tensor([0.3, 0.7, 0.0]).expand(N, CLASSES)
    assert torch.isfinite(step(net, x, soft, fisher=fisher))


@pytest.mark.parametrize("fisher", ["mc", "type2"])
def test_forbidden_classes_without_labels(fisher):
    net, x = policy()
    pre = ff.optim.Preconditioner(net, likelihood=ff.Categorical(), fisher=fisher)
    torch.nn.functional.cross_entropy(net(*x), torch.zeros(N).long()).backward()
    pre.step((x, None))
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("kind", ["index", "soft", "smoothing"])
def test_a_label_that_is_forbidden_is_an_error_of_the_labels(kind):
    net, x = policy()
    y = torch.full((N,), 2) if kind == "index" else torch.zeros(N).long()
    y = torch.full((N, CLASSES), 1 / 3) if kind == "soft" else y
    likelihood = ff.Categorical(label_smoothing=0.1 if kind == "smoothing" else 0.0)
    with pytest.raises(E.TargetError, match="minus infinity") as caught:
        step(net, x, y, likelihood=likelihood)
    assert len(str(caught.value)) < 400


def test_parameters_that_are_nan_are_not_an_error_of_the_labels():
    net, x = policy()
    opt = ff.optim.NaturalGradient(net, likelihood=ff.Categorical(), lr=0.1, example_inputs=x)
    nn.init.constant_(net.body.weight, torch.nan)
    with as_installed(), pytest.raises(E.NonFiniteError, match="diverged") as caught:
        opt.step((x, torch.zeros(N).long()))
    assert len(str(caught.value)) < 450


@pytest.mark.parametrize("drop_in", [False, True])
def test_a_mask_of_the_lowest_numbers_is_finite(drop_in):
    """Additive masks hold -3.4e38, and the sum of two such numbers is minus infinity."""

    class Added(Masked):
        def forward(self, x, mask):
            return self.body(x) + mask

    mask = torch.zeros(N, CLASSES)
    mask[:, 2] = torch.finfo(torch.float32).min
    net, x, y = Added(), (torch.randn(N, 4), mask), torch.zeros(N).long()
    if drop_in:
        assert torch.isfinite(step(net, x, y))
    model, params, context = ff.functional(net)
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), fisher="empirical", context=context)
    ff.check(ng.step(params, ng.init(params), (x, y), context=context)[2])
    mask[0, 0] = torch.inf
    with pytest.raises(E.NonFiniteError, match="inputs"):
        ff.check(ng.step(params, ng.init(params), (x, y), context=context)[2])


# ---------------------------------------------------------------------------------- coupling, or numerical noise


class Outside(nn.Module):
    """A parameter outside all layers; what follows it cancels it, or mixes the examples, or neither."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.last, self.shift = nn.Linear(4, 6), nn.Linear(6, CLASSES), nn.Parameter(torch.zeros(1))
        self.norm, self.kind = nn.BatchNorm1d(6), kind

    def forward(self, x):
        h = torch.tanh(self.first(x)) + self.shift
        if self.kind == "couples":
            h = self.norm(
                (h @ (torch.eye(h.shape[-1]).to(h) + outside(self.shift))).square()
            )  # the shift is in no layer
        if self.kind == "couples a little":
            h = h + 0.05 * h.mean(0)
        return self.last(h.softmax(-1) if self.kind == "cancels" else h) + 0 * self.norm.weight.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_a_gradient_that_is_zero_is_no_coupling(seed, dtype):
    """The parts are numerical noise in single precision, and so is their sum."""
    torch.manual_seed(seed)
    net = Outside("cancels").to(dtype).requires_grad_(True)
    net.norm.requires_grad_(False)
    x = torch.randn(N, 4, dtype=dtype)
    model, params, context = ff.functional(net)
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), context=context)
    assert [block.key for block in ng.layout.fallbacks] == ["shift"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["couples", "couples a little"])
def test_coupling_is_still_seen(kind, dtype):
    net = Outside(kind).to(dtype)
    net.norm.requires_grad_(False)
    model, params, context = ff.functional(net)
    with pytest.raises(E.CoverageError):
        ff.natural_gradient(model, params, torch.randn(N, 4, dtype=dtype), likelihood=ff.Categorical(), context=context)
