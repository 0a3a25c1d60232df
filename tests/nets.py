"""The small nets of the zoo."""

import torch
import torch.nn.functional as F
from torch import nn


def mlp(
    *widths, act: type[nn.Module] | None = nn.Tanh, bias=True, last: type[nn.Module] | None = None
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for d_in, d_out in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(d_in, d_out, bias=bias)] + ([act()] if act else [])
    layers = layers[:-1] if act else layers
    return nn.Sequential(*layers, *([last()] if last else []))


def conv_autoencoder() -> nn.Sequential:
    """`[N, 1, 4, 4]` in, `[N, 1, 4, 3]` out."""
    decoder = nn.ConvTranspose2d(2, 1, 2, 2, padding=(0, 1), output_padding=(0, 1))
    return nn.Sequential(nn.Conv2d(1, 2, 2, 2), nn.Softplus(), decoder)


class Pool(nn.Module):
    def forward(self, x):
        return x.mean(dim=-2)


class Squeeze(nn.Module):
    """Outputs `[N]`: one number per example."""

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
    """Linear layers with a scale vector between them."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)) * self.scale)


def outside(w):
    """The same numbers, written into another tensor: in no layer, and in no call that can be followed."""
    h = torch.empty_like(w)
    h[...] = w
    return h


class Diagonal(Scaled):
    """The same with a diagonal matrix that no layer claims."""

    def forward(self, x):
        return self.last(F.linear(torch.tanh(self.first(x)), torch.diag(outside(self.scale))))


class Language(nn.Module):
    """A causal language model on hand-written parts whose output layer is its embedding."""

    def __init__(self, words=4, width=3, length=3, bias=True):
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.mix, self.head = nn.Linear(width, width), nn.Linear(width, words, bias=bias)
        self.head.weight = self.words.weight

    def forward(self, ids):
        h = self.words(ids) + self.places(torch.arange(ids.shape[1]).unsqueeze(0))
        return self.head(torch.tanh(h + self.mix(h.cumsum(1))))


class Patches(nn.Module):
    """A transformer of hand-written parts, as vision and language models have them.

    Class token, position embedding, a table of positions, a net on a grid, RMSNorm, layer scale, a computed bias.
    """

    def __init__(self, width=3, length=3, outputs=2):
        super().__init__()
        self.cls, self.pos = nn.Parameter(torch.ones(1, 1, width)), nn.Parameter(torch.ones(1, length, width))
        self.words, self.table = nn.Embedding(length, width), nn.Parameter(torch.ones(2 * length - 1, 1))
        self.grid = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, width, bias=False))
        self.gain, self.scale = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.inner, self.q_bias = nn.Linear(width, width, bias=False), nn.Parameter(torch.ones(width - 1))
        self.last, self.shift = nn.Linear(width, outputs), nn.Parameter(torch.ones(outputs))
        place = torch.arange(length)
        self.register_buffer("place", place)
        self.register_buffer("relative", place[:, None] - place + length - 1)

    def forward(self, x):
        h = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        h = h + self.words(self.place.unsqueeze(0)) * self.grid(self.place.to(h).unsqueeze(-1))
        mixed = (self.table[self.relative.flatten()].view(*self.relative.shape) + h @ h.mT).softmax(-1) @ h
        mixed = (1.0 + self.gain) * (mixed * torch.rsqrt(mixed.square().mean(-1, keepdim=True) + 0.1))
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias[:1])])
        h = h + self.scale.view(1, 1, -1) * F.linear(mixed, self.inner.weight, bias)
        out = self.last(torch.tanh(h[:, 0]))
        out += self.shift
        return out


class Matmul(nn.Module):
    """`x @ W`: a linear layer without F.linear."""

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


class Readout(nn.Module):
    """Fixed curved outputs `[N, d]` of everything an example has: output-gradients that differ everywhere."""

    def __init__(self, d_out):
        super().__init__()
        self.d_out = d_out

    def forward(self, x):
        flat = torch.tanh(x.flatten(1))
        entry, output = torch.arange(flat.shape[1]), torch.arange(1, self.d_out + 1)
        weight = torch.cos(entry[:, None] * output + output)
        return (flat.unsqueeze(-1) * weight.to(flat)).sum(1)


class MeanPool(nn.Module):
    """Global average pooling of `[N, C, *T]`."""

    def forward(self, x):
        return x.flatten(2).mean(-1)


class Swap(nn.Module):
    """`[N, T, C]` as `[N, C, T]`."""

    def forward(self, x):
        return x.mT


class Separate(nn.Module):
    """G layers, each on its own channels: what `groups=G` means."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        parts = x.chunk(len(self.layers), dim=1)
        return torch.cat([layer(part) for layer, part in zip(self.layers, parts, strict=True)], dim=1)


# ------------------------------------------------------------------------------------------------------ sequences


class Conv1D(nn.Module):
    """A linear layer as GPT-2 writes it: the weight `[d_in, d_out]` on the right, examples and positions merged."""

    def __init__(self, d_out, d_in):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(d_in, d_out)), nn.Parameter(torch.ones(d_out))

    def forward(self, x):
        size = (*x.shape[:-1], self.bias.shape[0])
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(size)


class Attention(nn.Module):
    """Self-attention with a linear layer each for queries, keys, values and output, as in most language models."""

    def __init__(self, width, heads, causal=False, fused=True):
        super().__init__()
        self.heads, self.causal, self.fused = heads, causal, fused
        self.q_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(3))
        self.k_proj = nn.Linear(width, width, bias=False)  # a bias of the keys cancels in the softmax

    def forward(self, x):
        q, k, v = (self.split(layer(x)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            mixed = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v
        return self.out_proj(mixed.transpose(1, 2).reshape(x.shape))

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width, heads, hidden, causal=False, fused=True):
        super().__init__()
        self.attention = Attention(width, heads, causal, fused)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Tokens in, class logits out: embeddings of words and positions, one block, a norm, a head on the mean."""

    def __init__(self, vocabulary=5, length=3, width=4, heads=2, hidden=3, classes=2, causal=False, fused=True):
        super().__init__()
        self.words, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.block = Block(width, heads, hidden, causal, fused)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, ids):
        order = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        x = self.words(ids) + self.positions(order)
        return self.head(self.norm(self.block(x)).mean(1))


class Cell(nn.Module):
    """An Elman network written with linear layers, unrolled over `[N, T, d]`: the last state."""

    def __init__(self, d_in, d_hidden):
        super().__init__()
        self.inner, self.outer = nn.Linear(d_hidden, d_hidden), nn.Linear(d_in, d_hidden, bias=False)

    def forward(self, x):
        state = x.new_zeros(len(x), self.inner.in_features)
        for x_t in x.unbind(1):
            state = torch.tanh(self.outer(x_t) + self.inner(state))
        return state


class OldSquare(torch.autograd.Function):
    """The square in the form that `torch.func` refuses: without `setup_context`."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


class Straight(torch.autograd.Function):
    """A sign with the gradient of the identity, without a rule for vmap or forward mode."""

    @staticmethod
    def forward(x):
        return x.sign()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g
