"""Transposed convolutions: drawn over all that torch lets vary, and as convolutions of the zero-stuffed input."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fisherfn as ff
from tests import strategies, zoo
from tests.layers.checks import apart_params, check, check_chunks, exact_blocks, kfac_matrix, normal, stepped, twin
from tests.nets import MeanPool, Readout, Separate
from tests.oracles import close
from tests.zoo import from_net, sampled

KIND = {"0": "conv transpose"}
FORMS = pytest.mark.parametrize("form", ["factored", "eigen"])


@pytest.mark.parametrize("dims", [1, 2, 3])
@given(data=st.data(), fisher=strategies.fishers(), options=strategies.kfac_options())
def test_drawn_transposed_convolutions_are_exact(dims, data, fisher, options):
    problem = data.draw(strategies.read_out(strategies.transposed_convolutions(dims)))
    check_chunks(problem, check(problem, KIND, fisher, **options))


CORNERS = {
    "padding-beyond-the-kernel": (nn.ConvTranspose1d(1, 2, 2, stride=2, padding=3), (1, 5)),
    "padding-and-output-padding": (nn.ConvTranspose2d(2, 2, 2, 3, 2, 2, groups=2), (2, 3, 3)),
    "crop-to-one-position": (nn.ConvTranspose1d(1, 1, 1, padding=2), (1, 5)),
    "output-padding-past-the-stride": (nn.ConvTranspose1d(2, 1, 2, 1, 0, 1, dilation=3), (2, 2)),
    "gaps-without-input": (nn.ConvTranspose2d(1, 2, 1, stride=3, output_padding=2), (1, 2, 2)),
    "dilated-groups": (nn.ConvTranspose2d(4, 2, (2, 3), 2, 1, 1, groups=2, dilation=(3, 1)), (4, 2, 2)),
    "3d": (nn.ConvTranspose3d(2, 4, (1, 2, 2), (2, 1, 2), (0, 1, 2), (1, 0, 1), 2), (2, 2, 2, 2)),
}


@pytest.mark.parametrize("corner", CORNERS)
def test_corners_are_exact(corner):
    layer, shape = CORNERS[corner]
    check(from_net(nn.Sequential(layer, Readout(2)), (3, *shape), "categorical"), KIND)


CALLS = {
    "F.conv_transpose1d": (lambda p, x: F.conv_transpose1d(x, p["w"], p["b"], 2, 1, 1), (1, 2, 3), (1, 3)),
    "keywords": (
        lambda p, x: torch.conv_transpose2d(bias=p["b"], input=x, dilation=2, weight=p["w"], groups=2, padding=[1, 0]),
        *((2, 1, 2, 2), (2, 2, 2)),
    ),
    "F.conv_transpose3d": (lambda p, x: F.conv_transpose3d(x, p["w"], bias=p["b"]), (1, 2, 1, 2, 1), (1, 1, 2, 2)),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_way_to_call_a_transposed_convolution(call):
    function, weight, shape = CALLS[call]
    params = {"w": normal(*weight), "b": normal(2, seed=1)}

    def model(params, x):
        return Readout(2)(function(params, x))

    problem = zoo.from_model(model, params, normal(3, *shape, seed=2), "categorical", zoo.generator(), {})
    check(problem, {"w": "conv transpose"})


def test_rows_are_output_positions():
    """K = groups, d_out = C_out / G, d_in = C_in / G · kernel (+ 1), T = output positions."""
    problem = from_net(nn.Sequential(nn.ConvTranspose2d(4, 6, 2, 3, groups=2), Readout(2)), (2, 4, 2, 3), "gaussian")
    tap = sampled(problem, samples=3).stats.tap("0")
    assert tap.a.shape == (2, 2, 5 * 8, 2 * 4 + 1) and tap.g.shape == (2, 3, 2, 5 * 8, 3)


def test_an_output_size_given_at_the_call_is_output_padding():
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.ConvTranspose1d(1, 2, 2, stride=3)

        def forward(self, x):
            return Readout(2)(self.layer(x, output_size=[7]))

    check(from_net(Sized(), (3, 1, 2), "categorical"), {"layer": "conv transpose"})


# ------------------------------------------------------------------------------------------------ as a convolution


class ZeroStuffed(nn.Module):
    """Zeros between the inputs, then a border of d(k-1) - p (cropped where negative), then a plain convolution."""

    def __init__(self, conv, stride, padding, output_padding):
        super().__init__()
        self.conv, self.stride = conv, stride
        reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        self.border = [r - p for r, p in zip(reach, padding, strict=True)]
        self.extra = output_padding

    def forward(self, x):
        for axis, s in enumerate(self.stride, 2):
            spread = torch.stack([x, *[torch.zeros_like(x)] * (s - 1)], dim=axis + 1).flatten(axis, axis + 1)
            x = spread.narrow(axis, 0, spread.shape[axis] - s + 1)
        pads = [(b, b + e) for b, e in zip(self.border, self.extra, strict=True)]
        return self.conv(F.pad(x, [side for pair in reversed(pads) for side in pair]))


SHAPES = [
    pytest.param((2, 3), (2, 1), (0, 1), (0, 0), (1, 1), 1, id="plain"),
    pytest.param((2, 2), (2, 3), (1, 0), (1, 2), (1, 2), 2, id="output-padding-groups"),
    pytest.param((1, 2), (2, 2), (1, 2), (1, 1), (1, 1), 2, id="padding-beyond-the-kernel"),
]


@FORMS
@pytest.mark.parametrize(("kernel", "stride", "padding", "extra", "dilation", "groups"), SHAPES)
def test_a_transposed_convolution_is_a_convolution_of_the_zero_stuffed_input(
    form, kernel, stride, padding, extra, dilation, groups
):
    """The weight is flipped with the channels swapped; factors are over output positions, so the step is the same."""
    layer = nn.ConvTranspose2d(4, 6, kernel, stride, padding, extra, groups, dilation=dilation)
    problem = from_net(nn.Sequential(layer, Readout(2)), (3, 4, 3, 4), "categorical")
    stuffed = ZeroStuffed(nn.Conv2d(4, 6, kernel, dilation=dilation, groups=groups), stride, padding, extra)

    def as_conv(weight):  # [C_in, C_out / G, k…] to [C_out, C_in / G, k…]
        return torch.cat([part.transpose(0, 1) for part in weight.flip(2, 3).chunk(groups)])

    params = {"0.conv.weight": as_conv(problem.params["0.weight"]), "0.conv.bias": problem.params["0.bias"]}
    other = twin(problem, nn.Sequential(stuffed, Readout(2)), params, problem.x)
    close(other.model(params, problem.x), problem.model(problem.params, problem.x))
    nat, same = (stepped(p, ff.kfac(damping_form=form)) for p in (problem, other))
    close(as_conv(nat["0.weight"]), same["0.conv.weight"], tol=1e-9)
    close(nat["0.bias"], same["0.conv.bias"], tol=1e-9)


@FORMS
@pytest.mark.parametrize("bias", [True, False])
def test_g_groups_are_g_layers(form, bias):
    """A weight's groups lie along its inputs."""
    facts = {"stride": 2, "padding": 1, "output_padding": 1, "bias": bias}
    layer = nn.ConvTranspose1d(4, 6, 3, groups=2, **facts)
    problem = from_net(nn.Sequential(layer, Readout(2)), (4, 4, 3), "categorical")
    apart = Separate([nn.ConvTranspose1d(2, 3, 3, **facts) for _ in range(2)])
    other = twin(problem, nn.Sequential(apart, Readout(2)), apart_params(problem.params, 2), problem.x)
    nat, separate = (stepped(p, ff.kfac(damping_form=form)) for p in (problem, other))
    close(apart_params(nat, 2), separate, tol=1e-10)


def test_a_1x1_map_is_a_linear_layer():
    problem = from_net(nn.Sequential(nn.ConvTranspose2d(3, 2, 1), Readout(2)), (4, 3, 1, 1), "categorical")
    params = {"0.weight": problem.params["0.weight"].flatten(1).T, "0.bias": problem.params["0.bias"]}
    linear = twin(problem, nn.Sequential(nn.Linear(3, 2), Readout(2)), params, problem.x.flatten(1))
    nat, same = stepped(problem), stepped(linear)
    close({**nat, "0.weight": nat["0.weight"].flatten(1).T}, same, tol=1e-10)


def test_one_datum_at_one_position_is_exact():
    problem = from_net(nn.Sequential(nn.ConvTranspose1d(3, 2, 1), Readout(2)), (1, 3, 1), "categorical")
    matrix, run = kfac_matrix(problem)
    close(matrix, exact_blocks(problem, run))


def test_reduce_is_exact_before_a_mean():
    net = nn.Sequential(nn.ConvTranspose1d(2, 3, 2, 2), MeanPool(), nn.Linear(3, 2))
    problem = from_net(net, (4, 2, 3), "gaussian-0.3")
    matrix, run = kfac_matrix(problem, ff.kfac(sharing="reduce"))
    close(matrix, exact_blocks(problem, run))
