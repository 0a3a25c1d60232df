"""Parameters that meet the batch by a broadcast: scales, shifts, tokens, tables. Per-example gradients by autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherfn as ff
from tests import oracles, zoo
from tests.layers.checks import check_chunks, check_fisher, check_gradients, kinds, normal, readout_of, same
from tests.nets import Patches, Readout
from tests.oracles import close
from tests.zoo import from_net, sampled

W = (4,)
WAYS = {
    "in place on itself": (W, lambda w, h: h * (2 * w).add_(1.0)),
    "w * h": (W, lambda w, h: w * h),
    "h * w": (W, lambda w, h: h * w),
    "h + b": (W, lambda w, h: h + w),
    "b + h": (W, lambda w, h: w + h),
    "h - b": (W, lambda w, h: h - w),
    "b - h": (W, lambda w, h: w - h),
    "h / w": (W, lambda w, h: h / (3.0 + w.square())),
    "1 / w": (W, lambda w, h: h * (1 / (3.0 + w.square()))),
    "torch.mul": (W, lambda w, h: torch.mul(input=w, other=h)),
    "add with alpha": (W, lambda w, h: torch.add(h, w, alpha=0.3)),
    "addcmul": (W, lambda w, h: torch.addcmul(h, h, w)),
    "in place": (W, lambda w, h: h.clone().mul_(w)),
    "augmented": (W, lambda w, h: plus_equal(torch.tanh(h), w)),
    "where": (W, lambda w, h: torch.where(h > 0, h, w * h)),
    "mask token": (W, lambda w, h: torch.where(h[..., :1] > 0, w, h)),
    "scalar": ((1,), lambda w, h: h * w),
    "scalar exp": ((), lambda w, h: h * w.clamp(max=4.0).exp()),
    "channels": ((3, 1), lambda w, h: h * w),
    "channels by view": ((3,), lambda w, h: w.view(1, -1, 1) * h),
    "channels by unsqueeze": ((3,), lambda w, h: w.unsqueeze(-1).unsqueeze(0) * h),
    "channels by index": ((3,), lambda w, h: h * w[:, None]),
    "transposed": ((4, 3), lambda w, h: h + w.T),
    "leading one": ((1, 3, 4), lambda w, h: h + w),
    "expand": ((1, 1, 4), lambda w, h: torch.cat([w.expand(h.shape[0], -1, -1), h], 1)),
    "expand without axis": (W, lambda w, h: torch.cat([w.expand(h.shape[0], 1, 4), h], 1)),
    "expand as": (W, lambda w, h: h * w.expand_as(h)),
    "broadcast to": (W, lambda w, h: h * torch.broadcast_to(w, h.shape)),
    "repeat": ((1, 2, 4), lambda w, h: torch.cat([w.repeat(len(h), 1, 1), h], 1)),
    "repeat merged": ((3, 4), lambda w, h: (w.repeat(len(h), 1) * h.flatten(0, 1)).unflatten(0, h.shape[:2])),
    "repeat twice": ((3, 4), lambda w, h: w.repeat(2 * len(h), 1).reshape(len(h), -1) * h.repeat(1, 2, 1).flatten(1)),
    "tile": (W, lambda w, h: h * torch.tile(w, (len(h), 3, 1))),
    "second axis": (W, lambda w, h: (h.transpose(0, 1) * w).transpose(0, 1)),
    "second axis, table": ((3, 1, 4), lambda w, h: (h.transpose(0, 1) + w).transpose(0, 1)),
    "merged rows": (W, lambda w, h: (h.flatten(0, 1) * w).unflatten(0, h.shape[:2])),
    "repeat and view": (
        (1, 3, 4),
        lambda w, h: (w.repeat(len(h), 1, 1).view(len(h) * 3, 4) * h.flatten(0, 1)).unflatten(0, h.shape[:2]),
    ),
    "windows": ((1, 2, 4), lambda w, h: (h.repeat(1, 2, 1).reshape(-1, 2, 4) + w).reshape(len(h), -1)),
    "gathered": ((5, 2), lambda w, h: h + w[torch.tensor([[0, 1], [2, 4], [1, 1]])].flatten(1)),
    "chunks": ((8,), lambda w, h: h * w.chunk(2)[0] + w.chunk(2)[1]),
    "twice": (W, lambda w, h: w * torch.tanh(h * w) + w),
    "square": (W, lambda w, h: h * (w * w)),
    "computed bias": ((2,), lambda w, h: F.linear(h, torch.eye(4).to(h), torch.cat([w, 2 * w]))),
    "scale of a norm": (W, lambda w, h: F.layer_norm(h, (4,), 1.0 + w, None)),
    "bias of a frozen weight": ((2,), lambda w, h: F.linear(h, torch.ones(2, 4).to(h), w)),
    "shift of a norm": (W, lambda w, h: F.layer_norm(h, (4,), None, w)),
    "scale of an rms norm": (W, lambda w, h: F.rms_norm(h, (4,), w.exp())),
    "PReLU": ((3,), lambda w, h: F.prelu(h, w)),
}


def plus_equal(h, w):
    h += w
    return h


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_meet_the_batch_is_exact(way):
    problem = readout_of(*reversed(WAYS[way]))
    for fisher in zoo.FISHERS:
        run = sampled(problem, fisher)
        assert kinds(run.ng) == {"w": "elementwise"}
        check_fisher(problem, run, fisher)
        check_gradients(problem, run.ng, run.stats)
    check_chunks(problem, run)


@pytest.mark.parametrize("way", ["w * h", "expand", "windows", "second axis, table"])
@pytest.mark.parametrize("traced", [1, 3, 4])
def test_as_many_examples_as_anything_else(way, traced):
    """Traced with one example, and with as many as positions or channels."""
    shape, how = WAYS[way]
    traced_with, problem = readout_of(how, shape, traced), readout_of(how, shape, 5)
    ng = traced_with.build(fisher="empirical")
    assert kinds(ng) == {"w": "elementwise"}
    stats = ng.stats(problem.params, problem.batch)
    close(ng.fisher(stats).dense(), oracles.fisher_matrix(problem, "empirical"))


OTHERWISE = {
    "written into a tensor": (W, lambda w, h: written(h, w), "__setitem__"),
    "an own transform": (W, lambda w, h: torch.vmap(lambda row: row * w)(h.flatten(0, 1)).view_as(h), "mul"),
}


def written(h, w):
    h = h.clone()
    h[:, 0] = w
    return h


@pytest.mark.parametrize("way", OTHERWISE)
def test_calls_that_do_not_broadcast_use_the_fallback_and_the_report_names_them(way):
    shape, how, cause = OTHERWISE[way]
    problem = readout_of(how, shape)
    run = sampled(problem, "type2")
    (block,) = run.ng.layout.blocks
    assert block.kind == "fallback" and f"read by {cause}" in block.why
    check_fisher(problem, run, "type2")
    check_gradients(problem, run.ng, run.stats)


def test_all_parts_of_a_hand_written_transformer():
    problem = from_net(Patches(), (3, 2, 3), "categorical", blocks={"any": ()})
    for fisher in zoo.FISHERS:
        run = sampled(problem, fisher)
        assert not run.ng.layout.fallbacks
        check_fisher(problem, run, fisher)
        check_gradients(problem, run.ng, run.stats)
        check_chunks(problem, run)


def test_memory_is_that_of_the_parameter_and_not_of_the_positions():
    """A scale over 50 positions: one number per example and entry."""
    params, x = {"w": normal(4)}, normal(3, 50, 4, seed=1)
    model = lambda p, x: Readout(2)(x * p["w"])  # noqa: E731
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), fisher="empirical")
    layer = ng.stats(params, (x, torch.tensor([0, 1, 1]))).layers["w"]
    assert layer.inputs[0].shape == (3,) and layer.grads[0].shape == (1, 3, 4)


def test_behind_a_batch_norm_in_training_mode():
    """The fallback could not: examples are coupled. The gradient is autograd's."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.scale, self.head = nn.BatchNorm1d(3), nn.Parameter(torch.ones(3)), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(torch.tanh(self.norm(x) * self.scale))

    net = Scaled().double().train()
    model, params, context = ff.functional(net)
    x, y = normal(4, 3), torch.tensor([0, 1, 1, 0])
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), fisher="empirical", context=context)
    assert kinds(ng) == {"scale": "elementwise", "norm": "batch norm", "head": "linear"}
    grads = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
    stats = ng.stats(params, (x, y), context=context)
    same(dict(stats.grads), dict(zip(dict(net.named_parameters()), grads, strict=True)))


def test_another_path_than_at_the_build_is_an_error():
    def model(p, x):
        return Readout(2)(x * p["w"] if x.sum() > 0 else x + p["w"])

    x, y = normal(3, 4).abs(), torch.tensor([0, 1, 1])
    ng = ff.natural_gradient(model, {"w": normal(4)}, x, likelihood=ff.Categorical(), fisher="empirical")
    with zoo.as_installed(), pytest.raises(ff.errors.StructureError, match="another path"):
        ng.stats({"w": normal(4)}, (-x, y))


def test_a_path_that_ends_before_that_of_the_build_is_an_error():
    """The last use of a parameter is left out: its statistics would lack it."""

    def model(p, x):
        h = x * p["w"]
        return Readout(2)(h + p["w"] if x.sum() > 0 else h)

    x, y = normal(3, 4).abs(), torch.tensor([0, 1, 1])
    ng = ff.natural_gradient(model, {"w": normal(4)}, x, likelihood=ff.Categorical(), fisher="empirical")
    ng.stats({"w": normal(4)}, (x, y))
    with zoo.as_installed(), pytest.raises(ff.errors.StructureError, match="1 calls instead of 2"):
        ng.stats({"w": normal(4)}, (-x, y))


def test_a_scale_of_a_mean_over_the_batch_does_not_hide_the_coupling():
    def model(p, x):
        h = F.linear(x, p["v"])
        return Readout(2)(h + p["w"] * h.mean(0))

    params = {"w": normal(3), "v": normal(3, 4, seed=1)}
    with zoo.as_installed(), pytest.raises(ff.errors.CoverageError, match="'v'.*couples the examples"):
        ff.natural_gradient(model, params, normal(3, 4), likelihood=ff.Categorical())


@pytest.mark.parametrize(("size", "shape"), [(256, (1, 256, 1)), (257, (257, 1, 1))])
def test_a_parameter_of_up_to_256_entries_is_one_dense_block(size, shape):
    params = {"w": normal(2, size), "s": normal(size)}
    ng = ff.natural_gradient(
        lambda p, x: F.linear(x * p["s"], p["w"]), params, normal(3, size), likelihood=ff.Gaussian(), fisher="type2"
    )
    assert ng.layout.block("s").shape == shape
