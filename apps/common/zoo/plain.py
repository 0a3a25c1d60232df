"""Nets written with torch alone: one for each kind of module and habit that people have.

Each entry returns a net, a batch of inputs, and the targets: the number of classes, or a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common.zoo.modules import (
    Apply,
    Attention,
    Bilinear,
    Cell,
    DeepONet,
    Film,
    GraphLayer,
    Mixture,
    N,
    Recurrent,
    Residual,
    Siamese,
    T,
    Tokens,
    UNet,
)

Made = tuple[nn.Module, Any, Any]


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
        nn.Sequential(Apply(lambda x: (x[:, :6], x[:, 6:])), Bilinear(), nn.Linear(8, 10)), _flat(), 10,
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


def _autoencoder() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4), nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 32))
