"""The convolutional classifiers of the published experiments, for images of 32×32 pixels.

Channels and classes follow the data. Residual nets are those of He et al. (CVPR 2016, table 1) with the stem that is
usual for small images: a 3×3 convolution of stride one and no max-pool, where ImageNet's has 7×7 and stride two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from common.data import Data
from common.models.base import Model, channels, classes
from common.models.initialisation import built

SIZE = 32
STAGES = (64, 128, 256, 512)
"""Channels of the stages of a residual net; each stage except the first halves the image."""

VGG11: tuple[int | None, ...] = (64, None, 128, None, 256, 256, None, 512, 512, None, 512, 512, None)
"""Channels of the 3×3 convolutions; None halves the image."""


def cuda_convnet(data: Data) -> nn.Module:
    """Build three small convolutions with batch norm after the pools, 19,178 parameters on CIFAR-10."""
    return built(
        lambda: nn.Sequential(
            nn.Conv2d(channels(data), 32, 3), nn.ReLU(), nn.MaxPool2d(3), nn.BatchNorm2d(32),
            nn.Conv2d(32, 32, 3), nn.ReLU(), nn.MaxPool2d(3), nn.BatchNorm2d(32),
            nn.Conv2d(32, 64, 2), nn.ReLU(), nn.Flatten(), nn.Linear(64, classes(data)),
        )
    )  # fmt: skip


def toy_cnn(data: Data) -> nn.Module:
    """Build two convolutions of a few channels, for methods that need small nets."""
    return built(
        lambda: nn.Sequential(
            nn.Conv2d(channels(data), 4, 7), nn.Tanh(), nn.MaxPool2d(3),
            nn.Conv2d(4, 2, 5), nn.Tanh(), nn.MaxPool2d(3), nn.Flatten(), nn.Linear(2, classes(data)),
        )
    )  # fmt: skip


def vgg11(data: Data) -> nn.Module:
    """Configuration A of Simonyan & Zisserman (ICLR 2015) up to the last convolution, then one linear layer.

    At 32×32 the convolutions end in one pixel; the two wide layers and dropout of the original belong to ImageNet.
    """

    def make() -> nn.Module:
        layers: list[nn.Module] = []
        before = channels(data)
        for width in VGG11:
            layers += [nn.MaxPool2d(2)] if width is None else [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            before = width or before
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before, classes(data)))

    return built(make)


class Residual(nn.Module):
    """`relu(branch(x) + shortcut(x))`; where shapes change, the shortcut is a 1×1 convolution with batch norm."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of branch and shortcut."""
        return torch.relu(self.branch(x) + self.shortcut(x))


Block = Callable[[int, int, int], tuple[nn.Module, int]]
"""Function (channels before, channels of the stage, stride) -> a block and the channels after it."""


def basic(before: int, width: int, stride: int) -> tuple[nn.Module, int]:
    """Build a block of two 3×3 convolutions."""
    branch = nn.Sequential(*_convolution(before, width, 3, stride), nn.ReLU(), *_convolution(width, width, 3))
    return Residual(branch, _shortcut(before, width, stride)), width


def bottleneck(before: int, width: int, stride: int) -> tuple[nn.Module, int]:
    """Build a bottleneck block: 1×1 to a quarter of the channels, 3×3 with the stride, 1×1 back."""
    branch = nn.Sequential(
        *_convolution(before, width, 1), nn.ReLU(),
        *_convolution(width, width, 3, stride), nn.ReLU(),
        *_convolution(width, 4 * width, 1),
    )  # fmt: skip
    return Residual(branch, _shortcut(before, 4 * width, stride)), 4 * width


def resnet(data: Data, *, block: Block, counts: Sequence[int]) -> nn.Module:
    """Build a residual net: stem, four stages of blocks, mean over the pixels, one linear layer."""

    def make() -> nn.Module:
        layers: list[nn.Module] = [*_convolution(channels(data), STAGES[0], 3), nn.ReLU()]
        before = STAGES[0]
        for width, count in zip(STAGES, counts, strict=True):
            for index in range(count):
                stride = 2 if index == 0 and width > STAGES[0] else 1
                layer, before = block(before, width, stride)
                layers.append(layer)
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes(data)))

    return built(make)


def _convolution(before: int, after: int, size: int, stride: int = 1) -> list[nn.Module]:
    """Build a convolution that keeps the image size (divided by the stride), with batch norm, which has the bias."""
    return [nn.Conv2d(before, after, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(after)]


def _shortcut(before: int, after: int, stride: int) -> nn.Module:
    same = before == after and stride == 1
    return nn.Identity() if same else nn.Sequential(*_convolution(before, after, 1, stride))


def _predicting(build: Callable[[Data], nn.Module]) -> Model:
    return Model(build, "predict", inputs="images", size=SIZE)


MODELS: dict[str, Model] = {
    "cuda_convnet": _predicting(cuda_convnet),
    "toyCNN": _predicting(toy_cnn),
    "resnet18": _predicting(partial(resnet, block=basic, counts=(2, 2, 2, 2))),
    "resnet34": _predicting(partial(resnet, block=basic, counts=(3, 4, 6, 3))),
    "resnet50": _predicting(partial(resnet, block=bottleneck, counts=(3, 4, 6, 3))),
    "vgg11": _predicting(vgg11),
}
