"""Convolutions: drawn over everything that torch lets vary, and the identities that tie them to linear layers."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fisherfn as ff
from tests import oracles, strategies, zoo
from tests.layers import unit_weights
from tests.layers.checks import (
    apart_params,
    check,
    check_gradients,
    dense,
    exact_blocks,
    kfac_matrix,
    kinds,
    normal,
    stepped,
    twin,
)
from tests.nets import MeanPool, Readout, Separate, Swap
from tests.oracles import close, vec
from tests.zoo import from_net, sampled

# torch pads an even kernel unevenly, and says so
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


@pytest.mark.parametrize("dims", [1, 2, 3])
@given(data=st.data(), fisher=strategies.fishers(), options=strategies.kfac_options())
def test_drawn_convolutions_are_exact(dims, data, fisher, options):
    check(data.draw(strategies.read_out(strategies.convolutions(dims))), {"0": "conv"}, fisher, **options)


CORNERS = {
    "same-even-kernel": (nn.Conv2d(1, 2, (2, 3), padding="same"), (1, 3, 2)),
    "same-dilated": (nn.Conv1d(2, 1, 4, padding="same", dilation=3), (2, 5)),
    "same-circular": (nn.Conv2d(1, 1, (2, 2), padding="same", padding_mode="circular"), (1, 2, 3)),
    "same-reflect": (nn.Conv1d(1, 2, 4, padding="same", padding_mode="reflect"), (1, 4)),
    "valid": (nn.Conv2d(2, 1, 2, padding="valid", stride=2), (2, 5, 4)),
    "padding-beyond-the-input": (nn.Conv1d(1, 2, 2, padding=4), (1, 2)),
    "stride-leaves-a-rest": (nn.Conv1d(1, 1, 2, stride=3), (1, 6)),
    "kernel-1-stride-2": (nn.Conv2d(2, 2, 1, stride=2), (2, 3, 4)),
    "depthwise": (nn.Conv2d(3, 3, 2, groups=3), (3, 3, 3)),
    "depthwise-multiplier": (nn.Conv1d(2, 6, 2, groups=2, bias=False), (2, 4)),
    "replicate-3d": (nn.Conv3d(2, 2, 2, padding=(0, 1, 2), padding_mode="replicate", groups=2), (2, 2, 2, 1)),
    "int-padding": (nn.Conv2d(1, 1, (1, 2), padding=1, dilation=2), (1, 2, 3)),
}


@pytest.mark.parametrize("corner", CORNERS)
def test_corners_are_exact(corner):
    layer, shape = CORNERS[corner]
    check(from_net(nn.Sequential(layer, Readout(2)), (3, *shape), "categorical"), {"0": "conv"})


CALLS = {
    "F.conv1d": (lambda p, x: F.conv1d(x, p["w"], p["b"]), (2, 1, 2), (1, 4)),
    "torch.conv1d": (lambda p, x: torch.conv1d(x, p["w"], p["b"], 2), (2, 1, 2), (1, 4)),
    "keywords": (
        lambda p, x: F.conv2d(weight=p["w"], groups=2, input=x, bias=p["b"], padding=(1, 0), stride=2),
        *((2, 1, 2, 2), (2, 3, 3)),
    ),
    "list": (lambda p, x: F.conv2d(x, p["w"], p["b"], [1, 2], [1, 0], [2, 1]), (2, 1, 2, 2), (1, 3, 3)),
    "torch.conv2d-same": (lambda p, x: torch.conv2d(x, p["w"], p["b"], padding="same"), (2, 1, 3, 3), (1, 3, 2)),
    "F.conv3d": (lambda p, x: F.conv3d(x, p["w"], p["b"], dilation=2), (2, 1, 2, 1, 1), (1, 3, 1, 2)),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_way_to_call_a_convolution(call):
    """No module: the functional with its arguments in any form."""
    function, weight, shape = CALLS[call]
    params = {"w": normal(*weight), "b": normal(weight[0], seed=1)}

    def model(params, x):
        return Readout(2)(function(params, x))

    problem = zoo.from_model(model, params, normal(3, *shape, seed=2), "categorical", zoo.generator(), {})
    check(problem, {"w": "conv"})


def test_the_matrix_is_the_weight_row_major_with_the_bias_as_last_column():
    layer = nn.Conv2d(4, 6, (2, 3), groups=2)
    problem = from_net(nn.Sequential(layer, Readout(2)), (2, 4, 3, 4), "gaussian")
    ng = problem.build()
    W, b = problem.params["0.weight"], problem.params["0.bias"]
    expected = torch.cat([W.reshape(2, 3, -1), b.reshape(2, 3, 1)], dim=-1)
    close(ng.layout.matrices(problem.params)["0"], expected)
    tap = sampled(problem, samples=3).stats.tap("0")
    assert tap.a.shape == (2, 2, 4, 13) and tap.g.shape == (2, 3, 2, 4, 3)


def test_rows_are_torchs_unfold():
    problem = from_net(nn.Sequential(nn.Conv2d(2, 3, (2, 3), 2, 1, bias=False), Readout(2)), (2, 2, 3, 4), "gaussian")
    rows = F.unfold(problem.x, (2, 3), stride=2, padding=1).mT
    close(sampled(problem).stats.tap("0").a, rows[None])


# ------------------------------------------------------------------------------------------- partly trained, reused


@pytest.mark.parametrize(
    ("frozen", "expected"), [("0.bias", {"0": "conv"}), ("0.weight", {"0.bias": "copied"})], ids=["bias", "weight"]
)
def test_partly_frozen_convolutions_are_exact(frozen, expected):
    net = nn.Sequential(nn.Conv1d(2, 2, 2, groups=2), Readout(2))
    run = check_partly(from_net(net, (3, 2, 4), "categorical", trained=lambda name: name != frozen))
    assert kinds(run.ng) == expected


def check_partly(problem):
    run = sampled(problem, "type2")
    close(run.ng.fisher(run.stats).dense(), oracles.fisher_matrix(problem, "type2"))
    close(dict(run.stats.grads), oracles.mean_gradient(problem))
    return run


def test_a_convolution_used_twice_has_the_positions_of_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv1d(2, 2, 2, groups=2)

        def forward(self, x):
            return Readout(2)(self.layer(torch.tanh(self.layer(x))))

    problem = from_net(Twice(), (3, 2, 5), "categorical")
    run = check(problem, {"layer": "conv"})
    assert run.stats.tap("layer").a.shape[2] == 4 + 3


def test_one_weight_at_two_strides_and_dilations():
    """Each use has its own static facts."""

    def model(p, x):
        wide = F.conv1d(x, p["w"], p["b"], stride=2, padding=1)
        return Readout(2)(torch.cat([wide, F.conv1d(x, p["w"], p["b"], dilation=3)], dim=-1))

    params = {"w": normal(2, 1, 2), "b": normal(2, seed=1)}
    problem = zoo.from_model(model, params, normal(3, 1, 5, seed=2), "categorical", zoo.generator(), {})
    check(problem, {"w": "conv"})


def test_one_weight_in_a_convolution_and_its_transpose():
    """A tied autoencoder: whichever block it is given, the numbers are exact."""

    def model(p, x):
        return F.conv_transpose1d(torch.tanh(F.conv1d(x, p["w"], stride=2)), p["w"], stride=2)

    params = {"w": normal(3, 1, 2)}
    check_partly(zoo.from_model(model, params, normal(3, 1, 4, seed=2), "gaussian", zoo.generator(), {}))


def test_channels_last_memory_is_no_other_layer():
    problem = from_net(nn.Sequential(nn.Conv2d(2, 3, 2), Readout(2)), (3, 2, 3, 4), "categorical")
    shuffled = zoo.replace(problem, x=problem.x.to(memory_format=torch.channels_last))
    check(shuffled, {"0": "conv"})


# ------------------------------------------------------------------------------------------- where K-FAC is exact


FORMS = pytest.mark.parametrize("form", ["factored", "eigen"])


@FORMS
def test_a_1x1_map_is_a_linear_layer(form):
    """T = 1: the same step, to the last digit."""
    problem = from_net(nn.Sequential(nn.Conv2d(3, 2, 1), Readout(2)), (4, 3, 1, 1), "categorical")
    params = {**problem.params, "0.weight": problem.params["0.weight"].flatten(1)}
    linear = twin(problem, nn.Sequential(nn.Linear(3, 2), Readout(2)), params, problem.x.flatten(1))
    steps = [stepped(p, ff.kfac(damping_form=form)) for p in (problem, linear)]
    close(*map(vec, steps), tol=1e-10)


@FORMS
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_1x1_kernel_is_a_linear_layer_over_positions(form, sharing):
    problem = from_net(nn.Sequential(nn.Conv1d(3, 2, 1), Readout(2)), (4, 3, 5), "categorical")
    params = {**problem.params, "0.weight": problem.params["0.weight"].flatten(1)}
    linear = twin(problem, nn.Sequential(nn.Linear(3, 2), Swap(), Readout(2)), params, problem.x.mT)
    steps = [stepped(p, ff.kfac(damping_form=form, sharing=sharing)) for p in (problem, linear)]
    close(*map(vec, steps), tol=1e-10)


@FORMS
def test_a_kernel_as_large_as_the_input_is_a_linear_layer(form):
    problem = from_net(nn.Sequential(nn.Conv2d(2, 3, (2, 3)), Readout(2)), (4, 2, 2, 3), "categorical")
    params = {**problem.params, "0.weight": problem.params["0.weight"].flatten(1)}
    linear = twin(problem, nn.Sequential(nn.Linear(12, 3), Readout(2)), params, problem.x.flatten(1))
    tap, same = (sampled(p, "empirical").stats.tap("0") for p in (problem, linear))
    close(tap.a, same.a)
    close(tap.g, same.g)
    steps = [stepped(p, ff.kfac(damping_form=form)) for p in (problem, linear)]
    close(*map(vec, steps), tol=1e-10)


@pytest.mark.parametrize("groups", [1, 2])
def test_one_datum_at_one_position_is_exact(groups):
    """Each group's block; between groups K-FAC has nothing."""
    problem = from_net(nn.Sequential(nn.Conv2d(2, 4, 2, groups=groups), Readout(2)), (1, 2, 2, 2), "categorical")
    matrix, run = kfac_matrix(problem)
    exact = exact_blocks(problem, run)
    within = torch.zeros_like(exact)
    for at in unit_weights.positions(problem, "0").flatten(1):
        within[at[:, None], at] = exact[at[:, None], at]
    close(matrix, within)


@FORMS
@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_g_groups_are_g_layers(form, groups, bias):
    """Taps and steps, group by group: each has its own factors and its own π."""
    facts = {"stride": 2, "padding": 1, "bias": bias}
    layer = nn.Conv1d(2 * groups, 3 * groups, 2, groups=groups, **facts)
    problem = from_net(nn.Sequential(layer, Readout(2)), (4, 2 * groups, 5), "categorical")
    apart = Separate([nn.Conv1d(2, 3, 2, **facts) for _ in range(groups)])
    other = twin(problem, nn.Sequential(apart, Readout(2)), apart_params(problem.params, groups), problem.x)
    tap = sampled(problem, "empirical").stats.tap("0")
    for k in range(groups):
        alone = sampled(other, "empirical").stats.tap(f"0.layers.{k}")
        close(tap.a[k], alone.a[0])
        close(tap.g[k], alone.g[0])
    nat, separate = (stepped(p, ff.kfac(damping_form=form)) for p in (problem, other))
    close(apart_params(nat, groups), separate, tol=1e-10)


POOLED = {
    "conv": lambda: from_net(
        nn.Sequential(nn.Conv2d(2, 3, 2, 2, 1), MeanPool(), nn.Linear(3, 2)), (4, 2, 3, 4), "gaussian-0.3"
    ),
    "conv-conv": lambda: from_net(
        nn.Sequential(nn.Conv1d(2, 3, 2), nn.Conv1d(3, 2, 1), MeanPool(), nn.Linear(2, 2)), (4, 2, 4), "gaussian-0.3"
    ),
    "linear": lambda: from_net(
        nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), zoo.Pool(), nn.Linear(3, 2)), (5, 4, 3), "gaussian-0.3"
    ),
    "one-datum": lambda: from_net(
        nn.Sequential(nn.Conv1d(2, 3, 2), MeanPool(), nn.Softplus(), nn.Linear(3, 3)), (1, 2, 4), "categorical"
    ),
}


@pytest.mark.parametrize("pooled", POOLED)
def test_reduce_is_exact_before_a_mean(pooled):
    """g_t is the same everywhere, so W_n = ĝ āᵀ; and ĝ is the same for all examples of a linear net (type-2)."""
    problem = POOLED[pooled]()
    matrix, run = kfac_matrix(problem, ff.kfac(sharing="reduce"))
    close(matrix, exact_blocks(problem, run))
    expand, _ = kfac_matrix(problem, ff.kfac(sharing="expand"))
    assert oracles.differs(expand, exact_blocks(problem, run), 1e-3), "expand is no approximation here?"


def test_expand_is_exact_where_every_position_has_its_own_output():
    """A deep linear net of 1×1 kernels with Gaussian outputs: no position sees another, and g is the same for all."""
    problem = from_net(nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 1)), (4, 2, 2, 3), "gaussian-0.3")
    matrix, run = kfac_matrix(problem, ff.kfac(sharing="expand"))
    close(matrix, exact_blocks(problem, run))
    reduce, _ = kfac_matrix(problem, ff.kfac(sharing="reduce"))
    assert oracles.differs(reduce, exact_blocks(problem, run), 1e-3)


def test_taps_of_float32_are_float32():
    problem = zoo.to(from_net(nn.Sequential(nn.Conv1d(1, 2, 2), Readout(2)), (2, 1, 3), "gaussian"), torch.float32)
    tap = sampled(problem).stats.tap("0")
    assert dense(tap.a).dtype == tap.g.dtype == torch.float32


def test_a_kernel_that_is_used_with_and_without_its_bias_is_exact():
    """The bias counts in the first use alone."""

    def model(p, x):
        return Readout(2)(torch.tanh(F.conv1d(x, p["w"], p["b"])) * F.conv1d(x, p["w"]))

    params = {"w": normal(3, 2, 2), "b": normal(3, seed=1)}
    problem = zoo.from_model(model, params, normal(3, 2, 4, seed=2), "categorical", zoo.generator(), {})
    run = sampled(problem)
    block = run.ng.layout.block("w")
    assert block.bias == "b" and [use.biased for use in block.uses] == [True, False]
    check_gradients(problem, run.ng, run.stats)
