"""A zoo of modules with side effects: a run of their pure model is one plain forward of a copy, and changes nothing."""

import copy
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fisherfn as ff
from tests.zoo import as_installed

E = ff.errors
CLASSES = 3
COMPILED = []


class Shared(nn.Module):
    """One submodule under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.again = self.first

    def forward(self, x):
        return self.last(torch.tanh(self.again(torch.tanh(self.first(x)))))


class Tied(nn.Module):
    """One tensor in two modules, once as a parameter under another name."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Assigns(nn.Module):
    """A buffer that the forward assigns, another that it changes in place, one that two names share."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, CLASSES)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("steps", torch.zeros((), dtype=torch.float64))
        self.register_buffer("alias", self.steps)

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        self.steps += 1
        return self.last(x - self.mean) * self.alias


class Grows(nn.Module):
    """A buffer that gets another shape and type."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, CLASSES)
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, x):
        self.seen = x.detach().sum(1).float()
        return self.last(x)


class Keeps(nn.Module):
    """Activations, a counter and a cache on the module."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.calls, self.cache = nn.Linear(4, 4), nn.Linear(4, CLASSES), 0, {}

    def forward(self, x):
        self.calls += 1
        self.hidden = torch.tanh(self.first(x))
        return self.last(self.hidden)


class Recurrent(nn.Module):
    """A fused layer keeps its weights in a list of its own."""

    def __init__(self):
        super().__init__()
        self.lstm, self.last = nn.LSTM(2, 5, batch_first=True), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.last(self.lstm(x.unflatten(1, (2, 2)))[0][:, -1])


class Renamed(nn.Module):
    """A submodule that the forward puts in another place, and a parameter that it replaces."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        self.head = self.last
        h = self.first(x)
        self.first.bias = nn.Parameter(torch.zeros(4, dtype=x.dtype))
        return self.head(h)


def backend(graph, inputs):
    """A compiler that does nothing but say that it was called."""
    COMPILED.append(graph)
    return graph.forward


def normed():
    return nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5, momentum=None), nn.ReLU(inplace=True), nn.Linear(5, CLASSES)
    )


def spectral():
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, CLASSES))


def parametrized():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, CLASSES))


def partly_compiled():
    return nn.Sequential(torch.compile(nn.Linear(4, 4), backend=backend), nn.Tanh(), nn.Linear(4, CLASSES))


def compiled_in_place():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES))
    net[0].compile(backend=backend)
    net.compile(backend=backend)
    return net


def hooked():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES))
    net[0].register_forward_hook(lambda module, args, output: 2 * output)
    net.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return net


ZOO = {
    "shared submodule": Shared,
    "tied tensor": Tied,
    "assigned buffer": Assigns,
    "buffer of another shape": Grows,
    "kept activations": Keeps,
    "fused recurrence": Recurrent,
    "replaced parameter": Renamed,
    "batch norm": normed,
    "spectral norm by hooks": spectral,
    "weight norm": parametrized,
    "compiled": lambda: torch.compile(Keeps(), backend=backend),
    "compiled part": partly_compiled,
    "compiled in place": compiled_in_place,
    "data parallel": lambda: nn.DataParallel(Assigns()),
    "hooks": hooked,
}


def inside(net):
    """Everything that hangs on the modules of a net, by identity."""
    tables = ("_parameters", "_buffers", "_modules")
    return {
        (path, key): {name: id(entry) for name, entry in value.items()} if key in tables else id(value)
        for path, module in net.named_modules(remove_duplicate=False)
        for key, value in vars(module).items()
        if key != "_flat_weights"
    }


def values(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


@pytest.mark.parametrize("name", ZOO)
def test_a_run_is_one_plain_forward_of_a_copy_and_changes_nothing(name):
    net, x = ZOO[name]().double(), torch.randn(6, 4).double()
    copied = copy.deepcopy(net) if "compiled" not in name else net
    before, tensors = inside(net), values(net)
    with as_installed():
        model, params, context = ff.functional(net)
        moved = {n: p + 0.1 for n, p in params.items()}  # the run must see what it is given, not what is in the net
        COMPILED.clear()
        outputs, after = model(moved, x, context)
    assert not COMPILED, "the run did not reach the module inside the compiled one"
    assert inside(net) == before
    assert all(torch.equal(tensors[n], t) for n, t in values(net).items())
    # one plain forward with the moved parameters; compiled nets are their own copy, as they are not changed by then
    with torch.no_grad():
        for p in copied.parameters():
            p += 0.1
    torch.testing.assert_close(outputs, copied(x), rtol=1e-12, atol=1e-12)
    for n, buffer in copied.named_buffers():
        torch.testing.assert_close(after[n], buffer, rtol=1e-12, atol=1e-12)


# these have parameters outside all layers, or a bias that the forward replaces: their runs are pure all the same
OUTSIDE = {"replaced parameter", "spectral norm by hooks", "weight norm"}


@pytest.mark.parametrize("name", sorted(ZOO.keys() - OUTSIDE))
def test_a_step_moves_buffers_as_one_plain_forward_does(name):
    net = ZOO[name]().double()
    x, y = torch.randn(6, 4).double(), torch.randint(CLASSES, (6,))
    copied = copy.deepcopy(net) if "compiled" not in name else None
    with as_installed():
        opt = ff.optim.NaturalGradient(net, likelihood=ff.Categorical(), lr=0.1)
        loss = opt.step((x, y))
    if copied is None:
        return
    torch.testing.assert_close(loss, F.cross_entropy(copied(x), y).detach(), rtol=1e-10, atol=1e-10)
    for (n, found), (_, buffer) in zip(net.named_buffers(), copied.named_buffers(), strict=True):
        torch.testing.assert_close(found, buffer, msg=n)
    assert not any(torch.equal(a, b) for a, b in zip(net.parameters(), copied.parameters(), strict=True))
    assert len(list(net.parameters())) == len(list(copied.parameters()))


def test_a_forward_that_raises_leaves_the_module_as_it_was():
    net = Keeps()
    before = inside(net)
    model, params, context = ff.functional(net)
    with pytest.raises(RuntimeError):
        model(params, torch.randn(6, 5), context)
    assert inside(net) == before


# ------------------------------------------------------------------------------------------------- what is refused


class Born(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.Module()
        self.norm.register_buffer("mean", None)
        self.last = nn.Linear(4, CLASSES)

    def forward(self, x):
        if self.norm.mean is None:
            self.norm.mean = x.mean(0)
        return self.last(x - self.norm.mean)


def test_a_buffer_born_in_the_first_forward_is_named_and_works_after_one():
    net, x, y = Born(), torch.randn(6, 4), torch.randint(CLASSES, (6,))
    opt = ff.optim.NaturalGradient(net, likelihood=ff.Categorical(), lr=0.1)
    with pytest.raises(E.StructureError, match=r"'norm\.mean' is made by the first forward"):
        opt.step((x, y))
    assert net.norm.mean is None
    net(x)
    opt = ff.optim.NaturalGradient(net, likelihood=ff.Categorical(), lr=0.1)
    opt.step((x, y))
    torch.testing.assert_close(net.norm.mean, x.mean(0))


def subtract(x):
    x -= 1
    return x


@pytest.mark.parametrize("kind", ["in the forward", "by a layer", "one of two", "a function"])
def test_a_model_that_changes_its_inputs_is_refused_and_they_stay(kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(4, CLASSES)

        def forward(self, x, z=None):
            if z is not None:
                return self.last(x + subtract(z))
            return self.last(F.relu_(x) if kind == "by a layer" else subtract(x))

    net, x = Net(), torch.randn(6, 4)
    inputs = (x, x.clone()) if kind == "one of two" else x
    before = copy.deepcopy(inputs)
    with as_installed(), pytest.raises(E.StructureError, match="changes its inputs in place") as caught:
        if kind == "a function":
            ff.natural_gradient(
                lambda p, x: F.linear(subtract(x), p["w"]), {"w": torch.ones(2, 4)}, x, likelihood=ff.Gaussian()
            )
        ff.optim.NaturalGradient(net, likelihood=ff.Categorical(), lr=0.1).step((inputs, torch.zeros(6).long()))
    assert len(str(caught.value)) < 400
    assert all(torch.equal(a, b) for a, b in zip(ff.tree.leaves(before), ff.tree.leaves(inputs), strict=True))


# ------------------------------------------------------------------------------------------- several inputs, outputs

Output = namedtuple("Output", ["logits", "hidden"])


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, CLASSES), nn.Linear(2, CLASSES)

    def forward(self, left=None, right=None):
        hidden = torch.tanh(self.left(left))
        return Output(hidden + self.right(right), hidden)


class TakesADict(ByName):
    def forward(self, batch):
        return super().forward(**batch)


class Passes(ByName):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("make", [ByName, TakesADict, Passes])
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_a_dict_goes_by_name_or_whole_and_logits_are_taken(make, kind):
    net, batch = make(), kind(left=torch.randn(6, 4), right=torch.randn(6, 2))
    model, params, context = ff.functional(net)
    outputs, _ = model(params, batch, context)
    torch.testing.assert_close(outputs, (net(batch) if make is TakesADict else net(**batch)).logits)
