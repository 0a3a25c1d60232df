"""Matrix products at full speed: rows at aligned addresses, and half of a symmetric result.

k group, m row.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

ALIGNED = 16
"""Length of which a row of a wide product is made a multiple, in numbers."""

FEW = 16
"""Rows of a product below which a copy of its right side takes longer than the product."""

WIDE = 256
"""Width from which a product of many rows with themselves is split into blocks."""


def matmul(x: Float[Tensor, "... m j"], y: Float[Tensor, "... j i"]) -> Float[Tensor, "... m i"]:
    """Return `x y`; for two batches of matrices in one call, where `@` takes six."""
    return torch.bmm(x, y) if x.ndim == y.ndim == 3 and x.shape[0] == y.shape[0] else x @ y


def product(x: Float[Tensor, "k m j"], y: Float[Tensor, "k j i"], factor: float = 1.0) -> Float[Tensor, "k m i"]:
    """Return `factor · x y`, equally fast for odd and even widths."""
    width, wide = y.shape[-1], _aligned(y) if x.shape[-2] >= FEW else y
    result = torch.baddbmm(x.new_zeros(()), x, wide, beta=0, alpha=factor)
    return result if wide is y else result[..., :width]


def _aligned(y: Float[Tensor, "k j i"]) -> Float[Tensor, "k j wide"]:
    """Pad with columns of zeros to an aligned width.

    A wide product with rows at odd addresses (784 inputs and a bias are 785 columns) takes up to twice as long as one
    of aligned width. The copy takes a tenth of the product's time.
    """
    missing = -y.shape[-1] % ALIGNED
    return F.pad(y, (0, missing)) if missing and y.shape[-1] >= WIDE else y


def gram(rows: Float[Tensor, "k m i"]) -> Float[Tensor, "k m m"]:
    """Return `rows rowsᵀ`; for many rows only the blocks on and right of the diagonal are computed, 5/8 of the work."""
    m, i = rows.shape[1:]
    if m < WIDE or i < m:
        return matmul(rows, rows.mT)
    return _in_panels(rows)


def square(flat: Float[Tensor, "k m i"]) -> Float[Tensor, "k i i"]:
    """Return `flatᵀ flat`; for many rows only the blocks on and above the diagonal are computed, 5/8 of the work."""
    m, i = flat.shape[1:]
    if i < WIDE or m < 4 * i:
        wide = _aligned(flat)
        moment = matmul(wide.mT, wide)
        return moment if wide is flat else moment[:, :i, :i]
    return _in_panels(flat.mT)


def _in_panels(rows: Float[Tensor, "k m i"]) -> Float[Tensor, "k m m"]:
    """Return `rows rowsᵀ` from four panels on and right of the diagonal, and their transposes."""
    m = rows.shape[1]
    size = -(-m // 4)
    gram = rows.new_empty(rows.shape[0], m, m)
    for start in range(0, m, size):
        panel = rows[:, start : start + size] @ rows[:, start:].mT
        gram[:, start : start + size, start:] = panel
        gram[:, start:, start : start + size] = panel.mT
    return gram
