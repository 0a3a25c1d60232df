"""Models that torch's function transforms cannot follow raise a typed error with a remedy, and the remedy works."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fisherfn as ff
from tests.nets import OldSquare, outside
from tests.zoo import as_installed

E = ff.errors
CLASSES = 3


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, CLASSES)

    def hidden(self, x):
        return torch.tanh(self.first(x))

    def forward(self, x):
        return self.last(self.hidden(x))


class Reentrant(Base):
    def hidden(self, x):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the inputs require no gradient
            return checkpoint(super().hidden, x, use_reentrant=True)


class Checkpointed(Base):
    def hidden(self, x):
        return checkpoint(super().hidden, x, use_reentrant=False)


class Square(torch.autograd.Function):
    """The remedy."""

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


class OldFunction(Base):
    def hidden(self, x):
        return OldSquare.apply(self.first(x))


class Function(Base):
    def hidden(self, x):
        return Square.apply(self.first(x))


def energy(net, x):
    return net.hidden(x).sum()


class Differentiates(Base):
    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(energy(self, x), x, create_graph=True)
        return self.last(self.hidden(x)) + slope.sum(1, keepdim=True)


class DifferentiatesItsInput(Base):
    def forward(self, x):
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(energy(self, x), x, create_graph=True)
        return self.last(self.hidden(x)) + slope.sum(1, keepdim=True)


class Nests(Base):
    """The remedy."""

    def forward(self, x):
        slope = torch.func.grad(lambda x: energy(self, x))(x)
        return self.last(self.hidden(x)) + slope.sum(1, keepdim=True)


class Backward(Base):
    def forward(self, x):
        with torch.enable_grad():
            energy(self, x).backward()
        return super().forward(x)


class Infers(Base):
    def forward(self, x):
        with torch.inference_mode():
            x = 2 * x
        return super().forward(x)


class InfersNot(Base):
    """The remedy."""

    def forward(self, x):
        with torch.no_grad():
            x = 2 * x
        return super().forward(x)


class Numpy(Base):
    def hidden(self, x):
        return super().hidden(x) * torch.from_numpy(self.first(x).detach().numpy())


class Retains(Base):
    def hidden(self, x):
        h = super().hidden(x)
        h.retain_grad()
        return h


class NoGrad(Base):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class Complex(Base):
    def forward(self, x):
        return torch.complex(super().forward(x), super().forward(x))


class Several(Base):
    def forward(self, x):
        return super().forward(x), x


def with_backward_hook():
    net = Base()
    net.last.register_full_backward_hook(lambda module, inputs, outputs: None)
    return net


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(Base())


def traced():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(torch.jit.trace(Base(), torch.ones(2, 4)))


CASES = {
    "reentrant checkpointing": (Reentrant, E.ModelError, "checkpointing off"),
    "checkpointing": (Checkpointed, E.ModelError, "checkpointing off"),
    "a function of the old form": (OldFunction, E.ModelError, "setup_context"),
    "a backward hook": (with_backward_hook, E.ModelError, "remove backward hooks"),
    "autograd.grad by a copy": (Differentiates, E.ModelError, r"torch\.func\.grad"),
    "autograd.grad": (DifferentiatesItsInput, E.ModelError, r"torch\.func\.grad"),
    "backward in the forward": (Backward, E.ModelError, r"torch\.func\.grad"),
    "inference mode": (Infers, E.ModelError, r"torch\.no_grad\(\)"),
    "numpy": (Numpy, E.ModelError, "torch operations"),
    "retain_grad": (Retains, E.ModelError, "requires_grad"),
    "no gradients": (NoGrad, E.UnusedParameterError, r"torch\.no_grad"),
    "complex outputs": (Complex, E.ShapeError, "view_as_real"),
    "complex parameters": (lambda: nn.Linear(4, 3, dtype=torch.complex64), E.StructureError, "two real ones"),
    "several outputs": (Several, E.ShapeError, "wrap the net"),
    "scripted": (scripted, E.StructureError, r"torch\.jit"),
    "traced": (traced, E.StructureError, "scripted or traced from"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(CLASSES)), E.StructureError, r"net\(x\)"),
}
WORKS = {
    "setup_context": Function,
    "torch.func.grad": Nests,
    "torch.no_grad": InfersNot,
    "a forward hook": lambda: hooked(Base()),
}


def hooked(net):
    net.first.register_forward_hook(lambda module, inputs, output: 2 * output)
    return net


def step(net, **more):
    x, y = torch.randn(8, 4), torch.randint(CLASSES, (8,))
    opt = ff.optim.NaturalGradient(net, likelihood=ff.Categorical(), lr=0.1, **more)
    return opt.step((x, y)), F.cross_entropy(net(x), y), opt


@pytest.mark.parametrize("name", CASES)
def test_errors_are_typed_short_and_name_a_remedy(name):
    make, error, remedy = CASES[name]
    with as_installed(), pytest.raises(error, match=remedy) as caught:
        step(make())
    assert len(str(caught.value)) < 400, len(str(caught.value))


@pytest.mark.parametrize("name", WORKS)
def test_the_remedy_works(name):
    net = WORKS[name]().double()
    x, y = torch.randn(8, 4).double(), torch.randint(CLASSES, (8,))
    model, params, context = ff.functional(net)
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), context=context, fisher="type2")
    found = ng.stats(params, (x, y), context=context).grads
    F.cross_entropy(net(x), y).backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-8, atol=1e-10)


def test_a_lazy_module_works_after_a_run():
    net = nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.Linear(5, CLASSES))
    net(torch.randn(2, 4))
    step(net)


def test_an_error_of_the_model_itself_passes_as_it_is():
    class Broken(Base):
        def forward(self, x):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        step(Broken())
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        step(nn.Linear(5, CLASSES))
    assert not isinstance(caught.value, E.FisherfnError)


def test_torchs_own_error_is_the_cause():
    with as_installed(), pytest.raises(E.ModelError) as caught:
        step(OldFunction())
    assert "setup_context" in str(caught.value.__cause__)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, CLASSES)
        self.scale = nn.Parameter(torch.ones(6))

    def hidden(self, x):
        return torch.tanh(self.norm(self.first(x)))

    def forward(self, x):
        return self.last(self.hidden(x) * self.scale.exp())


class NormedOutside(Normed):
    """The same with the scale outside all layers."""

    def forward(self, x):
        return self.last(self.hidden(x) @ torch.diag(outside(self.scale.exp())))


def test_a_mode_that_was_changed_after_the_build_is_named():
    net, x = NormedOutside().eval(), torch.randn(8, 4)
    opt = ff.optim.NaturalGradient(net, likelihood=ff.Categorical(), lr=0.1, example_inputs=x)
    assert [block.weight for block in opt.layout.fallbacks] == ["scale"]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.train()
    with as_installed(), pytest.raises(E.FisherfnError, match="training mode"):
        opt.step((x, torch.zeros(8).long()))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_mode_that_was_changed_after_the_build_gives_the_numbers_of_the_new_mode():
    first = Normed()
    x, y = torch.randn(8, 4), torch.randint(0, CLASSES, (8,))
    trained = []
    for mode in (False, True):
        net = copy.deepcopy(first).train(mode)
        opt = ff.optim.NaturalGradient(net, likelihood=ff.Categorical(), lr=0.1, example_inputs=x)
        assert not opt.layout.fallbacks
        net.train()
        losses = [opt.step((x, y)) for _ in range(3)]
        trained.append({**net.state_dict(), "losses": torch.stack(losses)})
    late, early = trained
    assert all(torch.equal(late[name], early[name]) for name in early)
    assert torch.allclose(early["losses"][0], F.cross_entropy(copy.deepcopy(first).train()(x), y))


def test_after_a_change_of_mode_the_gradient_is_that_of_autograd():
    net = Normed().double().eval()
    x, y, large = torch.randn(8, 4).double(), torch.randint(0, CLASSES, (8,)), 1e8
    opt = ff.optim.NaturalGradient(
        net, likelihood=ff.Categorical(), method=ff.kfac("eigen"), lr=large, momentum=0.0, kl_bound=None, damping=large,
        example_inputs=x,
    )  # fmt: skip
    net.train()
    before = [p.detach().clone() for p in net.parameters()]
    twin = copy.deepcopy(net)
    F.cross_entropy(twin(x), y).backward()
    opt.step((x, y))  # with a damping far above the curvature, a step along the gradient
    for p, old, own in zip(net.parameters(), before, twin.parameters(), strict=True):
        assert torch.allclose(old - p, own.grad, rtol=1e-3, atol=1e-6)
