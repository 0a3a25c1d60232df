"""Calls that look like layers, or unlike them: every Fisher and gradient is that of the definition."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherfn as ff
from fisherfn.decompositions.elementary import cdist
from fisherfn.errors import CoverageError, ModelError, StructureError
from fisherfn.stats.probe import Probe
from fisherfn.stats.reads import changes_nothing, inside_function, values_read
from tests import oracles, zoo
from tests.layers.checks import check_fisher, check_gradients, kinds, normal
from tests.nets import Readout
from tests.oracles import close
from tests.zoo import sampled

X = normal(5, 4, seed=3)


def problem_of(model, params, x=X):
    def curved(p, x):
        return Readout(2)(model(p, x))

    return zoo.from_model(curved, params, x, "categorical", zoo.generator(), {})


def checked(model, params, x=X):
    """Return the kinds of the blocks after all checks; the layout is from other parameters."""
    problem = problem_of(model, params, x)
    run = sampled(problem, "type2")
    check_fisher(problem, run, "type2")
    check_gradients(problem, run.ng, run.stats)
    close(run.stats.loss, run.ng.loss(problem.params, problem.batch))
    return kinds(run.ng)


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
    checked(lambda p, x: model(p["w"], x).tanh(), {"w": weight})


@pytest.mark.parametrize("view", [lambda w: w.T, lambda w: w.t(), lambda w: w.mT, lambda w: w.permute(1, 0)])
def test_a_transposed_weight_is_still_a_layer(view):
    assert checked(lambda p, x: F.linear(x, view(p["w"])), {"w": normal(4, 3)}) == {"w": "matmul"}


class Scaled(nn.Module):
    """A layer whose weight is divided by its largest entry, without a gradient, before a head of zeros."""

    def __init__(self, how):
        super().__init__()
        self.how, self.a, self.b, self.head = how, nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        h = self.a(x).tanh()
        if self.how == "scaled":
            with torch.no_grad():
                scale = self.b.weight.abs().max()
            h = F.linear(h, self.b.weight / scale, self.b.bias).tanh()
        else:
            h = self.b(h - h.mean(0))
        return self.head(h)


def test_a_head_of_zeros_hides_nothing_from_the_build():
    """Behind it every gradient is zero at the start, and would confirm any block."""
    model, params, context = ff.functional(Scaled("scaled").double())
    build = {"likelihood": ff.Gaussian(), "method": ff.exact(), "fisher": "type2", "context": context}
    ng = ff.natural_gradient(model, params, X, **build)
    other = {name: p + 0.3 * normal(*p.shape, seed=n) for n, (name, p) in enumerate(params.items())}
    y = normal(5, 3, seed=9)
    found = ng.stats(other, (X, y), context=context).grads
    expected = torch.func.grad(lambda p: 0.5 * (model(p, X, context)[0] - y).square().sum() / len(X))(other)
    close({**found}, expected)
    with pytest.raises(CoverageError, match="couples the examples"):
        model, params, context = ff.functional(Scaled("centred").double())
        ff.natural_gradient(model, params, X, **{**build, "context": context})


def test_the_parameters_of_a_build_stay_the_callers():
    params = {"w": torch.zeros(4, 3, dtype=torch.float64)}
    ff.natural_gradient(lambda p, x: x @ p["w"], params, X, likelihood=ff.Gaussian())
    assert not params["w"].any()


@pytest.mark.parametrize("p", [1.0, 2.0, float("inf")])
def test_distances_of_activations(p):
    """Under a single `torch.vmap`, torch's derivative of `torch.cdist` is wrong by more than its size."""

    def model(params, x):
        h = (x @ params["a"]).tanh()
        return torch.cdist(h, h, p=p).flatten(1)

    assert checked(model, {"a": normal(4, 3)}, normal(5, 3, 4)) == {"a": "matmul"}
    a, b = normal(3, 4, seed=1), normal(5, 4, seed=2)
    with ff.decompositions.Elementary():
        found = torch.cdist(a, b, p=p)
    close(found, torch.cdist(a, b, p=p))


class Ragged(nn.Module):
    """A layer on the rows that a mask chooses, by several calls."""

    def __init__(self, how):
        super().__init__()
        self.how, self.a, self.b, self.out = how, nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.head = nn.Linear(2, 2)

    def forward(self, x, mask):
        h = self.a(x).tanh()
        z = torch.zeros_like(h)
        if self.how == "masked_select":
            rows = self.b(h.masked_select(mask.unsqueeze(-1)).view(-1, 4))
        elif self.how == "lengths":
            rows = self.b(torch.cat([h[i, :n] for i, n in enumerate(mask.sum(1).tolist())]))
        elif self.how == "heads":
            rows = self.head(h[mask].view(-1, 2, 2).flatten(0, 1)).view(-1, 4)
        else:
            rows = self.b(torch.cat([h[mask], x[mask]])).unflatten(0, (2, -1)).sum(0)
        z[mask] = rows
        return self.out(z.sum(1))


@pytest.mark.parametrize("how", ["masked_select", "lengths", "heads", "two selections"])
def test_chosen_rows_stay_chosen_through_other_calls(how):
    torch.manual_seed(0)
    net = Ragged(how).double()
    unused = (net.b if how == "heads" else net.head).requires_grad_(False)
    model, params, context = ff.functional(net)
    mask = torch.arange(5) < torch.full((6, 1), 3)
    x = normal(6, 5, 4)
    ng = ff.natural_gradient(model, params, (x, mask), likelihood=ff.Gaussian(), context=context)
    assert "rows are chosen by values" in str(ng.layout) and not unused.weight.requires_grad


class Visible(nn.Module):
    """A masked autoencoder: the same number of patches of each example."""

    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x, mask):
        rows = x[mask].reshape(len(x), -1, 4)
        return self.out(self.a(rows).tanh().sum(1))


def test_as_many_rows_of_each_example_are_a_layer():
    model, params, context = ff.functional(Visible().double())
    mask = torch.arange(5) < torch.full((6, 1), 3)
    ng = ff.natural_gradient(model, params, (normal(6, 5, 4), mask), likelihood=ff.Gaussian(), context=context)
    assert set(kinds(ng).values()) == {"linear"}


@pytest.mark.parametrize(
    ("options", "said"), [({"scale_grad_by_freq": True}, "counts of the indices"), ({"max_norm": 0.1}, "renormalises")]
)
def test_bags_of_embeddings_that_change_gradients_or_weights_are_refused(options, said):
    model, params, context = ff.functional(nn.Sequential(nn.EmbeddingBag(9, 4, mode="sum", **options), nn.Linear(4, 3)))
    before = params["0.weight"].clone()
    with pytest.raises(CoverageError, match=said):
        ff.natural_gradient(model, params, torch.arange(8).reshape(4, 2), likelihood=ff.Gaussian(), context=context)
    assert torch.equal(params["0.weight"], before)


class Changing(nn.Module):
    """A net that changes its weight while it runs."""

    def __init__(self, how):
        super().__init__()
        self.how, self.a = how, nn.Linear(4, 3)

    def forward(self, x):
        weight = self.a.weight
        if self.how == "in place":
            with torch.no_grad():
                weight.clamp_(0)
        elif self.how == "data in place":
            weight.data.clamp_(min=0)
        else:
            weight.data = F.normalize(weight.data)
        return self.a(x)


@pytest.mark.parametrize("before", [lambda w: w, lambda w: F.normalize(w.abs())], ids=["changed", "has these values"])
@pytest.mark.parametrize("how", ["in place", "data in place", "data"])
def test_a_model_that_changes_its_parameters_is_refused_and_they_are_as_before(how, before):
    model, params, context = ff.functional(Changing(how))
    params = {name: before(p) if p.ndim == 2 else p for name, p in params.items()}
    kept = {name: p.clone() for name, p in params.items()}
    with pytest.raises((StructureError, ModelError), match=r"changes (a parameter|'a.weight').* while it runs"):
        ff.natural_gradient(model, params, X.float(), likelihood=ff.Gaussian(), context=context)
    assert all(torch.equal(kept[name], p) for name, p in params.items())


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
    problem = problem_of(lambda p, x: call(x, p["w"], p["b"].exp()).tanh(), params, x)
    assert kinds(sampled(problem, "type2").ng) == {"w": kind, "b": "fallback"}


class Rounded(torch.autograd.Function):
    """Quantisation with a straight-through gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(w):
        return w.round()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g


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
    quantised = checked(lambda p, x: F.linear(x, Rounded.apply(p["w"]), p["b"]), {"w": normal(3, 4), "b": normal(3)})
    assert quantised == {"w": "fallback", "b": "elementwise"}
    custom = checked(lambda p, x: Product.apply(x, p["w"]) @ p["v"], {"w": normal(3, 4), "v": normal(3, 2)})
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
    assert checked(lambda p, x: model(x, p["w"]), {"w": normal(3, 4)}) == {"w": "linear"}


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
    assert checked(lambda p, x: x @ p["w"] + cast(p["pos"], x), {"w": normal(4, 3), "pos": normal(3)}) == {
        "w": "matmul", "pos": "elementwise",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda a, x: x[:, :3] * (1 + torch.sqrt(a + 1e-6)), (3,)),
        (lambda a, x: x @ torch.linalg.cholesky(torch.eye(4).double() - 40 * (a + a.mT)), (4, 4)),
    ],
    ids=["square root", "Cholesky"],
)
def test_zeros_on_which_a_model_depends_do_not_refuse_it(model, shape):
    """Numbers of both signs, or any at all, are outside of the domain."""
    params = {"a": torch.zeros(shape, dtype=torch.float64)}
    ng = ff.natural_gradient(lambda p, x: model(p["a"], x), params, X, likelihood=ff.Gaussian(), fisher="type2")
    assert torch.isfinite(ng.stats(params, (X, model(params["a"], X))).grads["a"]).all()


def test_a_parameter_under_two_names_stays_one():
    w = normal(4, 4)
    probe = Probe(lambda p, x: x @ p["a"] @ p["b"], {"a": w, "b": w}, X, ()).apart()
    assert probe.params["a"] is probe.params["b"] is not w


class Looped(nn.Module):
    """Nets that read a length from their inputs, and join tensors of all examples."""

    def __init__(self, how):
        super().__init__()
        self.how, self.a, self.l, self.out = how, nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x, n):
        steps, h = int(n.max()), self.a(x).tanh()
        if self.how == "recurrence":
            h = torch.stack([h[:, t] for t in range(steps)]).transpose(0, 1)
        elif self.how == "mean of two":
            h = torch.stack([h[:, :steps], 2 * h[:, :steps]]).mean(0)
        else:
            h = torch.cat([h[:, :1].transpose(0, 1), h[:, :steps].transpose(0, 1)]).transpose(0, 1)
        return self.out(self.l(h).sum(1))


@pytest.mark.parametrize("how", ["recurrence", "mean of two", "time first"])
def test_joins_along_other_axes_choose_no_rows(how):
    model, params, context = ff.functional(Looped(how).double())
    x = normal(6, 5, 4), torch.full((6,), 5)
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Gaussian(), context=context)
    assert set(kinds(ng).values()) == {"linear"}


def test_distances_of_many_vectors_come_from_products():
    """Memory for all differences would be as much again for each coordinate."""

    def model(params, x):
        return torch.cdist((x @ params["a"]).tanh(), X, p=2.0).flatten(1)

    assert checked(model, {"a": normal(4, 4)}, normal(3, 30, 4)) == {"a": "matmul"}
    a, b = normal(30, 4), normal(40, 4, seed=1)
    for mode in (None, "use_mm_for_euclid_dist", "donot_use_mm_for_euclid_dist"):
        close(cdist(a, b, compute_mode=mode), torch.cdist(a, b), tol=1e-12)
    gradient = torch.func.grad(lambda a: cdist(a, a).sum())(a)
    assert torch.isfinite(gradient).all(), "also at distance 0"


def test_a_constant_image_without_examples_is_no_transposed_convolution():
    def model(p, x):
        return (x @ p["v"]) * F.conv_transpose1d(torch.ones(2, 3, dtype=x.dtype), p["w"]).sum(1)

    assert checked(model, {"v": normal(4, 3), "w": normal(2, 3, 2)}) == {"v": "matmul", "w": "elementwise"}


@pytest.mark.parametrize("shape", [(3, 0), (0, 4)], ids=["no inputs", "no outputs"])
def test_a_layer_without_inputs_or_outputs_is_a_layer(shape):
    def model(p, x):
        return torch.cat([F.linear(x, p["v"]), F.linear(x[:, : shape[1]], p["w"])], 1)

    problem = problem_of(model, {"v": normal(3, 4), "w": normal(*shape)})
    run = sampled(problem, "type2", method=ff.kfac())
    close(run.ng.fisher(run.stats).dense(), oracles.fisher_matrix(problem, "type2"))
    assert kinds(run.ng) == {"v": "linear", "w": "linear"}
