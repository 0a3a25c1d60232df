r"""Recurrent cells in their elementary calls: two linear layers and a nonlinearity.

`nn.RNNCell`, `nn.GRUCell` and `nn.LSTMCell` reach torch as one call each. Gates are in torch's order. The fused
`nn.LSTM`, `nn.GRU` and `nn.RNN` hide their steps; for these the build says what to write instead.

n example, h hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def lstm_cell(
    x: Float[Tensor, "n i"],
    state: tuple[Tensor, Tensor] | list[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Float[Tensor, "n h"], Float[Tensor, "n h"]]:
    """Hochreiter & Schmidhuber 1997, with a forget gate: the new hidden and cell state."""
    hidden, cell = state
    i, f, g, o = (F.linear(x, w_ih, b_ih) + F.linear(hidden, w_hh, b_hh)).chunk(4, -1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def gru_cell(
    x: Float[Tensor, "n i"],
    hidden: Float[Tensor, "n h"],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Float[Tensor, "n h"]:
    """Cho et al. 2014: the new hidden state."""
    r_x, z_x, n_x = F.linear(x, w_ih, b_ih).chunk(3, -1)
    r_h, z_h, n_h = F.linear(hidden, w_hh, b_hh).chunk(3, -1)
    z = (z_x + z_h).sigmoid()
    new = (n_x + (r_x + r_h).sigmoid() * n_h).tanh()
    return (1 - z) * new + z * hidden


def rnn_tanh_cell(
    x: Tensor, hidden: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Float[Tensor, "n h"]:
    """Elman 1990: the new hidden state."""
    return (F.linear(x, w_ih, b_ih) + F.linear(hidden, w_hh, b_hh)).tanh()


def rnn_relu_cell(
    x: Tensor, hidden: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Float[Tensor, "n h"]:
    """The same with ReLU."""
    return (F.linear(x, w_ih, b_ih) + F.linear(hidden, w_hh, b_hh)).relu()


CELLS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.lstm_cell: lstm_cell,
    torch.gru_cell: gru_cell,
    torch.rnn_tanh_cell: rnn_tanh_cell,
    torch.rnn_relu_cell: rnn_relu_cell,
}
