"""Nets and uses that changed numbers without a word: each is now right, or a typed error."""

import pytest
import torch
from torch import nn

import fisherfn as ff
from fisherfn.errors import CoverageError, StructureError
from fisherfn.stats.probe import Probe

N = 8


def data(width=4, length=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = (N, width) if length is None else (N, length, width)
    return torch.randn(shape, generator=g), torch.randint(0, 3, (N,), generator=g)


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
    x, y = data(length=5)
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
        opt.step((data()[0], data()[0]))


def test_parameters_in_different_parts_of_one_memory_are_two():
    whole, net = torch.randn(7, 4), nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))
    net[0].weight, net[1].weight = nn.Parameter(whole[:3]), nn.Parameter(whole[3:, :3])
    net[1].bias = nn.Parameter(whole[3:, 3])  # between the entries of the weight
    ff.functional(net)
    net[0].bias = net[1].bias = nn.Parameter(torch.zeros(3))  # one parameter under two names
    ff.functional(net)


def test_inputs_that_change_between_watch_and_step_are_refused():
    net, (x, y) = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), data()
    for change in (False, True):
        pre = ff.optim.Preconditioner(net, likelihood=ff.Categorical(), damping=0.1, example_inputs=x)
        net.zero_grad()
        with pre.watch():
            loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        if change:
            x.copy_(torch.randn_like(x))
            with pytest.raises(StructureError, match="changed in place between"):
                pre.step()
        else:
            pre.step()


def test_the_kl_bound_is_that_of_the_labels_of_this_batch():
    """After sequences of two labels, those of twenty have ten times their bound."""
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    short, long = (data(length=n)[0] for n in (2, 20))

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


def test_a_dropped_batch_is_dropped_however_its_gradients_were_erased():
    net, (x, y) = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), data()
    found = []
    for erase in (None, True, False):
        pre = ff.optim.Preconditioner(net, likelihood=ff.Categorical(), damping=0.1, example_inputs=x)
        for batch in [x] if erase is None else [3 * x, x]:
            with pre.watch():
                loss = nn.functional.cross_entropy(net(batch), y)
            loss.backward()
            if batch is not x:
                net.zero_grad(set_to_none=erase)
        pre.step()
        found.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
        net.zero_grad()
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_momentum_outlives_the_gradient_that_it_started_from():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.a = nn.Linear(4, 3), nn.Parameter(torch.ones(4, 4))

        def forward(self, x):
            return self.layer(x @ torch.linalg.matrix_exp(0.1 * self.a))

    net, (x, y) = Own(), data()
    opt = ff.optim.NaturalGradient(
        net, likelihood=ff.Categorical(), lr=0.1, damping=0.1, kl_bound=None, uncovered="gradient", example_inputs=x
    )
    with opt.watch():
        loss = nn.functional.cross_entropy(net(x), y)
    loss.backward()
    opt.step()
    before = opt.state[net.a]["momentum_buffer"].clone()
    opt.zero_grad(set_to_none=False)
    assert before.any() and torch.equal(opt.state[net.a]["momentum_buffer"], before)


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

    x, y = data()
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), fisher="type2")
    found = ng.stats(params, (x, y)).grads
    expected = torch.func.grad(lambda p: nn.functional.cross_entropy(model(p, x), y))(params)
    for name, leaf in expected.items():
        torch.testing.assert_close(found[name], leaf)


def test_sparse_gradients_are_preconditioned():
    net = nn.Sequential(nn.Embedding(6, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    x, y = torch.randint(0, 6, (N, 2), generator=torch.Generator().manual_seed(0)), data()[1]
    pre = ff.optim.Preconditioner(net, likelihood=ff.Categorical(), damping=0.1, example_inputs=x)
    with pre.watch():
        loss = nn.functional.cross_entropy(net(x), y)
    loss.backward()
    pre.step()
    assert torch.isfinite(net[0].weight.grad).all()


class Masked(nn.Module):
    """A net that applies a layer to the true tokens alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x, mask):
        h = self.a(x).tanh()
        z = torch.zeros_like(h)
        z[mask] = self.b(h[mask])
        return self.out(z.sum(1))


def masks(*counts):
    return torch.arange(5) < torch.tensor(counts)[:, None]


def test_rows_that_a_mask_selects_belong_to_their_examples():
    """Three tokens in every example look like three rows per example; the next batch has four, two, …"""
    torch.manual_seed(0)
    model, params, context = ff.functional(Masked().double())
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 5, 4, generator=g).double(), torch.randint(0, 3, (6,), generator=g)
    ng = ff.natural_gradient(
        model, params, (x, masks(*[3] * 6)), likelihood=ff.Categorical(), method=ff.exact(), fisher="type2",
        context=context,
    )  # fmt: skip
    assert "rows are chosen by values" in str(ng.layout)
    batch = (x, masks(4, 2, 3, 3, 1, 5)), y
    found = ng.fisher(ng.stats(params, batch, context=context)).dense()

    def logits(p, x, m):
        h = nn.functional.linear(x, p["a.weight"], p["a.bias"]).tanh()
        z = nn.functional.linear(h, p["b.weight"], p["b.bias"]) * m.unsqueeze(-1)
        return nn.functional.linear(z.sum(0), p["out.weight"], p["out.bias"])

    expected = 0
    for n in range(6):
        J = torch.func.jacrev(logits)(params, x[n], batch[0][1][n])
        J = torch.cat([J[name].reshape(3, -1) for name in params], 1)
        p = logits(params, x[n], batch[0][1][n]).softmax(-1)
        expected = expected + J.mT @ (torch.diag(p) - torch.outer(p, p)) @ J / 6
    torch.testing.assert_close(found, expected)


class Experts(nn.Module):
    """A mixture of experts, each on the rows that chose it."""

    def __init__(self):
        super().__init__()
        self.gate, self.out = nn.Linear(4, 3), nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        total = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            rows = (chosen == k).nonzero().squeeze(-1)
            total = total.index_add(0, rows, expert(x[rows]) * weight[rows, None])
        return self.out(total)


@pytest.mark.parametrize("seed", range(3))
def test_experts_on_the_rows_that_chose_them_train_on_any_batch(seed):
    """An expert may have no row among the examples of the build, or all of them."""
    torch.manual_seed(seed)
    opt = ff.optim.NaturalGradient(Experts(), likelihood=ff.Categorical())
    for k in range(3):
        x, y = data(seed=10 * seed + k)
        assert torch.isfinite(opt.step((x, y)))
    assert str(opt.layout).count("chosen by values") == 6


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
    (x, y), net = data(), Captured(kind)
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
    x = data(length=5)[0]
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
    ff.natural_gradient(model, params, data()[0], likelihood=ff.Categorical(), context=context)
    assert len(traces) == 2


def test_a_cache_that_the_first_run_fills_does_not_hide_layers():
    (x, _), found = data(), []
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
    x, y = data()
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


class Chosen(nn.Module):
    """A layer on rows that are chosen in one of many ways."""

    def __init__(self, kind):
        super().__init__()
        self.b, self.out, self.kind = nn.Linear(4, 4), nn.Linear(4, 3), kind
        self.register_buffer("keep", torch.tensor([True, False, True, True]))
        self.table = nn.Parameter(torch.randn(4, 4))

    def forward(self, x, mask):
        flat, rows, z = x.flatten(0, 1), mask.flatten(), torch.zeros_like(x).flatten(0, 1)
        if self.kind == "where":
            (index,) = torch.where(rows)
            z = z.index_add(0, index, self.b(flat[None, index].reshape(-1, 4)))
        elif self.kind == "tuple":
            z = z.index_put((rows,), self.b(flat[(rows,)]))
        elif self.kind == "repeats":
            counts = mask.sum(1)
            owner = torch.arange(len(x)).repeat_interleave(counts)
            z = torch.zeros_like(x[:, 0]).index_add(0, owner, self.b(x[:, 0].repeat_interleave(counts, 0)))
            return self.out(z)
        elif self.kind == "written back":
            z = z.index_put((rows,), flat[rows])
            z = self.b(z)
        elif self.kind == "inverse":
            kinds, inverse = torch.where(mask, 1, 0).flatten().unique(return_inverse=True)
            z = self.b(flat) * (1 + kinds[inverse]).unsqueeze(-1)
        elif self.kind == "buffer":
            z = self.b(flat) + self.b(self.table[self.keep]).sum(0)
        return self.out(z.reshape(x.shape).sum(1))


@pytest.mark.parametrize(
    ("kind", "selected"),
    [
        ("where", True),
        ("tuple", True),
        ("repeats", True),
        ("written back", False),
        ("inverse", False),
        ("buffer", False),
    ],
)
@pytest.mark.parametrize("count", [3, 5])
def test_only_rows_whose_choice_depends_on_the_inputs_are_selected(kind, selected, count):
    model, params, context = ff.functional(Chosen(kind))
    x = data(length=5)[0]
    ng = ff.natural_gradient(
        model, params, (x, masks(*[count] * N)), likelihood=ff.Categorical(), context=context, unused="ignore"
    )
    assert ("chosen by values" in str(ng.layout)) is selected
    assert "out" in [block.key for block in ng.layout.blocks if block.kind == "linear"]


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


def test_a_microbatch_without_gradient_counts():
    net, (x, y) = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), data()
    found = []
    for order in ((0.0, 1.0), (1.0, 0.0)):
        net.zero_grad()
        pre = ff.optim.Preconditioner(net, likelihood=ff.Categorical(), damping=0.1, example_inputs=x)
        for weight in order:
            with pre.watch():
                loss = weight * nn.functional.cross_entropy(net((2 - weight) * x), y)
            (loss / 2).backward()
        pre.step()
        found.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    torch.testing.assert_close(found[1], found[0])


def test_parameters_that_are_views_of_the_nets_own_are_no_strays():
    net, x = nn.Linear(4, 3), data()[0]
    model, _, context = ff.functional(net)
    given = {"weight": net.weight.view_as(net.weight), "bias": net.bias.unsqueeze(0)[0]}
    torch.testing.assert_close(model(given, x, context)[0], net(x))


def test_steps_take_parameters_that_are_views():
    """The members of a stack are views of it; asking a parameter for its base is no call of the model."""
    model, params, context = ff.functional(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)))
    x, y = data()
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), context=context, fisher="type2")
    views = {name: torch.stack([leaf, leaf])[1] for name, leaf in params.items()}
    found, expected = (ng.stats(p, (x, y), context=context).grads for p in (views, params))
    for name, leaf in expected.items():
        torch.testing.assert_close(found[name], leaf)
