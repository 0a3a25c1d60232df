"""The small nets of the zoo."""

import torch
from torch import nn


def mlp(
    *widths, act: type[nn.Module] | None = nn.Tanh, bias=True, last: type[nn.Module] | None = None
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for d_in, d_out in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(d_in, d_out, bias=bias)] + ([act()] if act else [])
    layers = layers[:-1] if act else layers
    return nn.Sequential(*layers, *([last()] if last else []))


class Pool(nn.Module):
    def forward(self, x):
        return x.mean(dim=-2)


class Squeeze(nn.Module):
    """Outputs `[N]`: one number an example."""

    def forward(self, x):
        return x.squeeze(-1)


class Tied(nn.Module):
    """One layer used twice."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.shared(torch.tanh(self.shared(torch.tanh(self.first(x)))))))


class TiedWeights(nn.Module):
    """Two layers with one weight and a bias each."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Scaled(nn.Module):
    """Linear layers with a scale vector between them: no layer claims the vector."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)) * self.scale)


class Matmul(nn.Module):
    """`x @ W` is no F.linear."""

    def __init__(self):
        super().__init__()
        self.W, self.last = nn.Parameter(torch.ones(3, 4)), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(torch.tanh(x @ self.W))


class Elsewhere(nn.Module):
    """A weight used by F.linear and once more by other means: only numbers show it."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)) + 0.5 * (x @ self.first.weight))
