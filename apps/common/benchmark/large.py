"""Nets for a GPU: a ResNet-50 on small images, and a block of the size of GPT-2 small."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fisherfn as ff
from common.benchmark.problems import Problem, posed
from common.data import Data, Split
from common.models import MODELS, initialise
from common.models.initialisation import built

WIDTH, HEADS, POSITIONS = 768, 12, 256


class TransformerBlock(nn.Module):
    """Attention and a two-layer network four times as wide, each with a layer norm and a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, T, width]` to the same shape."""
        n, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(n, t, WIDTH))
        hidden: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return hidden


def resnet50(batch_size: int, device: str) -> Problem:
    """Build a ResNet-50 for 3×32×32 images and a hundred classes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch_size, 3, 32, 32, generator=generator)
    y = torch.randint(100, (batch_size,), generator=generator)
    y[0] = 99  # the number of classes is read from the labels
    likelihood = ff.Categorical()
    data = Data("random", Split(x, y), Split(x, y), "resnet50", likelihood, likelihood)
    net = initialise(MODELS["resnet50"].build(data), "kaiming_normal", generator)
    return posed(net.to(device), (x.to(device), y.to(device)), likelihood)


def gpt2_block(batch_size: int, device: str) -> Problem:
    """Build the block without a vocabulary, with random inputs and targets."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size, POSITIONS, WIDTH, generator=generator)
    y = torch.rand(batch_size, POSITIONS, WIDTH, generator=generator)
    net = initialise(built(TransformerBlock), "xavier_uniform", generator)
    return posed(net.to(device), (x.to(device), y.to(device)), ff.Bernoulli())


class Large(NamedTuple):
    """A net with its title and batch."""

    make: Callable[[int, str], Problem]
    title: str
    batch_size: int


LARGE = {
    "resnet50": Large(resnet50, "ResNet-50, 3×32×32", 128),
    "gpt2_block": Large(gpt2_block, "a block of GPT-2 small", 16),
}
"""Large nets by name; they are only timed on request."""
