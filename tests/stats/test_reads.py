"""Calls that look like layers, or unlike them: every Fisher and gradient is that of the definition."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherfn as ff
from fisherfn.errors import CoverageError
from fisherfn.stats.reads import changes_nothing, inside_function, values_read
from tests import oracles
from tests.layers.checks import checked_model, curved_model, kinds, normal
from tests.nets import Straight
from tests.oracles import close
from tests.zoo import sampled


def column_major(n):
    return torch.linalg.qr(normal(n, n))[0].mT.contiguous().mT


@pytest.mark.parametrize(
    ("model", "weight"),
    {
        "inverse": (lambda w, x: F.linear(x, torch.inverse(w)), normal(4, 4) + 4 * torch.eye(4)),
        "inverse on the right": (lambda w, x: x @ torch.linalg.inv(w), normal(4, 4) + 4 * torch.eye(4)),
        "exp of one number": (lambda w, x: x[:, :1] @ w.exp(), normal(1, 1)),
        "in rows again": (lambda w, x: x @ w.contiguous(), column_major(4)),
        "matrix exp": (lambda w, x: x @ torch.matrix_exp(w), column_major(4)),
    }.values(),
    ids=lambda v: None,
)
def test_a_function_of_a_weight_with_the_strides_of_its_transpose_is_not_its_transpose(model, weight):
    checked_model(lambda p, x: model(p["w"], x).tanh(), {"w": weight})


@pytest.mark.parametrize("view", [lambda w: w.T, lambda w: w.t(), lambda w: w.mT, lambda w: w.permute(1, 0)])
def test_a_transposed_weight_is_still_a_layer(view):
    assert checked_model(lambda p, x: F.linear(x, view(p["w"])), {"w": normal(4, 3)}) == {"w": "matmul"}


@pytest.mark.parametrize(
    ("options", "said"), [({"scale_grad_by_freq": True}, "counts of the indices"), ({"max_norm": 0.1}, "renormalises")]
)
def test_bags_of_embeddings_that_change_gradients_or_weights_are_refused(options, said):
    model, params, context = ff.functional(nn.Sequential(nn.EmbeddingBag(9, 4, mode="sum", **options), nn.Linear(4, 3)))
    before = params["0.weight"].clone()
    with pytest.raises(CoverageError, match=said):
        ff.natural_gradient(model, params, torch.arange(8).reshape(4, 2), likelihood=ff.Gaussian(), context=context)
    assert torch.equal(params["0.weight"], before)


SIGNAL, FOUR = normal(5, 2, 6), normal(5, 4, 6)


@pytest.mark.parametrize(
    ("call", "weight", "x", "kind"),
    [
        (lambda x, w, b: F.conv1d(x, w, b), (3, 2, 2), SIGNAL, "conv"),
        (lambda x, w, b: F.conv_transpose1d(x, w, b), (2, 3, 2), SIGNAL, "conv transpose"),
        (lambda x, w, b: F.group_norm(x[:, :3], 1, w, b), (3,), FOUR, "group norm"),
        (lambda x, w, b: F.batch_norm(x[:, :3], torch.zeros(3), torch.ones(3), w, b), (3,), FOUR.float(), "batch norm"),
    ],
    ids=["conv", "transposed conv", "group norm", "batch norm"],
)
def test_a_computed_bias_gets_the_fallback_and_the_weight_stays_a_layer(call, weight, x, kind):
    params = {"w": normal(*weight).to(x), "b": normal(3, seed=1).to(x)}
    problem = curved_model(lambda p, x: call(x, p["w"], p["b"].exp()).tanh(), params, x)
    assert kinds(sampled(problem, "type2").ng) == {"w": kind, "b": "fallback"}


class Rounded(Straight):
    """Quantisation to signs, with a rule for vmap."""

    generate_vmap_rule = True


class Product(torch.autograd.Function):
    """A linear layer with a gradient of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w):
        assert inside_function()
        return F.linear(x, w)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.mT @ x


def test_functions_with_a_derivative_of_their_own_get_the_fallback():
    """Without a transform, the trace sees the calls inside of them, and with one only the function."""
    quantised = checked_model(
        lambda p, x: F.linear(x, Rounded.apply(p["w"]), p["b"]), {"w": normal(3, 4), "b": normal(3)}
    )
    assert quantised == {"w": "fallback", "b": "elementwise"}
    custom = checked_model(lambda p, x: Product.apply(x, p["w"]) @ p["v"], {"w": normal(3, 4), "v": normal(3, 2)})
    assert custom == {"w": "fallback", "v": "matmul"}
    assert not inside_function()


@pytest.mark.parametrize(
    "model",
    [
        lambda x, w: F.linear(x, w.to(x.dtype)),
        lambda x, w: F.linear(x, w.contiguous()),
        lambda x, w: F.linear(x.type_as(w), w),
        lambda x, w: F.linear(x, w) + w.new_zeros(3) + torch.zeros_like(w)[0, 0],
    ],
    ids=["to", "contiguous", "type_as", "new_zeros"],
)
def test_a_cast_to_the_same_type_and_a_look_at_type_or_shape_are_no_other_use(model):
    assert checked_model(lambda p, x: model(x, p["w"]), {"w": normal(3, 4)}) == {"w": "linear"}


def test_what_a_call_reads():
    x, w = torch.ones(2), torch.ones(3)
    assert values_read(torch.Tensor.type_as, (x, w), {}) == ((x,), {})
    assert values_read(torch.zeros_like, (x,), {}) == ((), {})
    assert values_read(torch.add, (x, w), {"alpha": 2}) == ((x, w), {"alpha": 2})
    assert changes_nothing(torch.Tensor.to, (x, torch.float32), {})
    assert not changes_nothing(torch.Tensor.to, (x, torch.float64), {})
    assert not changes_nothing(torch.Tensor.to, (x, torch.float32, False, True), {}), "a copy"
    assert not changes_nothing(torch.Tensor.to, (x, torch.float32), {"copy": True})
    assert not changes_nothing(torch.clone, (x,), {})


@pytest.mark.parametrize("cast", [lambda p, x: p.to(x.dtype), lambda p, x: p.contiguous(), lambda p, x: p.type_as(x)])
def test_a_cast_of_a_parameter_that_all_examples_share_is_no_step(cast):
    assert checked_model(lambda p, x: x @ p["w"] + cast(p["pos"], x), {"w": normal(4, 3), "pos": normal(3)}) == {
        "w": "matmul", "pos": "elementwise",
    }  # fmt: skip


def test_a_constant_image_without_examples_is_no_transposed_convolution():
    def model(p, x):
        return (x @ p["v"]) * F.conv_transpose1d(torch.ones(2, 3, dtype=x.dtype), p["w"]).sum(1)

    assert checked_model(model, {"v": normal(4, 3), "w": normal(2, 3, 2)}) == {"v": "matmul", "w": "elementwise"}


@pytest.mark.parametrize("shape", [(3, 0), (0, 4)], ids=["no inputs", "no outputs"])
def test_a_layer_without_inputs_or_outputs_is_a_layer(shape):
    def model(p, x):
        return torch.cat([F.linear(x, p["v"]), F.linear(x[:, : shape[1]], p["w"])], 1)

    problem = curved_model(model, {"v": normal(3, 4), "w": normal(*shape)})
    run = sampled(problem, "type2", method=ff.kfac())
    close(run.ng.fisher(run.stats).dense(), oracles.fisher_matrix(problem, "type2"))
    assert kinds(run.ng) == {"v": "linear", "w": "linear"}
