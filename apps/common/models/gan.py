"""The generator and critic of the published GANs: DCGAN for grey images of 28×28, residual nets for 32×32 in colour.

`width` scales all channels, so that the same nets train on a CPU. Weights start as N(0, 0.02²/width), which keeps
DCGAN's published scale of the signal at any width; norms as N(1, 0.02²) and biases 0.

The published critics normalise over the batch. Then a score depends on the other images, and a penalty on the slope of
each score at its own image has no effect (Gulrajani et al. 2017, section 4): scores grow without bound. The critics
here therefore have no norm by default.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.data import Data
from common.models.base import ModelError, channels
from common.models.initialisation import CONVOLUTIONS, built

SLOPE = 0.2
SPREAD = 0.02
"""Standard deviation of the weights at width 1 (Radford, Metz & Chintala 2016, section 4)."""


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda channels: nn.Identity(),
    "layer": lambda channels: nn.GroupNorm(1, channels),
    "batch": nn.BatchNorm2d,
}
"""Norms of a critic by name: none, over the channels and pixels of each image, or over the batch as published."""


class Sizes(NamedTuple):
    """The sizes for which the nets are built."""

    colours: int
    z_dim: int
    width: float = 1.0
    critic_norm: str = "none"


class Pair(NamedTuple):
    """The two players: noise [N, z] to images [N, C, H, W] in [−1, 1], and images to scores [N, 1]."""

    generator: nn.Module
    critic: nn.Module


def dcgan(sizes: Sizes) -> Pair:
    """Transposed convolutions up to 32×32, cut to 28×28; four convolutions down to one number."""
    c = [max(1, round(sizes.width * wide)) for wide in (512, 256, 128, 64)]
    norm = NORMS[sizes.critic_norm]

    def up(i: int, o: int, stride: int, padding: int) -> list[nn.Module]:
        return [nn.ConvTranspose2d(i, o, 4, stride, padding, bias=False), nn.BatchNorm2d(o), nn.ReLU()]

    def down(i: int, o: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 4, 2, 1, bias=False), norm(o), nn.LeakyReLU(SLOPE)]

    generator = nn.Sequential(
        nn.Unflatten(1, (sizes.z_dim, 1, 1)),
        *up(sizes.z_dim, c[0], 1, 0), *up(c[0], c[1], 2, 1), *up(c[1], c[2], 2, 1), *up(c[2], c[3], 2, 1),
        nn.ConvTranspose2d(c[3], sizes.colours, 1, 1, 2, bias=False), nn.Tanh(),
    )  # fmt: skip
    critic = nn.Sequential(
        nn.Conv2d(sizes.colours, c[3], 4, 2, 1, bias=False), nn.LeakyReLU(SLOPE),
        *down(c[3], c[2]), *down(c[2], c[1]),
        nn.Conv2d(c[1], 1, 4, 2, 1, bias=False), nn.Flatten(),
    )  # fmt: skip
    return Pair(generator, critic)


class Residual(nn.Module):
    """`body(x) + shortcut(x)`."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of body and shortcut."""
        out: Tensor = self.body(x) + self.shortcut(x)
        return out


def residual(sizes: Sizes) -> Pair:
    """Three residual blocks that double 4×4 to 32×32; four blocks down to 8×8, and their mean."""
    colours, c, norm = sizes.colours, max(1, round(sizes.width * 128)), NORMS[sizes.critic_norm]

    def block(norm: Callable[[int], nn.Module], one: nn.Module, two: nn.Module, shortcut: nn.Module) -> Residual:
        return Residual(nn.Sequential(norm(c), nn.ReLU(), one, norm(c), nn.ReLU(), two), shortcut)

    def same() -> nn.Module:
        return nn.Conv2d(c, c, 3, padding=1)

    def up() -> Residual:
        shortcut = nn.ConvTranspose2d(c, c, 1, 2, output_padding=1)
        return block(nn.BatchNorm2d, nn.ConvTranspose2d(c, c, 4, 2, 1), same(), shortcut)

    generator = nn.Sequential(
        nn.Linear(sizes.z_dim, 16 * c), nn.Unflatten(1, (c, 4, 4)), up(), up(), up(),
        nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, colours, 3, padding=1), nn.Tanh(),
    )  # fmt: skip
    first = nn.Sequential(nn.Conv2d(colours, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, c, 3, 2, padding=1))
    critic = nn.Sequential(
        Residual(first, nn.Conv2d(colours, c, 1, 2)),
        block(norm, same(), nn.Conv2d(c, c, 3, 2, padding=1), nn.Conv2d(c, c, 1, 2)),
        *(block(norm, same(), same(), nn.Identity()) for _ in range(2)),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 1),
    )  # fmt: skip
    return Pair(generator, critic)


GANS: dict[str, Callable[[Sizes], Pair]] = {"dcgan": dcgan, "residual": residual}
PIXELS = {"dcgan": 28, "residual": 32}
"""Side of the generated images in pixels."""


def gan_for(data: Data) -> str:
    """Return the name of the GAN for images of this size."""
    shape = tuple(data.train.inputs.shape[2:])
    for name, size in PIXELS.items():
        if shape == (size, size):
            return name
    raise ModelError(f"{data.name}: no GAN makes images of {shape[0]}×{shape[1]}; sizes are 28×28 and 32×32.")


def build_gan(
    name: str, data: Data, z_dim: int, width: float, generator: torch.Generator, critic_norm: str = "none"
) -> Pair:
    """Build generator and critic for this data, initialised from `generator`."""
    if gan_for(data) != name:
        raise ModelError(
            f"{name} makes images of {PIXELS[name]}×{PIXELS[name]}, {data.name}'s are others; leave it out."
        )
    sizes = Sizes(channels(data), z_dim, width, critic_norm)
    pair = Pair(built(lambda: GANS[name](sizes).generator), built(lambda: GANS[name](sizes).critic))
    for net in pair:
        _initialise(net, SPREAD / width**0.5, generator)
    return pair


@torch.no_grad()
def _initialise(net: nn.Module, spread: float, generator: torch.Generator) -> None:
    for layer in net.modules():
        if isinstance(layer, (nn.Linear, *CONVOLUTIONS)):
            layer.weight.normal_(0.0, spread, generator=generator)
        elif isinstance(layer, (nn.BatchNorm2d, nn.GroupNorm)):
            layer.weight.normal_(1.0, SPREAD, generator=generator)
        bias = getattr(layer, "bias", None)
        if isinstance(bias, Tensor):
            bias.zero_()
