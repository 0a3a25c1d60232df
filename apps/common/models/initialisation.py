"""Initialisation of any net from its own generator."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.models.base import ModelError
from common.names import lookup


def built(make: Callable[[], nn.Module]) -> nn.Module:
    """Build the net of `make` on the CPU, initialised as by torch, without the global generator."""
    # torch initialises from the global generator while building; on the meta device it does not
    with torch.device("meta"):
        net = make()
    return initialise(net.to_empty(device="cpu"), "default", torch.Generator().manual_seed(0))


class Scheme(NamedTuple):
    """The initialisation of one layer: both functions fill their tensor in place from the generator."""

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
    # every unit gets 15 inputs, or all if it has fewer; the rows of a transposed convolution are its inputs
    rows = weight.view(len(weight), -1)
    order = torch.rand(rows.shape, generator=generator, device=rows.device).argsort(1)
    values = torch.randn(rows.shape, generator=generator, device=rows.device, dtype=rows.dtype)
    rows.copy_(values * (order < 15))


SCHEMES: dict[str, Scheme] = {
    # bias 0.01, as in the original
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
    """Fill linear and convolutional layers by `scheme`, reset norm layers (1, 0, initial statistics); return `net`.

    One generator is used for all layers, so that equal shapes get different weights; the global one is not used.
    Parameters of other modules are not changed.
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
