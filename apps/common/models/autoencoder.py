"""The convolutional autoencoders of the published experiments: two convolutions, two transposed ones, all 5×5.

They end in logits, or in means: the sigmoid of the published MNIST net belongs to the Bernoulli likelihood.
"""

from __future__ import annotations

from torch import nn

from common.data import Data
from common.models.base import Model, channels
from common.models.initialisation import built

SLOPE = 0.2


def conv_mnist(data: Data) -> nn.Module:
    """Build the autoencoder published for MNIST, with leaky ReLU after every layer except the last."""
    return built(
        lambda: nn.Sequential(
            nn.Conv2d(channels(data), 6, 5), nn.LeakyReLU(SLOPE),
            nn.Conv2d(6, 16, 5), nn.LeakyReLU(SLOPE),
            nn.ConvTranspose2d(16, 6, 5), nn.LeakyReLU(SLOPE),
            nn.ConvTranspose2d(6, channels(data), 5),
        )
    )  # fmt: skip


def conv_cifar(data: Data) -> nn.Module:
    """Build the autoencoder published for CIFAR-10 and SVHN: ReLU, then batch norm, after all layers but the last."""
    return built(
        lambda: nn.Sequential(
            nn.Conv2d(channels(data), 6, 5), nn.ReLU(), nn.BatchNorm2d(6),
            nn.Conv2d(6, 16, 5), nn.ReLU(), nn.BatchNorm2d(16),
            nn.ConvTranspose2d(16, 6, 5), nn.ReLU(), nn.BatchNorm2d(6),
            nn.ConvTranspose2d(6, channels(data), 5),
        )
    )  # fmt: skip


MODELS: dict[str, Model] = {
    "conv_AE_MNIST": Model(conv_mnist, "reconstruct", inputs="images"),
    "conv_AE_CIFAR10": Model(conv_cifar, "reconstruct", inputs="images"),
}
