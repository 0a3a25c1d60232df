"""Nets and uses that changed numbers without a word: each is now right, or a typed error."""

import pytest
import torch
from torch import nn

import fisherfn as ff
from fisherfn.errors import CoverageError, StructureError
from fisherfn.stats.probe import Probe
from tests.drawn import N, labelled


class Trimmed(nn.Module):
    """A net that drops the padding of a batch by itself."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.out = layer, nn.Linear(4, 3)

    def forward(self, x, lengths):
        return self.out(torch.tanh(self.layer(x[:, : int(lengths.max())])).sum(1))


@pytest.mark.parametrize("layer", [nn.LayerNorm(4), nn.Linear(4, 4)], ids=["norm", "linear"])
@pytest.mark.parametrize(("first", "then"), [(5, 1), (1, 3), (5, 4)])
def test_a_shape_that_follows_the_values_of_the_inputs_is_refused(layer, first, then):
    """The taps of one position were broadcast to many, or the other way round."""
    x, y = labelled(length=5)
    opt = ff.optim.NaturalGradient(Trimmed(layer), likelihood=ff.Categorical())
    opt.step(((x, torch.full((N,), first)), y))
    with pytest.raises(StructureError, match="values of the inputs change shapes"):
        opt.step(((x, torch.full((N,), then)), y))


class Transposed(nn.Module):
    """An autoencoder whose decoder is another view of the encoder's memory."""

    def __init__(self):
        super().__init__()
        self.enc, self.dec = nn.Linear(4, 3, bias=False), nn.Linear(3, 4, bias=False)
        self.dec.weight = nn.Parameter(self.enc.weight.t())

    def forward(self, x):
        return self.dec(self.enc(x).tanh())


def test_parameters_that_share_memory_are_refused():
    with pytest.raises(StructureError, match=r"'enc.weight' and 'dec.weight' share memory"):
        ff.functional(Transposed())
    opt = ff.optim.NaturalGradient(Transposed(), likelihood=ff.Gaussian())
    with pytest.raises(StructureError, match="share memory"):
        opt.step((labelled()[0], labelled()[0]))


def test_parameters_in_different_parts_of_one_memory_are_two():
    whole, net = torch.randn(7, 4), nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))
    net[0].weight, net[1].weight = nn.Parameter(whole[:3]), nn.Parameter(whole[3:, :3])
    net[1].bias = nn.Parameter(whole[3:, 3])  # between the entries of the weight
    ff.functional(net)
    net[0].bias = net[1].bias = nn.Parameter(torch.zeros(3))  # one parameter under two names
    ff.functional(net)


def test_the_kl_bound_is_that_of_the_labels_of_this_batch():
    """After sequences of two labels, those of twenty have ten times their bound."""
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    short, long = (labelled(length=n)[0] for n in (2, 20))

    def step(*batches):
        torch.manual_seed(0)
        again = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        again.load_state_dict(net.state_dict())
        opt = ff.optim.NaturalGradient(again, likelihood=ff.Categorical(), lr=1.0, damping=1e-3, momentum=0.0)
        bounds, clip = [], ff.optim.optimizer.kl_clip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                ff.optim.optimizer, "kl_clip", lambda *a, **k: bounds.append(float(k["kl_bound"])) or clip(*a, **k)
            )
            for x in batches:
                opt.step((x, torch.zeros(x.shape[:2], dtype=torch.int64)))
        return bounds

    assert step(short, long, short) == pytest.approx([0.002, 0.02, 0.002])


def test_a_gradient_that_belongs_to_no_loss_is_refused():
    net = nn.Sequential(nn.Embedding(6, 4, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(8, 3))
    model, params, context = ff.functional(net)
    x = torch.tensor([[0, 1], [2, 3], [4, 5]])
    with pytest.raises(CoverageError, match="scale_grad_by_freq"):
        ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), context=context)


@pytest.mark.parametrize("kind", ["vector", "image"])
def test_calls_of_torch_without_an_axis_of_examples_or_outputs_are_covered(kind):
    g = torch.Generator().manual_seed(0)
    if kind == "vector":
        params = {"w": torch.randn(4, generator=g), "v": torch.randn(3, 4, generator=g)}

        def model(p, x):
            return nn.functional.linear(x, p["v"]) * nn.functional.linear(x, p["w"]).unsqueeze(1)
    else:
        params = {"w": torch.randn(3, 1, 2, generator=g), "v": torch.randn(3, 4, generator=g)}

        def model(p, x):
            constant = torch.ones(1, 3)
            return nn.functional.linear(x, p["v"]) + nn.functional.conv1d(constant, p["w"]).sum(1)

    x, y = labelled()
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), fisher="type2")
    found = ng.stats(params, (x, y)).grads
    expected = torch.func.grad(lambda p: nn.functional.cross_entropy(model(p, x), y))(params)
    for name, leaf in expected.items():
        torch.testing.assert_close(found[name], leaf)


class Captured(nn.Module):
    """A net whose __init__ keeps another reference to a parameter."""

    def __init__(self, kind):
        super().__init__()
        self.a, self.w = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 6))
        self.kind = kind
        self.first, self.second = self.w.chunk(2, 1) if kind == "views" else (None, None)
        self.kept = [self.a.weight]

    def forward(self, x):
        h = self.a(x)
        assert self.kept[0].shape == (4, 4)  # reads no number
        if self.kind == "list":
            return (h @ self.w + x @ self.kept[0][:, :1])[:, :3]
        if self.kind == "views":
            return h @ self.first + h @ self.second
        return (h @ self.w)[:, :3]


@pytest.mark.parametrize(("kind", "name"), [("views", "w"), ("list", "a.weight")])
def test_parameters_that_the_forward_reads_by_another_reference_are_refused(kind, name):
    (x, y), net = labelled(), Captured(kind)
    with pytest.raises(StructureError, match=f"reads the parameter '{name}' by another reference"):
        ff.optim.NaturalGradient(net, likelihood=ff.Categorical()).step((x, y))
    model, params, context = ff.functional(net)
    with pytest.raises(StructureError, match="by another reference"):
        model(params, x, context)
    opt = ff.optim.NaturalGradient(Captured("neither"), likelihood=ff.Categorical())
    assert torch.isfinite(opt.step((x, y)))


class Rated(nn.Module):
    """Dropout on a tensor whose examples are not on the first axis."""

    def __init__(self, rate):
        super().__init__()
        self.drop, self.out = nn.Dropout(rate), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.drop(x.transpose(0, 1)).transpose(0, 1).tanh())


@pytest.mark.parametrize(("first", "then"), [(0.0, 0.5), (0.5, 0.0), (0.5, 0.25)])
def test_the_rate_of_dropout_may_change_between_steps(first, then):
    x = labelled(length=5)[0]
    net = Rated(first)
    model, params, context = ff.functional(net)
    seeds = ff.dropout_seeds(N, torch.Generator().manual_seed(1))
    model(params, x, context | {"dropout": seeds})
    net.drop.p = then
    together = model(params, x, context | {"dropout": seeds})[0]
    for n in range(N):
        alone = model(params, x[n : n + 1], context | {"dropout": seeds[n : n + 1]})[0]
        torch.testing.assert_close(alone[0], together[n])


class Cached(nn.Module):
    """A net that computes a table at its first run."""

    def __init__(self):
        super().__init__()
        self.a, self.scale, self.shift = nn.Linear(4, 3), nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
        self.tables = {}

    def forward(self, x):
        if x.shape[-1] not in self.tables:
            self.tables[x.shape[-1]] = torch.arange(3).float().cos()
        return (self.a(x) + self.tables[x.shape[-1]]) * self.scale + self.shift


def test_a_plain_net_is_traced_twice(monkeypatch):
    """Nothing else may be among the calls of the first run, such as the look for stray parameters."""
    traces, trace = [], Probe.trace
    monkeypatch.setattr(Probe, "trace", lambda self, *scout: traces.append(scout) or trace(self, *scout))
    model, params, context = ff.functional(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)))
    ff.natural_gradient(model, params, labelled()[0], likelihood=ff.Categorical(), context=context)
    assert len(traces) == 2


def test_a_cache_that_the_first_run_fills_does_not_hide_layers():
    (x, _), found = labelled(), []
    for warm in (False, True):
        net = Cached()
        if warm:
            net(x)
        model, params, context = ff.functional(net)
        ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), context=context)
        found.append({block.key: block.kind for block in ng.layout.blocks})
    assert found[0] == found[1] and "fallback" not in found[0].values()


class WithCompiled(nn.Module):
    """A net with a part that __init__ has compiled as a function."""

    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(4, 4), nn.Linear(4, 3)
        self.part = torch.compile(self._part, backend="eager")

    def _part(self, x):
        return self.a(x).tanh()

    def forward(self, x):
        return self.out(self.part(x))


def test_functions_that_the_net_has_compiled_are_seen_through():
    x, y = labelled()
    torch.manual_seed(0)
    net = WithCompiled()
    model, params, context = ff.functional(net)
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), context=context)
    assert [block.key for block in ng.layout.blocks] == ["a", "out"]
    found = ng.stats(params, (x, y), context=context, curvature=False).grads

    def loss(p):
        h = nn.functional.linear(x, p["a.weight"], p["a.bias"]).tanh()
        return nn.functional.cross_entropy(nn.functional.linear(h, p["out.weight"], p["out.bias"]), y)

    for name, leaf in torch.func.grad(loss)(params).items():
        torch.testing.assert_close(found[name], leaf)


# ------------------------------------------------------------- what the refusals must leave alone, and other spellings


def test_frozen_parameters_may_share_memory_and_scale_their_gradient():
    weight = torch.randn(6, 4)
    tables = [nn.Embedding.from_pretrained(weight) for _ in range(2)]
    tables.append(nn.Embedding.from_pretrained(weight, scale_grad_by_freq=True))

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.tables, self.out = nn.ModuleList(tables), nn.Linear(12, 3)

        def forward(self, x):
            return self.out(torch.cat([table(x) for table in self.tables], -1))

    x, y = torch.arange(6), torch.tensor([0, 1, 2, 0, 1, 2])
    assert torch.isfinite(ff.optim.NaturalGradient(Both(), likelihood=ff.Categorical()).step((x, y)))


def test_parameters_that_are_views_of_the_nets_own_are_no_strays():
    net, x = nn.Linear(4, 3), labelled()[0]
    model, _, context = ff.functional(net)
    given = {"weight": net.weight.view_as(net.weight), "bias": net.bias.unsqueeze(0)[0]}
    torch.testing.assert_close(model(given, x, context)[0], net(x))


def test_steps_take_parameters_that_are_views():
    """The members of a stack are views of it; asking a parameter for its base is no call of the model."""
    model, params, context = ff.functional(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)))
    x, y = labelled()
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), context=context, fisher="type2")
    views = {name: torch.stack([leaf, leaf])[1] for name, leaf in params.items()}
    found, expected = (ng.stats(p, (x, y), context=context).grads for p in (views, params))
    for name, leaf in expected.items():
        torch.testing.assert_close(found[name], leaf)
