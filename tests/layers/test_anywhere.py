"""Layers wherever the examples lie, and parameters in no layer: exact in any case, refused by type at worst."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherfn as ff
from tests import oracles, zoo
from tests.layers.checks import check_chunks, check_fisher, check_gradients, kinds, normal, same
from tests.nets import Block, MeanPool, Readout, outside
from tests.oracles import close
from tests.zoo import from_net, sampled


class Calls(nn.Module):
    """A layer, called as `how` says; two outputs from all that comes out."""

    def __init__(self, layer, how):
        super().__init__()
        self.layer, self.how = layer, how

    def forward(self, x):
        return Readout(2)(self.how(self.layer, x))


def merged(layer, x):
    """Examples outermost, positions in the same axis."""
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def inner(layer, x):
    """Positions outermost in the merged axis."""
    return layer(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)


def second(layer, x):
    """Examples on the second axis."""
    return layer(x.transpose(0, 1)).transpose(0, 1)


def third(layer, x):
    return layer(x.permute(1, 2, 0, 3)).permute(2, 0, 1, 3)


def both(layer, x):
    """Once as it is, once on the second axis."""
    return layer(x) + second(layer, x)


def partly(layer, x):
    """Merged, and once more for one position alone."""
    return merged(layer, x).sum(1) + layer(x[:, 0])


def halves(layer, x):
    """An encoder on the halves of a `torch.cat`."""
    left, right = torch.tanh(layer(torch.cat([x[:, 0], x[:, 1]]))).chunk(2)
    return left * right + left


def middle(layer, x):
    """Rows further out and further in than the examples, `[2, N, 3]` merged."""
    both = torch.stack([x, x.flip(1)])
    return torch.tanh(layer(both.flatten(0, 2))).unflatten(0, both.shape[:3]).sum(0)


class Scale(nn.Module):
    """A hand-written normalisation with a scale and a shift."""

    def __init__(self, width):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.w * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 0.1)) + self.b


HALVES = {
    "linear": (nn.Linear(3, 3), halves, (3, 2, 3), "linear"),
    "linear-many": (nn.Linear(3, 3), halves, (5, 2, 3), "linear"),
    "conv": (nn.Conv1d(2, 2, 2), halves, (3, 2, 2, 3), "conv"),
    "group-norm": (nn.GroupNorm(1, 2), halves, (3, 2, 2, 3), "group norm"),
    "layer-norm-sequence": (nn.LayerNorm(3), halves, (3, 2, 4, 3), "layer norm"),
    "linear-middle": (nn.Linear(2, 3), middle, (3, 3, 2), "linear"),
    "conv-middle": (nn.Conv1d(2, 2, 2), middle, (4, 3, 2, 3), "conv"),
    "conv-inner": (nn.Conv1d(2, 2, 2), inner, (3, 3, 2, 3), "conv"),
    "scale": (Scale(3), halves, (3, 2, 3), "elementwise"),
    "scale-middle": (Scale(2), middle, (3, 3, 2), "elementwise"),
}


@pytest.mark.parametrize("name", HALVES)
def test_an_encoder_on_several_parts_of_each_example_is_a_layer(name):
    """`torch.cat([a, b])` has the examples inside: their rows are told apart by the second trace."""
    layer, how, shape, kind = HALVES[name]
    problem = from_net(Calls(layer, how), shape, "categorical", blocks={"any": ()})
    for fisher in zoo.FISHERS:
        run = sampled(problem, fisher)
        assert set(kinds(run.ng).values()) == {kind}
        check_fisher(problem, run, fisher)
        check_gradients(problem, run.ng, run.stats)
        check_chunks(problem, run)


ARRANGED = {
    "conv-merged": (nn.Conv1d(2, 2, 2), merged, (3, 2, 2, 3)),
    "conv-merged-square": (nn.Conv2d(1, 2, 2), merged, (3, 3, 1, 3, 3)),
    "conv-inner": (nn.Conv1d(2, 2, 2), inner, (3, 3, 2, 3)),
    "conv-transpose-merged": (nn.ConvTranspose1d(2, 2, 2, 2), merged, (3, 2, 2, 3)),
    "conv-partly": (nn.Conv1d(2, 2, 2), partly, (3, 2, 2, 3)),
    "layer-norm-merged": (nn.LayerNorm(3), merged, (3, 2, 3)),
    "layer-norm-second": (nn.LayerNorm(3), second, (3, 2, 3)),
    "rms-norm-second-square": (nn.RMSNorm(3), second, (3, 3, 3)),
    "group-norm-merged": (nn.GroupNorm(1, 3), merged, (3, 2, 3, 2)),
    "linear-third": (nn.Linear(2, 3), third, (3, 2, 3, 2)),
    "linear-both": (nn.Linear(3, 2), both, (3, 3, 3)),
    "linear-partly": (nn.Linear(3, 2), partly, (3, 2, 3)),
    "linear-expanded": (nn.Linear(3, 2), lambda layer, x: layer(x.unsqueeze(1).expand(-1, 4, -1)), (3, 3)),
    "linear-of-all": (nn.Linear(3, 3), lambda layer, x: x * layer(torch.ones(1, 3, dtype=x.dtype)), (3, 3)),
    "conv-of-all": (nn.Conv1d(2, 2, 2), lambda layer, x: x + layer(torch.ones(1, 2, 4, dtype=x.dtype)), (3, 2, 3)),
    "channels-last": (nn.Linear(2, 3), lambda layer, x: layer(x.movedim(1, -1)).movedim(-1, 1), (3, 2, 2, 2)),
    "x @ weight.T": (nn.Linear(3, 2), lambda layer, x: x @ layer.weight.T + layer.bias, (3, 2, 3)),
    "half-a-weight": (
        nn.Linear(3, 4, bias=False),
        lambda layer, x: F.linear(x, layer.weight.chunk(2)[0]) * torch.tanh(F.linear(x, layer.weight.chunk(2)[1])),
        (3, 2, 3),
    ),
    "weight-norm": (nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 2, 2)), nn.Module.__call__, (3, 2, 3)),
    "bilinear": (nn.Bilinear(3, 3, 2), lambda layer, x: layer(x, x), (3, 3)),
    "keys-with-bias": (
        nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True),
        lambda layer, x: layer(x, x, x, need_weights=False)[0],
        (3, 3, 4),
    ),
    "decoder": (
        nn.TransformerDecoderLayer(4, 2, 3, dropout=0.0, batch_first=True),
        lambda layer, x: layer(x[:, :2], x[:, 2:]),
        (3, 4, 4),
    ),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented")
@pytest.mark.parametrize("name", ARRANGED)
def test_every_arrangement_is_exact(name):
    """Check a layer's block or the fallback, whole or in chunks."""
    layer, how, shape = ARRANGED[name]
    problem = from_net(Calls(layer, how), shape, "categorical", blocks={"any": ()})
    run = sampled(problem, "type2")
    check_fisher(problem, run, "type2")
    check_gradients(problem, run.ng, run.stats)
    check_chunks(problem, run)


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_with_a_prediction_at_every_position(tied):
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.block, self.head = nn.Embedding(5, 4), Block(4, 2, 3, True, False), nn.Linear(4, 5, False)
            if tied:
                self.head.weight = self.words.weight

        def forward(self, ids):
            return self.head(self.block(self.words(ids)))

    problem = from_net(Language(), (3, 3), "categorical", vocabulary=5, blocks={"any": ()})
    run = sampled(problem, "type2")
    assert ("tied embedding" in kinds(run.ng).values()) == tied
    assert "fallback" not in kinds(run.ng).values()
    check_fisher(problem, run, "type2")
    check_gradients(problem, run.ng, run.stats)


# ------------------------------------------------------------------------------------------- contexts and couplings


def with_context(net, x, context=None):
    model, params, buffers = ff.functional(net)
    context = buffers if context is None else context
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), fisher="empirical", context=context)
    return model, params, context, ng


@pytest.mark.parametrize("size", [4, 6])
def test_as_many_channels_as_examples_are_no_examples(size):
    """Six running means beside six examples: chunks leave them whole."""
    net = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).double().eval()
    with torch.no_grad():
        net[1].running_mean.copy_(normal(6, seed=1))
    x, y = normal(size, 3), torch.arange(size) % 2
    model, params, context, ng = with_context(net, x)

    def plain(params, x):
        return model(params, x, context)[0]

    problem = zoo.Problem(plain, params, x, y, ff.Categorical(), zoo.LIKELIHOODS["categorical"][1], {})
    for chunk_size in (None, 1, 2, 5):
        stats = ng.stats(params, (x, y), context=context, chunk_size=chunk_size)
        close(ng.fisher(stats).dense(), oracles.fisher_matrix(problem, "empirical"))
        assert all(torch.equal(stats.context[name], leaf) for name, leaf in context.items())


@pytest.mark.parametrize("size", [4, 6])
def test_a_users_gains_as_many_as_examples_are_no_examples(size):
    """A leaf `[d]` of the context where N = d."""

    def model(p, x, context):
        return F.linear(x * context["gain"], p["w"]), context

    x, y, params = normal(size, 6), torch.arange(size) % 2, {"w": normal(2, 6, seed=1)}
    context = {"gain": normal(6, seed=2)}
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), fisher="empirical", context=context)

    def plain(params, x):
        return model(params, x, context)[0]

    problem = zoo.Problem(plain, params, x, y, ff.Categorical(), zoo.LIKELIHOODS["categorical"][1], {})
    for chunk_size in (None, 1, 2, 5):
        stats = ng.stats(params, (x, y), context=context, chunk_size=chunk_size)
        close(ng.fisher(stats).dense(), oracles.fisher_matrix(problem, "empirical"))


def test_a_batch_norm_without_parameters_couples_all_the_same():
    body = [nn.Conv1d(2, 3, 2, bias=False), nn.BatchNorm1d(3, affine=False), nn.Tanh(), MeanPool()]
    net = nn.Sequential(*body, nn.Linear(3, 2)).double().train()
    x, y = normal(4, 2, 4), torch.tensor([0, 1, 1, 0])
    _, params, context, ng = with_context(net, x)
    assert kinds(ng) == {"0": "conv", "4": "linear"}
    stats = ng.stats(params, (x, y), context=context)
    grads = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
    same(dict(stats.grads), dict(zip(dict(net.named_parameters()), grads, strict=True)))


def test_a_fallback_behind_a_batch_norm_in_training_is_refused():
    """There are no per-example gradients to fall back on."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.scale, self.head = nn.BatchNorm1d(3), nn.Parameter(torch.ones(3)), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(torch.tanh(torch.einsum("ni,i->ni", self.norm(x), outside(self.scale))))

    with zoo.as_installed(), pytest.raises(ff.errors.CoverageError, match="scale"):
        with_context(Scaled().double().train(), normal(4, 3))


# ------------------------------------------------------------------------------------------ models without a vmap


def branching(p, x):
    """A branch on values that gives every example the same either way, as a padding mask that may be left out."""
    h = torch.einsum("ntd,d->ntd", x, outside(p["w"]))
    if bool((x > 0).all()):
        return Readout(2)(h)
    return Readout(2)(torch.where(x > 0, h, h * 1.0))


def writing(p, x):
    """Rows written into a tensor of the model's own."""
    h = torch.zeros(x.shape, dtype=x.dtype)
    h[..., 0] = torch.einsum("nt,t->nt", x[..., 0], p["w"][: x.shape[1]])
    return Readout(2)(h + torch.einsum("ntd,d->ntd", x, outside(p["w"])))


def numbers(p, x):
    """A length read from the values."""
    length = int((x.abs() > 0).sum() / x.numel()) + 1
    return Readout(2)(torch.einsum("ntd,d->ntd", x, outside(p["w"]))[:, : length + 1])


WITHOUT_VMAP = {"branches on values": branching, "writes into a tensor": writing, "branches on values (item)": numbers}


@pytest.mark.parametrize("name", WITHOUT_VMAP)
@pytest.mark.parametrize("method", ["kfac", "exactNG"])
def test_where_vmap_raises_the_fallback_runs_example_by_example(name, method):
    params, x = {"w": normal(3)}, normal(4, 2, 3, seed=1)
    problem = zoo.from_model(WITHOUT_VMAP[name], params, x, "categorical", zoo.generator(), {})
    for fisher in zoo.FISHERS:
        run = sampled(problem, fisher, method=method)
        assert kinds(run.ng) == {"w": "fallback"}
        check_fisher(problem, run, fisher)
        same(dict(run.stats.grads), oracles.mean_gradient(problem))
        check_chunks(problem, run)
    last = str(run.ng.layout).splitlines()[-1]
    assert name.split(" (")[0] in last and "once per example" in last and "passes" in last


def test_a_model_that_runs_under_vmap_says_nothing_of_it():
    problem = zoo.pick("scale-matrix")
    assert not problem.build().layout.one_by_one
    assert "once per example" not in str(problem.build().layout)


# ----------------------------------------------------------------------------------------------- one traced example

INNER = {
    "linear": (lambda w, flat: F.linear(flat, w), (2, 3)),
    "matmul": (lambda w, flat: flat @ w, (3, 2)),
    "embedding": (lambda w, flat: F.embedding(flat.argmax(-1), w), (3, 2)),
    "conv": (lambda w, flat: F.conv1d(flat.unsqueeze(1), w).flatten(1), (2, 1, 2)),
    "layer norm": (lambda w, flat: F.layer_norm(flat, (3,), w), (3,)),
}


@pytest.mark.parametrize("kind", INNER)
@pytest.mark.parametrize("traced", [1, 2])
def test_one_traced_example_is_enough_to_see_positions_outermost(kind, traced):
    """`[T·N, d]`: with N = 1 it looks like examples outermost, and must not be taken for it."""
    layer, shape = INNER[kind]

    def model(p, x):
        flat = x.transpose(0, 1).flatten(0, 1)
        return Readout(2)(torch.tanh(layer(p["w"], flat)).unflatten(0, (x.shape[1], len(x))).transpose(0, 1))

    params, example = {"w": normal(*shape)}, normal(traced, 2, 3, seed=1)
    ng = ff.natural_gradient(model, params, example, likelihood=ff.Categorical(), fisher="empirical")
    x, y = normal(4, 2, 3, seed=2), torch.tensor([0, 1, 1, 0])
    problem = zoo.Problem(model, params, x, y, ff.Categorical(), zoo.LIKELIHOODS["categorical"][1], {})
    close(ng.fisher(ng.stats(params, (x, y))).dense(), oracles.fisher_matrix(problem, "empirical"))


COUPLINGS = {
    "mean": lambda h: torch.tanh(h) + h.mean(0),
    "roll": lambda h: h + 0.3 * h.roll(1, 0),
    "attention": lambda h: torch.softmax(h @ h.T, -1) @ h,
}


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("layer", ["linear", "fallback"])
@pytest.mark.parametrize("traced", [1, 2, 4])
def test_one_traced_example_is_enough_to_see_a_coupling(coupling, layer, traced):
    def model(p, x):
        return COUPLINGS[coupling](F.linear(x, p["w"]) if layer == "linear" else x * p["w"][0])

    with zoo.as_installed(), pytest.raises(ff.errors.CoverageError, match="couples the examples"):
        ff.natural_gradient(model, {"w": normal(2, 3)}, normal(traced, 3, seed=1), likelihood=ff.Categorical())


UNCLAIMED = {
    "PReLU": (nn.PReLU(), (3, 2)),
    "PReLU-channels": (nn.PReLU(3), (3, 2)),
    "PReLU-no-positions": (nn.PReLU(3), (3,)),
    "PReLU-between-layers": (nn.Sequential(nn.Linear(3, 3), nn.PReLU(), nn.Linear(3, 2)), (2, 3)),
}


@pytest.mark.parametrize("name", UNCLAIMED)
@pytest.mark.parametrize("fisher", zoo.FISHERS)
def test_trained_activations_are_exact(name, fisher):
    layer, shape = UNCLAIMED[name]
    problem = from_net(nn.Sequential(layer, Readout(2)), (3, *shape), "categorical", blocks={"any": ()})
    run = sampled(problem, fisher)
    check_fisher(problem, run, fisher)
    check_gradients(problem, run.ng, run.stats)
