"""Hypothesis: nets, batches and trees as drawn data. Every draw is small, so that brute force stays quick."""

import torch
from hypothesis import strategies as st
from torch import nn

from tests import zoo
from tests.nets import Readout


class Residual(nn.Module):
    """x + f(x): inputs and outputs of layers that do not sit in a chain."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return x + self.body(x)


ACTIVATIONS = (None, nn.Tanh, nn.Softplus, nn.ReLU, nn.GELU)
LIKELIHOODS = ("categorical", "bernoulli", "gaussian-0.3")


@st.composite
def problems(draw, likelihoods=LIKELIHOODS, activations=ACTIVATIONS, max_shared=2, max_batch=4):
    """A chain of linear layers, now and then residual: widths, depth, N, T, likelihood, bias and activation drawn."""
    widths = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    likelihood = draw(st.sampled_from(likelihoods))
    net = zoo.mlp(*widths, act=draw(st.sampled_from(activations)), bias=draw(st.booleans()))
    if widths[0] == widths[-1] and draw(st.booleans()):
        net = Residual(net)
    shared = draw(st.lists(st.integers(1, 3), max_size=max_shared))
    shape = (draw(st.integers(1, max_batch)), *shared, widths[0])
    return zoo.from_net(net, shape, likelihood, seed=draw(st.integers(0, 1000)))


def fishers():
    return st.sampled_from(zoo.FISHERS)


def kfac_options():
    """Sharing, damping form, and a width above which factors are diagonal: mostly none."""
    return st.fixed_dictionaries(
        {
            "sharing": st.sampled_from(["expand", "reduce"]),
            "damping_form": st.sampled_from(["factored", "eigen"]),
            "diagonal_above": st.sampled_from([8192, 8192, 1, 3]),
        }
    )


@st.composite
def trees(draw, seed=0):
    shapes = draw(st.lists(st.lists(st.integers(1, 3), max_size=3).map(tuple), min_size=1, max_size=4))
    rng = zoo.generator(seed + draw(st.integers(0, 100)))
    return {f"p{i}": torch.randn(shape, generator=rng, dtype=torch.float64) for i, shape in enumerate(shapes)}


# ------------------------------------------------------------------------------------------------------- layers


@st.composite
def read_out(draw, layers):
    """One drawn layer `(module, input shape of an example)`, two outputs from all that it puts out."""
    layer, shape = draw(layers)
    x_shape = (draw(st.integers(1, 3)), *shape)
    return zoo.from_net(
        nn.Sequential(layer, Readout(2)), x_shape, draw(st.sampled_from(LIKELIHOODS)), seed=draw(st.integers(0, 1000))
    )


def per_dim(draw, dims, elements):
    return tuple(draw(elements) for _ in range(dims))


CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@st.composite
def convolutions(draw, dims):
    """Stride, padding by number or name and of every mode, dilation, groups; sizes that the stride need not divide."""
    groups, mode = draw(st.integers(1, 3)), draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
    kernel = per_dim(draw, dims, st.integers(1, 3 if dims < 3 else 2))
    dilation = per_dim(draw, dims, st.integers(1, 2))
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    padding = draw(st.sampled_from(["same", "valid"]) | st.just("numbers"))
    stride = per_dim(draw, dims, st.integers(1, 1 if padding == "same" else 3))
    if padding == "numbers":
        padding = per_dim(draw, dims, st.integers(0, 2))
    around = {"same": [(r + 1) // 2 for r in reach], "valid": [0] * dims}.get(padding, padding)
    shortest = [max(1, p + 1, r + 1 - 2 * p) for p, r in zip(around, reach, strict=True)]  # p + 1: reflect needs it
    sizes = [low + draw(st.integers(0, 2 if dims < 3 else 1)) for low in shortest]
    c_in, c_out = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    layer = CONV[dims](
        c_in, c_out, kernel, stride, padding, dilation, groups, bias=draw(st.booleans()), padding_mode=mode
    )
    return layer, (c_in, *sizes)


@st.composite
def transposed_convolutions(draw, dims):
    """Padding also beyond the kernel, so that the input is cropped; output padding up to what torch allows."""
    groups = draw(st.integers(1, 3))
    kernel = per_dim(draw, dims, st.integers(1, 3 if dims < 3 else 2))
    dilation, stride = per_dim(draw, dims, st.integers(1, 2)), per_dim(draw, dims, st.integers(1, 3))
    padding = per_dim(draw, dims, st.integers(0, 3))
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    sizes = []
    for k, d, s, p, e in zip(kernel, dilation, stride, padding, extra, strict=True):
        shortest = next(m for m in range(1, 20) if (m - 1) * s - 2 * p + d * (k - 1) + e + 1 >= 1)
        sizes.append(shortest + draw(st.integers(0, 1)))
    c_in, c_out = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    layer = CONV_TRANSPOSE[dims](
        c_in, c_out, kernel, stride, padding, extra, groups, bias=draw(st.booleans()), dilation=dilation
    )
    return layer, (c_in, *sizes)


@st.composite
def norms(draw):
    """Layer, RMS, group and instance norm; batch norm in evaluation mode."""
    channels, sizes = draw(st.integers(1, 4)), draw(st.lists(st.integers(2, 3), min_size=1, max_size=2))
    kind = draw(st.sampled_from(["layer", "rms", "group", "instance", "tracking instance", "batch"]))
    if kind in ("layer", "rms"):
        shape = (*draw(st.lists(st.integers(1, 3), max_size=1)), channels, *sizes)
        normalised = shape[draw(st.integers(0, len(shape) - 1)) :]
        bias = {"bias": draw(st.booleans())} if kind == "layer" else {}
        return {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[kind](normalised, **bias), shape
    if kind == "group":
        groups = draw(st.integers(1, 2))
        return nn.GroupNorm(groups, groups * channels), (groups * channels, *sizes)
    if kind == "batch":
        return [nn.BatchNorm1d, nn.BatchNorm2d][len(sizes) - 1](channels).eval(), (channels, *sizes)
    layer = [nn.InstanceNorm1d, nn.InstanceNorm2d][len(sizes) - 1]
    tracking = layer(channels, affine=True, track_running_stats=kind == "tracking instance")
    return tracking.eval() if kind == "tracking instance" else tracking, (channels, *sizes)


@st.composite
def embeddings(draw):
    """A problem: vocabulary, width, positions (none, or some axes of them), padding index."""
    vocabulary, width = draw(st.integers(2, 6)), draw(st.integers(1, 3))
    padding = draw(st.none() | st.integers(-vocabulary, vocabulary - 1))
    shape = (draw(st.integers(1, 3)), *draw(st.lists(st.integers(1, 3), max_size=2)))
    net = nn.Sequential(nn.Embedding(vocabulary, width, padding_idx=padding), Readout(2))
    return zoo.from_net(net, shape, "categorical", vocabulary=vocabulary, seed=draw(st.integers(0, 100)))
