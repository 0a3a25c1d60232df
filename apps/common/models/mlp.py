"""The fully connected nets of the published experiments, by hidden widths; input and output sizes follow the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from common.data import Data
from common.models.base import Model, classes, pixels
from common.models.initialisation import built


def autoencoder(data: Data, *, hidden: Sequence[int]) -> nn.Module:
    """Return a net with ReLU after every layer except the last; the code layer has one, too."""
    return built(lambda: chain([pixels(data), *hidden, pixels(data)], lambda width: nn.ReLU()))


def linear_code(data: Data, *, encoder: Sequence[int], activation: Callable[[], nn.Module]) -> nn.Module:
    """Return a symmetric autoencoder whose code layer, the last width of `encoder`, is linear.

    With sigmoid units these are the nets of Hinton & Salakhutdinov (Science 313, 2006).
    """
    code = encoder[-1]
    hidden = [*encoder, *reversed(encoder[:-1])]
    widths = [pixels(data), *hidden, pixels(data)]
    return built(lambda: chain(widths, lambda width: nn.Identity() if width == code else activation()))


def deep_linear(data: Data, *, hidden: Sequence[int]) -> nn.Module:
    """Build linear layers with batch norm and without activations: a deep linear map."""
    return built(lambda: chain([pixels(data), *hidden, classes(data)], nn.BatchNorm1d))


def tanh_net(data: Data, *, hidden: Sequence[int]) -> nn.Module:
    """Build a net with tanh after every layer except the last."""
    return built(lambda: chain([pixels(data), *hidden, classes(data)], lambda width: nn.Tanh()))


def chain(widths: Sequence[int], between: Callable[[int], nn.Module]) -> nn.Sequential:
    """Return linear layers of these widths with a module between them, by the width it follows."""
    pairs = zip(widths, widths[1:], strict=False)
    layers = [layer for fan_in, fan_out in pairs for layer in (nn.Linear(fan_in, fan_out), between(fan_out))]
    return nn.Sequential(*(layer for layer in layers[:-1] if not isinstance(layer, nn.Identity)))  # it ends in logits


CURVES_ENCODER, MNIST_ENCODER = (400, 200, 100, 50, 25, 6), (1000, 500, 250, 30)
"""Hidden widths down to the code, after Hinton & Salakhutdinov and Sutskever et al. (2013), table 1."""

MODELS: dict[str, Model] = {
    "AE_CURVES": Model(partial(autoencoder, hidden=(400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400)), "reconstruct"),
    "AE_MNIST": Model(partial(autoencoder, hidden=(1000, 500, 250, 30, 250, 500, 1000)), "reconstruct"),
    "AE_FACES": Model(partial(autoencoder, hidden=(2000, 1000, 500, 30, 500, 1000, 2000)), "reconstruct"),
    "AE_CURVES_TANH": Model(partial(linear_code, encoder=CURVES_ENCODER, activation=nn.Tanh), "reconstruct"),
    "AE_MNIST_TANH": Model(partial(linear_code, encoder=MNIST_ENCODER, activation=nn.Tanh), "reconstruct"),
    "AE_CURVES_SIGMOID": Model(partial(linear_code, encoder=CURVES_ENCODER, activation=nn.Sigmoid), "reconstruct"),
    "AE_MNIST_SIGMOID": Model(partial(linear_code, encoder=MNIST_ENCODER, activation=nn.Sigmoid), "reconstruct"),
    "DeepLinear": Model(partial(deep_linear, hidden=(10,) * 63), "predict"),
    "MLP": Model(partial(deep_linear, hidden=(*range(1000, 0, -100), 50, 20)), "predict"),
    "ToyNet": Model(partial(tanh_net, hidden=(10, 30, 20, 15)), "predict"),
}
