"""Dropout: a mask per example, made from the example's own seed; nothing is drawn behind anyone's back."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import fisherfn as ff
from fisherfn.randomness import random_numbers
from tests import oracles, zoo
from tests.layers.checks import kinds, normal
from tests.nets import Readout
from tests.oracles import close


def net(p=0.5, layer=nn.Dropout):
    return nn.Sequential(nn.Linear(3, 8), layer(p), nn.Tanh(), nn.Linear(8, 2)).double().train()


def build(module, x, seeds, **kwargs):
    model, params, context = ff.functional(module)
    context = {**context, "dropout": seeds}
    ng = ff.natural_gradient(
        model, params, x, likelihood=ff.Categorical(), **{"fisher": "empirical", **kwargs}, context=context
    )
    return model, params, context, ng


X, Y = normal(6, 3), torch.tensor([0, 1, 1, 0, 1, 0])


def seeds(n=6, seed=0):
    return ff.dropout_seeds(n, zoo.generator(seed))


def test_seeds_are_integers_one_an_example():
    drawn = seeds(1000)
    assert drawn.shape == (1000,) and drawn.dtype == torch.int64 and len(drawn.unique()) > 990
    assert torch.equal(drawn, seeds(1000)) and not torch.equal(drawn, seeds(1000, seed=1))


def test_equal_seeds_give_equal_results_and_others_other():
    model, params, context, _ = build(net(), X, seeds())
    before = torch.get_rng_state()
    first, again = model(params, X, context)[0], model(params, X, context)[0]
    assert torch.equal(first, again)
    other, _ = model(params, X, {**context, "dropout": seeds(seed=1)})
    assert oracles.differs(other, first, 1e-3)
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"


def test_a_mask_depends_on_its_own_seed_only():
    """Any part of the batch, in any order and company."""
    model, params, context, _ = build(net(), X, seeds())
    whole, _ = model(params, X, context)
    for part in (slice(1, 3), torch.tensor([5, 0, 3]), torch.tensor([2])):
        close(model(params, X[part], {**context, "dropout": context["dropout"][part]})[0], whole[part])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_mean_over_seeds_is_the_input(p):
    """Entries are 0 or x / (1 - p), and dropped as often as p says."""
    module = nn.Sequential(nn.Linear(3, 3), nn.Dropout(p)).double().train()
    model, params, context = ff.functional(module)
    x = X[:1].expand(4000, -1)
    dropped, _ = model(params, x, {**context, "dropout": seeds(4000)})
    full = F.linear(X[:1], params["0.weight"], params["0.bias"])
    zero, kept = dropped == 0, (dropped - full / (1 - p)).abs() < 1e-12
    assert bool((zero | kept).all())
    assert ((zero.double().mean(0) - p).abs() < 5 * (p * (1 - p) / 4000) ** 0.5).all()


def test_masks_of_entries_layers_and_examples_are_independent():
    """No two of them alike: no stripe, no layer with the mask of another."""
    layers = nn.Sequential(nn.Linear(1, 400, bias=False), nn.Dropout(0.5), nn.Dropout(0.5)).double().train()
    model, params, context = ff.functional(layers)
    params = {"0.weight": torch.ones(400, 1, dtype=torch.float64)}
    twice, _ = model(params, torch.ones(50, 1, dtype=torch.float64), {**context, "dropout": seeds(50)})
    alive = (twice > 0).double()
    assert abs(alive.mean() - 0.25) < 0.02, "the second mask is the first"
    centred = alive - 0.25
    for C in (centred @ centred.T / 400, centred.T @ centred / 50):
        off = C - C.diagonal().diag()
        assert off.abs().mean() < 0.25 * C.diagonal().mean(), "masks repeat"


@pytest.mark.parametrize("training", [False, True])
def test_no_dropout_needs_no_seeds(training):
    """p = 0, or evaluation mode."""
    module = net(0.0) if training else net().eval()
    model, params, context = ff.functional(module)
    ng = ff.natural_gradient(model, params, X, likelihood=ff.Categorical(), fisher="empirical", context=context)
    stats = ng.stats(params, (X, Y), context=context)
    close(stats.outputs, functional_call(module, params, (X,)))


def test_without_seeds_is_a_typed_error():
    model, params, context = ff.functional(net())
    with zoo.as_installed(), pytest.raises(ff.errors.NoiseError, match="dropout"):
        ff.natural_gradient(model, params, X, likelihood=ff.Categorical(), context=context)
    ng = build(net(), X, seeds())[3]
    with zoo.as_installed(), pytest.raises(ff.errors.FisherfnError, match="dropout"):
        ng.stats(params, (X, Y), context=context)


@pytest.mark.parametrize("call", [F.dropout, F.dropout1d, F.alpha_dropout, torch.dropout], ids=lambda f: f.__name__)
def test_a_model_that_draws_by_itself_is_refused(call):
    """The global generator: other masks at each call, so nothing that was measured would be of one function."""

    def model(p, x):
        h = F.linear(x, p["w"])
        return call(h, 0.5, True) if call is torch.dropout else call(h, 0.5, training=True)

    with zoo.as_installed(), pytest.raises(ff.errors.NoiseError, match="dropout"):
        ff.natural_gradient(model, {"w": normal(4, 3)}, X, likelihood=ff.Categorical())


def masked_problem(module, params, context, model, x=X, y=Y):
    """The oracle's problem: seeds travel with the inputs, as one more column."""
    seeds_ = context["dropout"]

    def joined(p, both):
        return model(p, both[:, 1:], {**context, "dropout": seeds_[both[:, 0].long()]})[0]

    both = torch.cat([torch.arange(len(x), dtype=x.dtype)[:, None], x], dim=1)
    return zoo.Problem(joined, params, both, y, ff.Categorical(), zoo.LIKELIHOODS["categorical"][1], {})


@pytest.mark.parametrize("fisher", ["type2", "empirical"])
def test_the_fisher_is_that_of_the_masked_net(fisher):
    module = net()
    model, params, context, ng = build(module, X, seeds(), fisher=fisher)
    assert set(kinds(ng).values()) == {"linear"}
    stats = ng.stats(params, (X, Y), context=context)
    problem = masked_problem(module, params, context, model)
    close(ng.fisher(stats).dense(), oracles.fisher_matrix(problem, fisher))
    close(dict(stats.grads), oracles.mean_gradient(problem))
    unmasked = zoo.Problem(
        lambda p, x: functional_call(module.eval(), p, (x,)), params, X, Y, ff.Categorical(), problem.density, {}
    )
    assert oracles.differs(ng.fisher(stats).dense(), oracles.fisher_matrix(unmasked, fisher), 1e-2)


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_chunks_slice_the_seeds(chunk_size):
    _, params, context, ng = build(net(), X, seeds())
    whole, parts = (ng.stats(params, (X, Y), context=context, chunk_size=c) for c in (None, chunk_size))
    close(parts.outputs, whole.outputs)
    close(dict(parts.grads), dict(whole.grads))
    close(ng.fisher(parts).dense(), ng.fisher(whole).dense())


class Drops(nn.Module):
    """Dropout called as a function, no module for it: in most attention code."""

    def __init__(self, call):
        super().__init__()
        self.layer, self.call = nn.Linear(4, 4), call

    def forward(self, x):
        return Readout(2)(self.call(self.layer(x), x))


CALLS = {
    "F.dropout": lambda h, x: F.dropout(h, 0.5, True),
    "in-place": lambda h, x: F.dropout(h, 0.5, True, True),
    "keywords": lambda h, x: F.dropout(training=True, input=h, p=0.5),
    "channels": lambda h, x: F.dropout1d(h, 0.5),
    "alpha": lambda h, x: F.alpha_dropout(h, 0.5, True),
    "merged": lambda h, x: F.dropout(h.flatten(0, 1), 0.5, True).unflatten(0, h.shape[:2]),
    "attention": lambda h, x: F.scaled_dot_product_attention(h, x, x, dropout_p=0.5),
    "every-position": lambda h, x: torch.stack([F.dropout(h_t, 0.5, True) for h_t in h.unbind(1)], 1),
}


@pytest.mark.parametrize("name", CALLS)
def test_dropout_called_as_a_function(name):
    """Same function of the seeds whole, in chunks and alone; the Fisher is that of this function."""
    x, y = normal(6, 3, 4), Y
    model, params, context, ng = build(Drops(CALLS[name]).double().train(), x, seeds())
    whole, parts = (ng.stats(params, (x, y), context=context, chunk_size=c) for c in (None, 4))
    close(parts.outputs, whole.outputs)
    other, _ = model(params, x, {**context, "dropout": seeds(seed=5)})
    assert oracles.differs(other, whole.outputs, 1e-3), "nothing is dropped"

    def alone(p, n):
        return model(p, x[n : n + 1], {**context, "dropout": context["dropout"][n : n + 1]})[0]

    close(whole.outputs, torch.cat([alone(params, n) for n in range(6)]))
    nll = lambda p, n: F.cross_entropy(alone(p, n), y[n : n + 1])  # noqa: E731
    U = torch.stack([oracles.vec(torch.func.grad(nll)(params, n)) for n in range(6)])
    close(ng.fisher(whole).dense(), U.T @ U / 6)
    close(ng.fisher(parts).dense(), U.T @ U / 6)


WRONG_SEEDS = {"real": torch.zeros(6), "a-matrix": torch.zeros(6, 2, dtype=torch.int64), "too-few": seeds(5)}


@pytest.mark.parametrize("kind", WRONG_SEEDS)
def test_seeds_of_another_kind_are_refused(kind):
    bad = WRONG_SEEDS[kind]
    _, params, context, ng = build(net(), X, seeds())
    with zoo.as_installed(), pytest.raises(ff.errors.FisherfnError):
        ng.stats(params, (X, Y), context={**context, "dropout": bad})


def test_a_step_takes_new_seeds_each_time():
    _, params, context, ng = build(net(), X, seeds())
    state = ng.init(params, damping=0.1)
    steps = [ng.step(params, state, (X, Y), context={**context, "dropout": seeds(seed=s)})[0] for s in (0, 0, 1)]
    close(steps[1], steps[0], tol=0.0)
    assert oracles.differs(oracles.vec(steps[2]), oracles.vec(steps[0]), 1e-3)


def test_vmap_over_seeds_is_the_loop():
    _, params, context, ng = build(net(), X, seeds())
    many = torch.stack([seeds(seed=s) for s in range(3)])

    def facts(one):
        stats = ng.stats(params, (X, Y), context={**context, "dropout": one})
        return stats.loss, stats.grads

    losses, grads = torch.vmap(facts)(many)
    for m in range(3):
        loss, grad = facts(many[m])
        close(losses[m], loss, tol=1e-10)
        close({name: leaf[m] for name, leaf in grads.items()}, dict(grad), tol=1e-10)


def test_the_batch_may_differ_in_size_from_the_trace():
    model, params, context, ng = build(net(), X[:2], seeds(2))
    full = {**context, "dropout": seeds()}
    stats = ng.stats(params, (X, Y), context=full)
    close(dict(stats.grads), oracles.mean_gradient(masked_problem(None, params, full, model)))


def test_dropout_of_whole_channels():
    """nn.Dropout2d: all of a channel or nothing of it."""
    module = nn.Sequential(nn.Conv2d(1, 40, 1), nn.Dropout2d(0.5)).double().train()
    model, params, context = ff.functional(module)
    out, _ = model(params, torch.ones(6, 1, 2, 3, dtype=torch.float64), {**context, "dropout": seeds()})
    alive = (out != 0).flatten(2)
    assert bool((alive.all(-1) | ~alive.any(-1)).all()) and 60 < alive.any(-1).sum() < 180


class Encoder(nn.Module):
    """Dropout on the attention weights, after the projections, and between the linear layers."""

    def __init__(self, batch_first):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 3, dropout=0.4, batch_first=batch_first)
        self.batch_first = batch_first

    def forward(self, x):
        out = self.layer(x) if self.batch_first else self.layer(x.transpose(0, 1)).transpose(0, 1)
        return Readout(2)(out)


@pytest.mark.parametrize("length", [3, 4, 8])
def test_examples_on_the_second_axis_keep_their_masks(length):
    """`[T, N, d]`, torch's default: also with as many positions as examples, or as seeds in another batch."""
    module = Encoder(batch_first=False).double().train()
    x, y = normal(6, length, 4), torch.tensor([0, 1, 1, 0, 1, 0])
    model, params, context, ng = build(module, x, seeds(6))
    whole, _ = model(params, x, context)
    other, _ = model(params, x, {**context, "dropout": seeds(6, seed=1)})
    assert oracles.differs(other, whole, 1e-3)
    for part in (slice(0, 1), slice(1, 5), torch.tensor([5, 0, 3]), slice(0, 2)):  # 4 and 2 examples divide 8 positions
        close(model(params, x[part], {**context, "dropout": context["dropout"][part]})[0], whole[part])
    assert "fallback" not in kinds(ng).values()
    stats = ng.stats(params, (x, y), context=context)
    close(stats.outputs, whole)
    for chunk_size in (4, 1):
        parts = ng.stats(params, (x, y), context=context, chunk_size=chunk_size)
        close(ng.fisher(parts).dense(), ng.fisher(stats).dense())


def test_both_layouts_of_a_layer_have_the_same_dropout_rates():
    """Masks of an example differ between positions, and between examples of one position."""

    class TimeFirst(nn.Module):
        def forward(self, x):
            return F.dropout(x.transpose(0, 1), 0.5).transpose(0, 1)

    model, _, context = ff.functional(nn.Sequential(TimeFirst(), nn.Dropout(0.5)).train())
    ones = torch.ones(40, 30, 20, dtype=torch.float64)
    context = {**context, "dropout": seeds(40)}
    alive = (model({}, ones, context)[0] > 0).double()
    assert abs(alive.mean() - 0.25) < 0.02, "the second mask is the first"
    for axis in range(3):
        assert alive.mean([a for a in range(3) if a != axis]).std() < 0.05, "stripes"
    rows = (model({}, ones, context)[0] > 0).double().flatten(1) - 0.25
    C = rows @ rows.T / rows.shape[1]
    assert (C - C.diagonal().diag()).abs().max() < 0.06, "two examples share their masks"


def test_where_the_examples_are_is_found_without_a_trace():
    """Finding it leaves the module, its buffers, the global generator and the modes around as they were."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.calls = nn.Linear(3, 4), nn.BatchNorm1d(4), 0

        def forward(self, x):
            self.calls += 1
            return self.norm(F.dropout(self.first(x).transpose(0, 1), 0.5).transpose(0, 1).mean(1))

    net = Net().double().train()
    model, params, context = ff.functional(net)
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    x = normal(4, 2, 3)
    _, moved = model(params, x, {**context, "dropout": seeds(4)})
    again, twice = model(params, x, {**context, "dropout": seeds(4)})
    assert net.calls == 0 and all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    close(moved, twice)
    assert int(moved["norm.num_batches_tracked"]) == 1


def test_torchs_encoder_layer_with_dropout():
    module = Encoder(batch_first=True).double().train()
    x, y = normal(4, 3, 4), torch.tensor([0, 1, 1, 0])
    model, params, context, ng = build(module, x, seeds(4))
    whole, parts = (ng.stats(params, (x, y), context=context, chunk_size=c) for c in (None, 3))
    close(parts.outputs, whole.outputs)
    alone = [model(params, x[n : n + 1], {**context, "dropout": context["dropout"][n : n + 1]})[0] for n in range(4)]
    close(whole.outputs, torch.cat(alone))


def test_a_users_own_masks_are_sliced_with_the_examples():
    """A context leaf with an axis of examples is the batch's: chunks and the trace take their part."""
    module = zoo.mlp(3, 4, 2).double()
    params = {name: p.detach() for name, p in module.named_parameters()}

    def model(p, x, context):
        h = torch.tanh(F.linear(x, p["0.weight"], p["0.bias"])) * context["mask"] * context["gain"]
        return F.linear(h, p["2.weight"], p["2.bias"]), context

    mask = (torch.rand(6, 4, generator=zoo.generator()) > 0.5).double() * 2
    context = {"mask": mask, "gain": torch.tensor(0.7, dtype=torch.float64)}
    ng = ff.natural_gradient(model, params, X, likelihood=ff.Categorical(), fisher="empirical", context=context)
    assert set(kinds(ng).values()) == {"linear"}

    def joined(p, both):
        return model(p, both[:, :3], {**context, "mask": both[:, 3:]})[0]

    density = zoo.LIKELIHOODS["categorical"][1]
    problem = zoo.Problem(joined, params, torch.cat([X, mask], dim=1), Y, ff.Categorical(), density, {})
    for chunk_size in (None, 4, 1):
        stats = ng.stats(params, (X, Y), context=context, chunk_size=chunk_size)
        close(ng.fisher(stats).dense(), oracles.fisher_matrix(problem, "empirical"))
        close(dict(stats.grads), oracles.mean_gradient(problem))


# --------------------------------------------------------------------------------------- numbers drawn by the model


def drop_path(h, p=0.4):
    """Drop paths as timm does: one number per example."""
    return h * h.new_empty((len(h),) + (1,) * (h.ndim - 1)).bernoulli_(1 - p).div_(1 - p)


def stochastic_depth(h, p=0.4):
    """Drop paths as torchvision does."""
    noise = torch.empty([len(h)] + [1] * (h.ndim - 1), dtype=h.dtype, device=h.device)
    noise = noise.bernoulli_(1 - p)
    return h * noise.div_(1 - p)


def floored(h, p=0.4):
    """Drop paths as transformers does."""
    keep = 1 - p + torch.rand((len(h), *(1,) * (h.ndim - 1)), dtype=h.dtype, device=h.device)
    return h.div(1 - p) * keep.floor_()


DRAWS = {
    "drop path": drop_path,
    "stochastic depth": stochastic_depth,
    "floored": floored,
    "rand_like": lambda h: h * torch.rand_like(h),
    "bernoulli of probabilities": lambda h: h * torch.bernoulli(h.detach().sigmoid()),
    "randn": lambda h: h + 0.1 * torch.randn(h.shape[0], h.shape[1], dtype=h.dtype),
    "randn_like": lambda h: h + 0.1 * torch.randn_like(h),
    "normal_": lambda h: h + torch.empty_like(h).normal_(0.5, std=0.1),
    "uniform_": lambda h: h * torch.empty_like(h).uniform_(0.5, 2.0),
    "second axis": lambda h: (h.T * torch.rand_like(h.T)).T,
    "second axis, drop path": lambda h: (h.T * torch.empty(1, len(h), dtype=h.dtype).bernoulli_(0.5)).T,
    "random order": lambda h: h.gather(1, torch.argsort(torch.randn(h.shape), 1)),
}


class Draws(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.inner, self.outer, self.draw = nn.Linear(3, 8), nn.Linear(8, 2), draw
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return self.outer(torch.tanh(self.draw(self.inner(x)) * self.scale))


@pytest.mark.parametrize("name", DRAWS)
def test_numbers_that_a_model_draws_are_made_from_the_examples_seeds(name):
    """Each example alone gets the numbers of the batch, and the Fisher is that of these numbers."""
    module, before = Draws(DRAWS[name]).double().train(), torch.get_rng_state()
    model, params, context, ng = build(module, X, seeds())
    whole, _ = model(params, X, context)
    other, _ = model(params, X, {**context, "dropout": seeds(seed=1)})
    assert oracles.differs(other, whole, 1e-3)
    for part in (slice(1, 3), torch.tensor([5, 0, 3]), torch.tensor([2])):
        close(model(params, X[part], {**context, "dropout": context["dropout"][part]})[0], whole[part])
    assert kinds(ng) == {"inner": "linear", "outer": "linear", "scale": "elementwise"}
    stats = ng.stats(params, (X, Y), context=context)
    problem = masked_problem(module, params, context, model)
    close(ng.fisher(stats).dense(), oracles.fisher_matrix(problem, "empirical"))
    parts = ng.stats(params, (X, Y), context=context, chunk_size=4)
    close(ng.fisher(parts).dense(), ng.fisher(stats).dense())
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"


def test_drawn_numbers_have_their_distributions():
    n = 20_000
    context = {"dropout": seeds(n)}
    draws = {
        "uniform": (lambda n: torch.rand(n), 0.5, 1 / 12**0.5),
        "range": (lambda n: torch.empty(n).uniform_(1, 3), 2.0, 2 / 12**0.5),
        "normal": (lambda n: torch.randn(n), 0.0, 1.0),
        "mean and deviation": (lambda n: torch.empty(n).normal_(2.0, 3.0), 2.0, 3.0),
        "bernoulli": (lambda n: torch.empty(n).bernoulli_(0.3), 0.3, 0.21**0.5),
    }
    for draw, mean, deviation in draws.values():

        class Alone(nn.Module):
            def forward(self, x, draw=draw):
                return draw(len(x))

        model, _, _ = ff.functional(Alone())
        numbers, _ = model({}, torch.zeros(n), context)
        assert abs(float(numbers.mean()) - mean) < 5 * deviation / n**0.5
        assert abs(float(numbers.std()) / deviation - 1) < 0.03


def test_uniform_numbers_stay_below_one_in_every_precision():
    numbers = torch.full((3,), 1 - 2.0**-32, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert (random_numbers.drawn(torch.rand, (3,), {"dtype": dtype}, lambda *_: numbers) < 1).all()


def test_without_seeds_drawn_numbers_are_refused_with_the_remedy():
    model, params, context = ff.functional(Draws(drop_path).double().train())
    with zoo.as_installed(), pytest.raises(ff.errors.NoiseError, match="bernoulli_.*dropout_seeds"):
        ff.natural_gradient(model, params, X, likelihood=ff.Categorical(), context=context)
