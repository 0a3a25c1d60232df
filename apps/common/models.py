"""The fully connected nets of the published experiments, and one way of initialising any net.

To add a model, write a `build(data: Data) -> nn.Module` that takes flattened inputs `[N, C·H·W]` and ends in logits;
name it as `pkg.module:build` (the current folder is importable), or enter it in `MODELS`. What it is trained for is
its attribute `task`, or its module's; without one, labels are predicted where the data has any.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from common.data import Data
from common.names import is_own, lookup, own
from fisherfn.errors import FisherfnError

Task = Literal["reconstruct", "predict"]
CLASSES = 10  # where the data has no labels


class ModelError(FisherfnError, ValueError):
    """A model, task or initialisation that does not exist or does not fit."""


class Model(NamedTuple):
    """How a net is built for some data, and what it is trained for."""

    build: Callable[[Data], nn.Module]
    task: Task


def resolve(name: str, data: Data | None = None) -> Model:
    """The model of that `name`: one of `MODELS`, or one's own `build(data) -> nn.Module` as "pkg.module:build".

    `data` decides the task of one's own model that declares none.
    """
    if not is_own(name):
        return lookup(name, MODELS, "model", ModelError)
    build = own(name, "model", ModelError)
    task = getattr(build, "task", None) or getattr(sys.modules.get(build.__module__), "task", None)
    if task is None and data is None:
        raise ModelError(f"model {name!r}: declares no task; set `task` to one of {get_args(Task)}, or pass the data.")
    if task is None:
        task = "reconstruct" if data is None or data.train.labels is None else "predict"
    if task not in get_args(Task):
        raise ModelError(f"model {name!r}: its task is {task!r}; it should be one of {get_args(Task)}.")
    return Model(build, cast(Task, task))


# Architectures: widths between the input and the output, which follow the data


def autoencoder(data: Data, *, hidden: Sequence[int]) -> nn.Module:
    """ReLU after every layer but the last, the code included."""
    return _built(lambda: _chain([pixels(data), *hidden, pixels(data)], lambda width: nn.ReLU()))


def deep_linear(data: Data, *, hidden: Sequence[int]) -> nn.Module:
    """Linear layers with batch norm between, no activation: a linear map however deep."""
    return _built(lambda: _chain([pixels(data), *hidden, classes(data)], nn.BatchNorm1d))


def tanh_net(data: Data, *, hidden: Sequence[int]) -> nn.Module:
    """Tanh after every layer but the last."""
    return _built(lambda: _chain([pixels(data), *hidden, classes(data)], lambda width: nn.Tanh()))


def pixels(data: Data) -> int:
    """C·H·W of an image."""
    return math.prod(data.train.inputs.shape[1:])


def classes(data: Data) -> int:
    """The number of classes, at least two: one more than the largest label of either part."""
    if data.train.labels is None or data.test.labels is None:
        return CLASSES
    return max(int(data.train.labels.max()), int(data.test.labels.max()), 1) + 1


def _chain(widths: Sequence[int], between: Callable[[int], nn.Module]) -> nn.Sequential:
    pairs = zip(widths, widths[1:], strict=False)
    layers = [layer for fan_in, fan_out in pairs for layer in (nn.Linear(fan_in, fan_out), between(fan_out))]
    return nn.Sequential(*layers[:-1])  # it ends in logits


def _built(make: Callable[[], nn.Module]) -> nn.Module:
    # torch initialises as it builds, from the global generator: on the meta device there is nothing to initialise
    with torch.device("meta"):
        net = make()
    return initialise(net.to_empty(device="cpu"), "default", torch.Generator().manual_seed(0))


MODELS: dict[str, Model] = {
    "AE_CURVES": Model(partial(autoencoder, hidden=(400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400)), "reconstruct"),
    "AE_MNIST": Model(partial(autoencoder, hidden=(1000, 500, 250, 30, 250, 500, 1000)), "reconstruct"),
    "AE_FACES": Model(partial(autoencoder, hidden=(2000, 1000, 500, 30, 500, 1000, 2000)), "reconstruct"),
    "DeepLinear": Model(partial(deep_linear, hidden=(10,) * 63), "predict"),
    "MLP": Model(partial(deep_linear, hidden=(*range(1000, 0, -100), 50, 20)), "predict"),
    "ToyNet": Model(partial(tanh_net, hidden=(10, 30, 20, 15)), "predict"),
}


# Initialisation


class Scheme(NamedTuple):
    """How one layer starts: both functions fill their tensor in place from the generator."""

    weight: Callable[[Tensor, torch.Generator], object]
    bias: Callable[[Tensor, Tensor, torch.Generator], object]  # the weight comes first: its fan-in may matter


def _constant(value: float) -> Callable[[Tensor, Tensor, torch.Generator], object]:
    return lambda weight, bias, generator: bias.fill_(value)


def _fan_in(weight: Tensor) -> int:
    return weight[0].numel()


def _default_bias(weight: Tensor, bias: Tensor, generator: torch.Generator) -> None:
    bound = 1 / math.sqrt(_fan_in(weight))
    bias.uniform_(-bound, bound, generator=generator)


def _sparse(weight: Tensor, generator: torch.Generator) -> None:
    # every unit gets 15 inputs, all of them where it has fewer; the rows of a transposed convolution are its inputs
    rows = weight.view(len(weight), -1)
    order = torch.rand(rows.shape, generator=generator, device=rows.device).argsort(1)
    values = torch.randn(rows.shape, generator=generator, device=rows.device, dtype=rows.dtype)
    rows.copy_(values * (order < 15))


SCHEMES: dict[str, Scheme] = {
    # bias 0.01: the original's
    "xavier_uniform": Scheme(lambda w, g: nn.init.xavier_uniform_(w, generator=g), _constant(0.01)),
    "xavier_normal": Scheme(lambda w, g: nn.init.xavier_normal_(w, generator=g), _constant(0.01)),
    "kaiming_uniform": Scheme(lambda w, g: nn.init.kaiming_uniform_(w, generator=g), _constant(0.01)),
    "kaiming_normal": Scheme(lambda w, g: nn.init.kaiming_normal_(w, generator=g), _constant(0.01)),
    "orthogonal": Scheme(lambda w, g: nn.init.orthogonal_(w, generator=g), _constant(0.0)),
    # Martens 2010 (Deep learning via Hessian-free optimization, section 5), for these very autoencoders
    "sparse": Scheme(_sparse, _constant(0.0)),
    # torch's own formula for linear layers and convolutions
    "default": Scheme(lambda w, g: nn.init.kaiming_uniform_(w, a=math.sqrt(5), generator=g), _default_bias),
}
CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
BATCH_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
NORMS = *BATCH_NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm, nn.LayerNorm


@torch.no_grad()
def initialise(net: nn.Module, scheme: str, generator: torch.Generator) -> nn.Module:
    """Fill linear and convolutional layers by `scheme`, reset norm layers (1, 0, fresh statistics); returns `net`.

    One generator runs through all layers, so that equal shapes get different weights; the global one is not used.
    Other modules' own parameters stay as they were built.
    """
    fill = lookup(scheme, SCHEMES, "initialisation", ModelError)
    for layer in net.modules():
        if isinstance(layer, (nn.Linear, *CONVOLUTIONS)):
            fill.weight(layer.weight, generator)
            if layer.bias is not None:
                fill.bias(layer.weight, layer.bias, generator)
        elif isinstance(layer, NORMS):
            layer.reset_parameters()
    return net
