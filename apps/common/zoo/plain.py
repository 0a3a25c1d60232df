"""Nets written with torch alone: one for each kind of module and habit that people have.

Each entry returns a net, a batch of inputs, and the targets: the number of classes, or a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

N, T = 8, 12
Made = tuple[nn.Module, Any, Any]


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


def _image() -> Tensor:
    return torch.randn(N, 3, 16, 16)


def _ids() -> Tensor:
    return torch.randint(99, (N, T))


def _encoder(batch_first: bool, **options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _convolutions(norm: Callable[[int], nn.Module], act: nn.Module) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), norm(16), act, nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 24, 3, padding=1, bias=False), norm(24), act, nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(24, 10),
    )


def _mlp(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(12, 24), *middle, nn.Linear(24, 10))


def _flat() -> Tensor:
    return torch.randn(N, 12)


def _normalised(norm: Callable[..., nn.Module]) -> Made:
    return nn.Sequential(norm(nn.Linear(12, 24)), nn.Tanh(), norm(nn.Linear(24, 10))), _flat(), 10


def _token_classes() -> Tensor:
    return torch.randint(99, (N, T))


NETS: dict[str, Callable[[], Made]] = {
    "mlp": lambda: (_mlp(nn.ReLU()), _flat(), 10),
    "mlp-dropout": lambda: (_mlp(nn.Tanh(), nn.Dropout(0.2)), _flat(), 10),
    "mlp-alpha-dropout": lambda: (_mlp(nn.SELU(), nn.AlphaDropout(0.2)), _flat(), 10),
    "mlp-batch-norm": lambda: (_mlp(nn.BatchNorm1d(24), nn.ReLU()), _flat(), 10),
    "mlp-prelu": lambda: (_mlp(nn.PReLU(24)), _flat(), 10),
    "mlp-bilinear": lambda: (
        nn.Sequential(Apply(lambda x: (x[:, :6], x[:, 6:])), _Bilinear(), nn.Linear(8, 10)), _flat(), 10,
    ),
    "mlp-weight-norm": lambda: _normalised(nn.utils.parametrizations.weight_norm),
    "mlp-spectral-norm": lambda: _normalised(nn.utils.parametrizations.spectral_norm),
    "mlp-orthogonal": lambda: _normalised(nn.utils.parametrizations.orthogonal),
    "autoencoder": lambda: (_autoencoder(), (x := torch.randn(N, 32)), x),
    "cnn-batch-norm": lambda: (_convolutions(nn.BatchNorm2d, nn.ReLU()), _image(), 10),
    "cnn-group-norm": lambda: (_convolutions(lambda c: nn.GroupNorm(4, c), nn.SiLU()), _image(), 10),
    "cnn-instance-norm": lambda: (
        _convolutions(lambda c: nn.InstanceNorm2d(c, affine=True), nn.GELU()), _image(), 10,
    ),
    "cnn-1d": lambda: (
        nn.Sequential(
            nn.Conv1d(4, 16, 5), nn.ReLU(), nn.Conv1d(16, 16, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(224, 10),
        ),
        torch.randn(N, 4, 20), 10,
    ),
    "cnn-3d": lambda: (
        nn.Sequential(nn.Conv3d(2, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(2), nn.Flatten(), nn.Linear(64, 10)),
        torch.randn(N, 2, 6, 6, 6), 10,
    ),
    "cnn-circular": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(32, 10),
        ),
        _image(), 10,
    ),
    "unet": lambda: (UNet(), _image(), torch.randint(5, (N, 16, 16))),
    "pixel-shuffle": lambda: (
        nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 12, 3, padding=1), nn.PixelShuffle(2)),
        _image(), torch.randn(N, 3, 32, 32),
    ),
    "transformer": lambda: (Tokens(_encoder(True)), _ids(), 10),
    "transformer-batch-second": lambda: (
        Tokens(nn.Sequential(Apply(lambda x: x.transpose(0, 1)), _encoder(False), Apply(lambda x: x.transpose(0, 1)))),
        _ids(), 10,
    ),
    "transformer-norm-first": lambda: (Tokens(_encoder(True, norm_first=True, activation="gelu")), _ids(), 10),
    "transformer-tied": lambda: (Tokens(_encoder(True), tied=True, pooled=False), _ids(), _token_classes()),
    "attention": lambda: (Tokens(Attention(batch_first=True)), _ids(), 10),
    "attention-dropout": lambda: (Tokens(Attention(batch_first=True, dropout=0.1)), _ids(), 10),
    "attention-bias": lambda: (Tokens(Attention(batch_first=True, add_bias_kv=True)), _ids(), 10),
    "mixer": lambda: (
        Tokens(nn.Sequential(
            Residual(nn.LayerNorm(32), Apply(lambda x: x.transpose(1, 2)), nn.Linear(T, T),
                     Apply(lambda x: x.transpose(1, 2))),
            Residual(nn.RMSNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)),
        )), _ids(), 10,
    ),
    "embedding-bag": lambda: (nn.Sequential(nn.EmbeddingBag(99, 16), nn.Linear(16, 10)), _ids(), 10),
    "lstm": lambda: (Recurrent(nn.LSTM(24, 32, batch_first=True)), _ids(), 10),
    "lstm-two-layers": lambda: (Recurrent(nn.LSTM(24, 32, 2, batch_first=True, dropout=0.1)), _ids(), 10),
    "lstm-bidirectional": lambda: (Recurrent(nn.LSTM(24, 32, batch_first=True, bidirectional=True), 64), _ids(), 10),
    "gru": lambda: (Recurrent(nn.GRU(24, 32, batch_first=True)), _ids(), 10),
    "rnn": lambda: (Recurrent(nn.RNN(24, 32, batch_first=True)), _ids(), 10),
    "gru-cell": lambda: (Cell(nn.GRUCell(8, 24)), torch.randn(N, T, 8), 10),
    "rnn-cell": lambda: (Cell(nn.RNNCell(8, 24)), torch.randn(N, T, 8), 10),
    "siamese": lambda: (Siamese(), (_flat(), _flat()), 4),
    "deeponet": lambda: (DeepONet(), _flat(), torch.randn(N, 20)),
    "mixture": lambda: (Mixture(), _flat(), 10),
    "film": lambda: (Film(), (_flat(), torch.randn(N, 4)), 10),
    "graph": lambda: (
        nn.Sequential(GraphLayer(6, 16), nn.ReLU(), GraphLayer(16, 16), nn.Flatten(), nn.Linear(16 * T, 10)),
        torch.randn(N, T, 6), 10,
    ),
    "deep-sets": lambda: (
        nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), Apply(lambda x: x.sum(1)), nn.Linear(24, 10)),
        torch.randn(N, T, 6), 10,
    ),
}  # fmt: skip


class _Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Bilinear(6, 6, 8)

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return torch.tanh(self.inner(*pair))


def _autoencoder() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4), nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 32))
