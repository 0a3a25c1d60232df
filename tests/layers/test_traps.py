"""Calls that look like a layer and are none, or hide something: each must be right or refused, never silently wrong."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherfn as ff
from fisherfn.decompositions import Elementary
from tests import oracles, zoo
from tests.oracles import close


def normal(*shape, seed=0):
    return torch.randn(shape, generator=zoo.generator(seed), dtype=torch.float64)


def build(model, params, x, **kwargs):
    return ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), fisher="empirical", **kwargs)


@pytest.mark.parametrize("reverse", [False, True])
def test_batch_norm_does_not_hide_rows_in_another_order(reverse):
    """`cat([x[:, 0], x[:, 1]])` has two rows per example, positions outermost; reversed, the second half fits none."""

    def model(p, x, context):
        second = x[:, 1].flip(0) if reverse else x[:, 1]
        h = F.batch_norm(F.linear(torch.cat([x[:, 0], second]), p["w"]), None, None, training=True)
        back = h[len(x) :].flip(0) if reverse else h[len(x) :]
        return h[: len(x)] + 0.5 * back, context

    params, x, y = {"w": normal(3, 2)}, normal(4, 2, 2, seed=1), torch.tensor([0, 1, 2, 0])
    if reverse:
        with zoo.as_installed(), pytest.raises(ff.errors.CoverageError, match="couples the examples"):
            build(model, params, x, context={})
        return
    ng = build(model, params, x, context={})
    assert ng.layout.block("w").uses[0].outer == 2
    truth = torch.func.grad(lambda p: F.cross_entropy(model(p, x, {})[0], y))(params)
    close(dict(ng.stats(params, (x, y), context={}).grads), truth)


def test_batch_norm_in_training_mode_keeps_its_layers():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double().train()
    model, params, context = ff.functional(net)
    ng = build(model, params, normal(5, 3), context=context)
    assert [block.kind for block in ng.layout.blocks] == ["linear", "batch norm", "linear"]


def ema(h):
    """Return an exponential moving average along the batch."""
    rows = [h[0]]
    for row in h[1:]:
        rows.append(0.9 * rows[-1] + 0.1 * row)
    return torch.stack(rows)


ONE_WAY = {
    "sum of earlier examples": lambda h: h.cumsum(0),
    "sum of later examples": lambda h: h.flip(0).cumsum(0).flip(0),
    "the example before": lambda h: torch.cat([0 * h[:1], h[:-1]]),
    "the example after": lambda h: torch.cat([h[1:], 0 * h[:1]]),
    "moving average": ema,
}


@pytest.mark.parametrize("kind", ONE_WAY)
def test_examples_that_interact_in_one_direction_only_are_refused(kind):
    params, x = {"w": normal(3, 2)}, normal(6, 2, seed=1)

    def model(p, x):
        return ONE_WAY[kind](torch.tanh(F.linear(x, p["w"])))

    with zoo.as_installed(), pytest.raises(ff.errors.CoverageError, match="couples the examples"):
        build(model, params, x)


@pytest.mark.parametrize("batch_first", [False, True])
def test_causal_attention_along_the_batch_is_refused(batch_first):
    """The same net on `[N, T, E]`: with `batch_first=False` it attends to earlier examples."""
    net = nn.MultiheadAttention(4, 2, batch_first=batch_first).double()
    x = normal(4, 5, 4)

    def model(p, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[batch_first], dtype=x.dtype)
        return torch.func.functional_call(net, p, (x, x, x), {"attn_mask": mask, "need_weights": False})[0]

    params = {name: p.detach() for name, p in net.named_parameters()}
    if batch_first:
        assert not build(model, params, x).layout.fallbacks
        return
    with zoo.as_installed(), pytest.raises(ff.errors.CoverageError, match="batch_first"):
        build(model, params, x)


def test_trained_activations_under_vmap_over_models():
    """Five models, examples and draws: sizes for which torch's own rule under two vmaps gives wrong numbers."""
    net = nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 3)).double()
    x, y = normal(5, 3), torch.tensor([0, 1, 2, 1, 0])
    params = {name: p.detach() for name, p in net.named_parameters()}
    model = lambda p, x: torch.func.functional_call(net, p, (x,))  # noqa: E731
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), samples=5)
    noise = ng.noise((x, y), zoo.generator())
    many = {name: torch.stack([p + 0.1 * normal(*p.shape, seed=m) for m in range(5)]) for name, p in params.items()}
    dense = lambda p: ng.fisher(ng.stats(p, (x, y), noise=noise)).dense()  # noqa: E731
    together = torch.vmap(dense)(many)
    for m in range(5):
        close(together[m], dense({name: p[m] for name, p in many.items()}), tol=1e-10)


def test_a_query_that_may_attend_to_nothing_gets_nothing_as_in_torch():
    q, k, v = (normal(2, 1, 3, 4, seed=s) for s in range(3))
    mask = torch.ones(2, 1, 3, 3, dtype=torch.bool)
    mask[0] = False  # all of the first example is padding
    with Elementary():
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    close(found, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    assert torch.isfinite(found).all()

    def total(x):
        with Elementary():
            return F.scaled_dot_product_attention(x, k, v, attn_mask=mask).square().sum()

    gradient = torch.func.grad(total)(q)
    assert gradient.isfinite().all() and gradient[0].abs().max() == 0 and gradient[1].abs().max() > 0


def test_attention_in_half_precision_does_not_overflow():
    q = torch.full((1, 1, 2, 128), 30.0, dtype=torch.float16)
    with Elementary():
        found = F.scaled_dot_product_attention(q, q, q)
    assert found.isfinite().all()


def test_each_layer_keeps_its_own_precision():
    """A coarse first layer does not coarsen the gradient of a fine one."""
    net = nn.Sequential(nn.Linear(3, 4).bfloat16(), nn.Tanh())
    head = nn.Linear(4, 3)
    x, y = normal(6, 3).bfloat16(), torch.tensor([0, 1, 2, 0, 1, 2])
    params = {f"0.{n}": p.detach() for n, p in net.named_parameters()} | {
        f"1.{n}": p.detach() for n, p in head.named_parameters()
    }

    def model(p, x):
        h = torch.tanh(F.linear(x, p["0.0.weight"], p["0.0.bias"])).float()
        return F.linear(h, p["1.weight"], p["1.bias"])

    grads = build(model, params, x).stats(params, (x, y)).grads
    expected = torch.func.grad(lambda p: F.cross_entropy(model(p, x), y))(params)
    close(grads["1.weight"].double(), expected["1.weight"].double(), tol=1e-6)


def test_chunks_match_the_context_by_name():
    """The model returns its context in another order than it got it."""

    def model(p, x, context):
        out = F.linear(x, p["w"]) * context["a"] + context["b"]
        return out, {"b": context["b"], "a": context["a"]}

    params, x, y = {"w": normal(3, 2)}, normal(6, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    context = {"a": normal(3, seed=1), "b": normal(3, seed=2)}
    ng = build(model, params, x, context=context)
    whole, parts = (ng.stats(params, (x, y), context=context, chunk_size=c) for c in (None, 2))
    close(parts.loss, whole.loss)
    close(parts.context["a"], context["a"])


def test_forgotten_seeds_are_named():
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double().train()
    model, params, context = ff.functional(net)
    seeds = {"dropout": ff.dropout_seeds(4, zoo.generator())}
    ng = build(model, params, normal(4, 3), context=context | seeds)
    with zoo.as_installed(), pytest.raises(ff.errors.StructureError, match="dropout_seeds"):
        ng.stats(params, (normal(4, 3), torch.tensor([0, 1, 0, 1])), context=context)


def test_dropout_along_positions_is_refused():
    """`[T, N, d]` with T a multiple of N and of N + 1: masks would go along positions."""
    net = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5)).double().train()
    inner, params, _ = ff.functional(net)

    def model(p, x, context):
        out, context = inner(p, x.transpose(0, 1), context)
        return out.sum(0), context

    context = {"dropout": ff.dropout_seeds(2, zoo.generator())}
    with zoo.as_installed(), pytest.raises(ff.errors.ShapeError, match="alone"):
        build(model, params, normal(2, 12, 2), context=context)


def test_an_embedding_that_changes_its_weight_is_refused_before_it_does():
    weight = 5 * normal(4, 3)
    before = weight.clone()
    model = lambda p, x: F.embedding(x, p["w"], max_norm=1.0)  # noqa: E731
    with zoo.as_installed(), pytest.raises(ff.errors.CoverageError, match="max_norm"):
        build(model, {"w": weight}, torch.tensor([0, 2, 3]))
    assert torch.equal(weight, before)


def test_models_that_sample_from_the_global_generator_raise_and_do_not_advance_it():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.FractionalMaxPool2d(2, output_size=2), nn.Flatten()).double()
    model, params, context = ff.functional(net)
    before = torch.get_rng_state()
    with zoo.as_installed(), pytest.raises(ff.errors.NoiseError, match="global generator"):
        build(model, params, normal(3, 1, 8, 8), context=context)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_in_place_changes_what_it_was_given():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.drop = nn.Linear(3, 200), nn.Dropout(0.5, inplace=True)

        def forward(self, x):
            h = self.inner(x)
            self.drop(h)
            return h

    model, params, context = ff.functional(InPlace().double().train())
    outputs, _ = model(params, normal(4, 3), context | {"dropout": ff.dropout_seeds(4, zoo.generator())})
    assert 0.3 < (outputs == 0).double().mean() < 0.7


def test_one_bias_for_all_outputs_is_no_layer_bias_but_is_covered():
    params = {"w": normal(3, 2), "b": normal(1, seed=1)}
    x, y = normal(4, 2, seed=2), torch.tensor([0, 1, 2, 0])

    def model(p, x):
        return F.linear(x, p["w"], p["b"]) ** 2

    problem = zoo.Problem(model, params, x, y, ff.Categorical(), zoo.LIKELIHOODS["categorical"][1], {})
    ng = build(model, params, x)
    assert {block.key: block.kind for block in ng.layout.blocks} == {"w": "linear", "b": "fallback"}
    close(ng.fisher(ng.stats(params, (x, y))).dense(), oracles.fisher_matrix(problem, "empirical"))
