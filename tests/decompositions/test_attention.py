"""Attention and transformers: every parameter in a layer's block, however the projections are written."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherfn as ff
from fisherfn.decompositions import attention
from fisherfn.decompositions.attention import multi_head_attention
from fisherfn.stats import run
from tests import oracles, zoo
from tests.layers.checks import check, check_fisher, check_gradients, kinds, normal, same, stepped, twin
from tests.methods.protocol import at, stack
from tests.nets import Attention, Block, Conv1D, Readout, Transformer
from tests.oracles import close
from tests.zoo import from_net, sampled

# torch's fused attention has no rule for vmap and says so (the oracle's vmap, and that over models)
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented")


class Self(nn.Module):
    """nn.MultiheadAttention on one sequence."""

    def __init__(self, width=4, heads=2, **kwargs):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True, **kwargs)
        self.mask, self.weights = None, False

    def forward(self, x):
        return Readout(2)(self.attention(x, x, x, attn_mask=self.mask, need_weights=self.weights)[0])


class TimeFirst(nn.Module):
    """The default order of nn.MultiheadAttention: `[T, N, d]`."""

    def __init__(self, **kwargs):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, **kwargs)

    def forward(self, x):
        x = x.transpose(0, 1)
        return Readout(2)(self.attention(x, x, x, need_weights=False)[0].transpose(0, 1))


class Cross(nn.Module):
    """Queries from one half of the sequence, keys and values from the other, of another width where `kdim` is given."""

    def __init__(self, **kwargs):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **kwargs)
        self.other = kwargs.get("kdim", 4)

    def forward(self, x):
        memory = x[:, 2:, : self.other]
        return Readout(2)(self.attention(x[:, :2], memory, memory, need_weights=False)[0])


def masked(net, mask):
    net.mask = mask
    return net


def weighted(net):
    net.weights = True
    return net


CAUSAL = torch.triu(torch.ones(4, 4, dtype=torch.bool), 1)
ATTENTIONS = {
    "self": lambda: Self(),
    "self-no-bias": lambda: Self(bias=False),
    "self-causal": lambda: masked(Self(), CAUSAL),
    "self-float-mask": lambda: masked(Self(), torch.zeros(4, 4, dtype=torch.float64).masked_fill(CAUSAL, -1.0)),
    "self-weights-too": lambda: weighted(Self()),
    "self-evaluated": lambda: Self().eval(),
    "time-first": lambda: TimeFirst(),
    "time-first-no-bias": lambda: TimeFirst(bias=False),
    "cross": lambda: Cross(),
    "cross-no-bias": lambda: Cross(bias=False),
    "cross-other-width": lambda: Cross(kdim=3, vdim=3),
}


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("fisher", zoo.FISHERS)
def test_multihead_attention_is_covered_by_layers(name, fisher):
    """Three examples of four positions; and four, where shapes cannot tell the axes apart."""
    for size in (3, 4):
        problem = from_net(ATTENTIONS[name](), (size, 4, 4), "categorical")
        run = sampled(problem, fisher)
        check_fisher(problem, run, fisher)
        check_gradients(problem, run.ng, run.stats)
        left = {key for key, kind in kinds(run.ng).items() if kind != "linear"}
        # three weights with one bias vector between them: the vector is no weight's own
        assert left == ({"attention.in_proj_bias"} if name == "cross-other-width" else set()), str(run.ng.layout)


def test_packed_projections_are_one_linear_layer():
    """W [3d, d + 1] for queries, keys and values at once: the K-FAC step of such a layer, written out."""

    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.packed, self.out = nn.Linear(4, 12), nn.Linear(4, 4)

        def forward(self, x):
            q, k, v = (z.unflatten(-1, (2, 2)).transpose(1, 2) for z in self.packed(x).chunk(3, -1))
            return Readout(2)(self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))

    problem = from_net(Self(), (3, 4, 4), "categorical")
    names = {
        "attention.in_proj_weight": "packed.weight",
        "attention.in_proj_bias": "packed.bias",
        "attention.out_proj.weight": "out.weight",
        "attention.out_proj.bias": "out.bias",
    }
    written = twin(problem, Written(), {names[n]: p for n, p in problem.params.items()}, problem.x)
    nat, other = stepped(problem), stepped(written)
    same({names[n]: p for n, p in nat.items()}, other, tol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_with_a_linear_layer_each(causal):
    net = nn.Sequential(Attention(4, 2, causal), Readout(2))
    names = [f"0.{n}_proj" for n in ("q", "k", "v", "out")]
    check(from_net(net, (3, 3, 4), "categorical"), dict.fromkeys(names, "linear"))


def test_groups_of_queries_share_keys_and_values():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.out = nn.Linear(4, 8), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(8, 4)

        def forward(self, x):
            q, k, v = (layer(x).unflatten(-1, (-1, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return self.out(seen.transpose(1, 2).flatten(2))

    net = nn.Sequential(Grouped(), Readout(2))
    check(from_net(net, (3, 3, 4), "categorical"), dict.fromkeys(["0.q", "0.k", "0.v", "0.out"], "linear"))


def test_a_transformer_block():
    kinds_of = {"0.norm1": "layer norm", "0.norm2": "layer norm", "0.up": "linear", "0.down": "linear"}
    kinds_of |= {f"0.attention.{n}_proj": "linear" for n in ("q", "k", "v", "out")}
    problem = from_net(nn.Sequential(Block(4, 2, 3), Readout(2)), (3, 2, 4), "categorical")
    check(problem, {block.key: kinds_of[block.key] for block in problem.build().layout.blocks})


LANGUAGE = {
    **{"words": "embedding", "positions": "embedding", "norm": "layer norm", "head": "linear"},
    **{f"block.attention.{n}_proj": "linear" for n in ("q", "k", "v", "out")},
    **{f"block.{n}": "layer norm" for n in ("norm1", "norm2")},
    **{f"block.{n}": "linear" for n in ("up", "down")},
}


@pytest.mark.parametrize("causal", [False, True])
def test_a_language_model_is_exact_and_covered(causal):
    check(from_net(Transformer(causal=causal), (4, 3), "categorical", vocabulary=5), LANGUAGE, "type2")


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_language_model_takes_steps_and_vmaps(sharing):
    """Three copies of params, state and noise at once are three runs."""
    problem = from_net(Transformer(), (4, 3), "categorical", vocabulary=5)
    ng = problem.build(method=ff.kfac(sharing=sharing))
    members = [ff.tree.add(problem.params, zoo.random_tree(problem.params, m), scale=0.1) for m in range(3)]
    noises = [ng.noise(problem.batch, zoo.generator(m)) for m in range(3)]
    states = [ng.init(p, damping=d) for p, d in zip(members, (0.05, 0.5, 5.0), strict=True)]

    def two_steps(params, state, noise):
        nat, state, _ = ng.step(params, state, problem.batch, noise=noise)
        return ng.step(ff.tree.add(params, nat, scale=-0.1), state, problem.batch, noise=noise, inner=True)

    nats, _, infos = torch.vmap(two_steps)(stack(members), stack(states), torch.stack(noises))
    for m in range(3):
        nat, _, info = two_steps(members[m], states[m], noises[m])
        ff.check(info)
        assert all(bool(leaf.any()) for leaf in nat.values()) and info.inner > 0
        same(at(nats, m), nat, tol=1e-9)
        close(infos.inner[m], info.inner, tol=1e-10)


def test_positions_shared_by_all_examples_are_exact():
    """`positions(arange(T))[None]`, added to each example: no example of its own, so whatever block it gets."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.positions = nn.Embedding(5, 2), nn.Embedding(3, 2)

        def forward(self, ids):
            return Readout(2)(self.words(ids) + self.positions(torch.arange(3))[None])

    for size in (1, 3, 4):  # three examples of three positions: shapes alone would mislead
        problem = from_net(Shared(), (size, 3), "categorical", vocabulary=5)
        run = sampled(problem)
        assert kinds(run.ng)["words"] == "embedding"
        check_fisher(problem, run, "mc")
        close(dict(run.stats.grads), oracles.mean_gradient(problem))


def test_gpt_2_writes_its_linear_layers_transposed_and_merged():
    class Perceptron(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.c_fc, self.c_proj = nn.LayerNorm(4), Conv1D(3, 4), Conv1D(4, 3)

        def forward(self, x):
            return Readout(2)(x + self.c_proj(F.gelu(self.c_fc(self.norm(x)), approximate="tanh")))

    problem = from_net(Perceptron(), (3, 2, 4), "categorical")
    run = sampled(problem)
    assert kinds(run.ng) == {"norm": "layer norm", "c_fc": "matmul", "c_proj": "matmul"}
    check_fisher(problem, run, "mc")
    check_gradients(problem, run.ng, run.stats)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_torchs_encoder_layer_is_covered_by_layers(norm_first, training, batch_first):
    """Also in evaluation mode, where torch has a fused path; both orders of axes."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(
                4, 2, 3, dropout=0.0, batch_first=batch_first, norm_first=norm_first
            )

        def forward(self, x):
            return Readout(2)(self.layer(x) if batch_first else self.layer(x.transpose(0, 1)).transpose(0, 1))

    problem = from_net(Encoder().train(training), (3, 3, 4), "categorical")
    run = sampled(problem)
    assert {*kinds(run.ng).values()} == {"linear", "layer norm"}, str(run.ng.layout)
    check_fisher(problem, run, "mc")
    check_gradients(problem, run.ng, run.stats)


def test_masks_of_padding_are_inputs():
    """A tree of inputs: sequences and which of their positions to leave out."""
    net = nn.MultiheadAttention(4, 2, batch_first=True).double()
    names = dict(net.named_parameters())

    def model(p, x):
        arguments = (x["x"], x["x"], x["x"])
        keywords = {"key_padding_mask": x["left out"], "need_weights": False}
        return Readout(2)(torch.func.functional_call(net, p, arguments, keywords)[0])

    params = {n: normal(*p.shape, seed=i) / 2 for i, (n, p) in enumerate(names.items())}
    left_out = torch.tensor([[False, False, True], [False, False, False], [False, True, True], [False, False, True]])
    x, y = {"x": normal(4, 3, 4, seed=9), "left out": left_out}, torch.tensor([0, 1, 1, 0])
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), fisher="empirical")
    assert set(kinds(ng).values()) == {"linear"}
    stats = ng.stats(params, (x, y), chunk_size=3)

    def joined(p, both):
        return model(p, {"x": both[..., :4], "left out": both[..., 4] > 0})

    both = torch.cat([x["x"], left_out.double().unsqueeze(-1)], dim=-1)
    problem = zoo.Problem(joined, params, both, y, ff.Categorical(), zoo.LIKELIHOODS["categorical"][1], {})
    same(dict(stats.grads), oracles.mean_gradient(problem))
    whole = ng.stats(params, (x, y))
    close(ng.fisher(whole).dense(), oracles.fisher_matrix(problem, "empirical"))


@pytest.mark.parametrize("shared", [(0, 0, 0), (0, 1, 1), (0, 1, 0), (0, 0, 1), (0, 1, 2)])
def test_attention_without_a_batch_is_torchs(shared):
    sequences = [normal(5, 6, seed=seed) for seed in range(3)]
    query, key, value = (sequences[i] for i in shared)
    weight, bias, out = normal(18, 6, seed=3), normal(18, seed=4), normal(6, 6, seed=5)
    arguments = (query, key, value, 6, 2, weight, bias, None, None, False, 0.0, out, None)
    for got, want in zip(multi_head_attention(*arguments), F.multi_head_attention_forward(*arguments), strict=True):
        close(got, want, tol=1e-12)


def test_a_query_that_may_attend_to_nothing_gets_nothing():
    """Its output and the gradients through it are zero; all others are torch's."""
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    params = {name: normal(1, 2, 3, 4, seed=seed) for seed, name in enumerate("qkv")}

    def attention(p, mask):
        return F.scaled_dot_product_attention(p["q"], p["k"], p["v"], mask)

    found, _ = run(attention, params, mask, ())
    assert not found[..., 1, :].any()
    close(found[..., [0, 2], :], attention(params, mask)[..., [0, 2], :])
    gradients = torch.func.grad(lambda p: run(attention, p, mask, ())[0].square().sum())(params)
    assert not gradients["q"][..., 1, :].any() and all(g.isfinite().all() for g in gradients.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_query_that_may_attend_to_no_key_gets_zeros_and_a_finite_mask_stays_finite(dtype):
    q, v = torch.full((1, 3, 4), 16.0, dtype=dtype), torch.ones(1, 5, 4, dtype=dtype)
    mask = torch.zeros(3, 5, dtype=dtype)
    mask[0], mask[1, 2:] = -math.inf, -math.inf
    mask[2] = torch.finfo(dtype).min  # minus a score of 512 it is infinite in float16
    expected = F.scaled_dot_product_attention(q, -16 * v, v, mask)
    assert not expected[0, 0].any() and expected[0, 1:].all()
    torch.testing.assert_close(attention.scaled_dot_product_attention(q, -16 * v, v, mask), expected)


@pytest.mark.parametrize("kind", ["true means attend", "added to the scores"])
def test_a_mask_beside_the_causal_one_is_applied_too(kind):
    """The kernel for whole matrices refuses both; torch's fused one, which runs by default, applies both."""
    q, mask = normal(2, 1, 5, 4), normal(5, 5, seed=1)
    if kind == "true means attend":
        mask = (mask > 0) | torch.eye(5, dtype=torch.bool)
    found = attention.scaled_dot_product_attention(q, q, q, mask, is_causal=True)
    both = mask & torch.ones(5, 5, dtype=torch.bool).tril() if mask.dtype == torch.bool else mask.tril()
    scores = q @ q.mT / 2
    scores = scores.masked_fill(~both, -torch.inf) if mask.dtype == torch.bool else scores + both
    scores = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf)
    close(found, scores.softmax(-1) @ q)
