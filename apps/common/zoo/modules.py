"""Modules of the nets of plain.py: connections, loops and inputs that no layer of torch has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

N, T = 8, 12
"""Examples and positions of the batches."""


class Apply(nn.Module):
    """A function as a module, for a place in nn.Sequential."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        """Apply the function."""
        return self.function(x)


class Residual(nn.Module):
    """A block whose input is added to its output."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus the block."""
        return x + self.inner(x)


class Tokens(nn.Module):
    """Token and position embedding, a body on [N, T, d], and a head; tied to the embedding or not."""

    def __init__(self, body: nn.Module, width: int = 32, tied: bool = False, pooled: bool = True) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(99, width), nn.Embedding(T, width)
        self.body, self.pooled = body, pooled
        self.head = nn.Linear(width, 99, bias=False) if tied else nn.Linear(width, 10)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits for each sequence, or for each token."""
        h = self.body(self.tokens(ids) + self.positions(torch.arange(ids.shape[1])))
        return self.head(h.mean(1) if self.pooled else h)


class Recurrent(nn.Module):
    """A recurrent layer between an embedding and the classes, read at the last token."""

    def __init__(self, layer: nn.Module, width: int = 32) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(99, 24), layer, nn.Linear(width, 10)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits for each sequence."""
        return self.head(self.layer(self.embedding(ids))[0][:, -1])


class Cell(nn.Module):
    """A loop over a recurrent cell."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits for each sequence."""
        h = x.new_zeros(x.shape[0], 24)
        for step in x.unbind(1):
            h = self.cell(step, h)
        return self.head(h)


class Attention(nn.Module):
    """Multi-head attention of the sequence to itself, with torch's module."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus what it attends to."""
        return x + self.attention(x, x, x, need_weights=False)[0]


class Siamese(nn.Module):
    """One encoder on both halves of a pair, joined along the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Return logits from the distance of the codes."""
        one, two = self.encoder(torch.cat([left, right])).chunk(2)
        return self.head((one - two).abs())


class DeepONet(nn.Module):
    """A branch on the examples and a trunk on a grid that all of them share."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 16))
        self.trunk = nn.Sequential(nn.Linear(1, 24), nn.GELU(), nn.Linear(24, 16))
        self.bias = nn.Parameter(torch.zeros(1))
        self.register_buffer("grid", torch.linspace(0, 1, 20)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        """Return the function's values on the grid."""
        return self.branch(x) @ self.trunk(self.grid).T + self.bias


class Mixture(nn.Module):
    """Experts behind a soft gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(12, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 10)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Return the experts' average by the gate."""
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        return (self.gate(x).softmax(-1)[..., None] * outputs).sum(1)


class UNet(nn.Module):
    """Down, up by a transposed convolution, and joined with what was before."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.down = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 24, 3, 2, 1)
        self.up, self.out = nn.ConvTranspose2d(24, 12, 2, 2), nn.Conv2d(24, 5, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(12), nn.BatchNorm2d(24)])

    def forward(self, x: Tensor) -> Tensor:
        """Return logits per pixel, classes last."""
        first = F.relu(self.norms[0](self.enter(x)))
        second = F.relu(self.norms[1](self.down(first)))
        return self.out(torch.cat([first, self.up(second)], 1)).movedim(1, -1)


class Film(nn.Module):
    """A net whose features are scaled and shifted by another input."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.scales, self.out = nn.Linear(12, 24), nn.Linear(4, 48), nn.Linear(24, 10)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return logits."""
        scale, shift = self.scales(condition).chunk(2, -1)
        return self.out(torch.tanh(self.enter(x)) * (1 + scale) + shift)


class GraphLayer(nn.Module):
    """Messages along a fixed graph, its adjacency a buffer."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.own, self.other = nn.Linear(width, out), nn.Linear(width, out, bias=False)
        self.register_buffer("adjacency", (torch.rand(T, T) < 0.3).float())

    def forward(self, x: Tensor) -> Tensor:
        """Return the nodes' new features."""
        return self.own(x) + self.adjacency @ self.other(x)


class Bilinear(nn.Module):
    """A bilinear layer whose two inputs are a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Bilinear(6, 6, 8)

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        """Multiply the two inputs."""
        return torch.tanh(self.inner(*pair))
