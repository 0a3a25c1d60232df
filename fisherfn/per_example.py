"""Per-example gradients `W_sn = Σ_t g aᵀ` of a tap, formed, or only their squares.

k group, s sample, n example, t and u positions, o output, i input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import rows
from fisherfn.taps import WINDOW, AnyTap

T = TypeVar("T", bound=AnyTap)


def example_matrices(tap: AnyTap) -> Float[Tensor, "s n k o i"]:
    """Return `W_sn = Σ_t g aᵀ` of every sample and example: `S·N` times the size of the layer."""
    parts = [rows.outer_each(part.g, part.a).permute(1, 2, 0, 3, 4) for part in tap.windows()]
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def flat_example_matrices(taps: Iterable[AnyTap]) -> Float[Tensor, "m p"]:
    """Return the `vec(W_sn)` of some blocks as rows: samples outermost, then examples; blocks side by side."""
    return torch.cat([example_matrices(tap).flatten(2).flatten(0, 1) for tap in taps], -1)


def matrix_windows(tap: T) -> Iterator[T]:
    """Yield windows whose `example_matrices` are small enough for fast memory."""
    k, s, n, _, o, i = tap.sizes
    step = max(1, WINDOW // (s * k * o * i))
    for start in range(0, n, step):
        yield tap.window(slice(start, min(start + step, n)))


def squares(tap: AnyTap) -> Float[Tensor, "k o i"]:
    """Return `Σ_sn W_sn²`, entry by entry."""
    if tap.sizes.t == 1:  # a product of two entries: no W is formed
        parts = [rows.outer(part.g.square().sum(1), rows.squared(part.a)) for part in tap.windows()]
    elif tap.one_hot:  # a column's gradient is the sum of g over the positions with its index
        parts = []
        for part in tap.windows():
            same = rows.alike(part.a).to(part.g.dtype)  # type: ignore[arg-type]
            sums = torch.einsum("kntu,ksnuo->ksnto", same, part.g)
            parts.append(rows.outer((part.g * sums).sum(1), part.a))
    else:
        parts = [example_matrices(part).square().sum((0, 1)) for part in matrix_windows(tap)]
    return torch.stack(parts).sum(0)
