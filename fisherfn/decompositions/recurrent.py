r"""Recurrent nets in their elementary calls: two linear layers and a nonlinearity per layer and direction.

`nn.RNNCell`, `nn.GRUCell` and `nn.LSTMCell` reach torch as one call each, and so do whole `nn.RNN`, `nn.GRU` and
`nn.LSTM`. Written out here, the matrix at the input is one linear layer shared over time, and the matrix at the hidden
state (and the projection of an LSTM with `proj_size`) is one that is used once per step. Gates are in torch's order.

n example, t step, i input, h hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

State: TypeAlias = tuple[Tensor, ...]
"""The hidden state `[n, h]`; for an LSTM also the cell state."""

Step: TypeAlias = Callable[..., State]
"""One step: the projected input, the state, and the weights and biases at the hidden state, to the new state."""


def lstm_step(
    gates: Float[Tensor, "n gates"], state: State, w_hh: Tensor, b_hh: Tensor | None, w_hr: Tensor | None = None
) -> State:
    """Hochreiter & Schmidhuber 1997, with a forget gate; `w_hr` projects the hidden state (Sak et al. 2014)."""
    hidden, cell = state
    i, f, g, o = (gates + F.linear(hidden, w_hh, b_hh)).chunk(4, -1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    hidden = o.sigmoid() * cell.tanh()
    return hidden if w_hr is None else F.linear(hidden, w_hr), cell


def gru_step(gates: Float[Tensor, "n gates"], state: State, w_hh: Tensor, b_hh: Tensor | None) -> State:
    """Cho et al. 2014, with the reset gate after the product, as torch has it."""
    (hidden,) = state
    r_x, z_x, n_x = gates.chunk(3, -1)
    r_h, z_h, n_h = F.linear(hidden, w_hh, b_hh).chunk(3, -1)
    z = (z_x + z_h).sigmoid()
    new = (n_x + (r_x + r_h).sigmoid() * n_h).tanh()
    return ((1 - z) * new + z * hidden,)


def rnn_tanh_step(gates: Float[Tensor, "n h"], state: State, w_hh: Tensor, b_hh: Tensor | None) -> State:
    """Elman 1990."""
    return ((gates + F.linear(state[0], w_hh, b_hh)).tanh(),)


def rnn_relu_step(gates: Float[Tensor, "n h"], state: State, w_hh: Tensor, b_hh: Tensor | None) -> State:
    """Elman 1990, with ReLU."""
    return ((gates + F.linear(state[0], w_hh, b_hh)).relu(),)


def cell(
    step: Step,
    x: Float[Tensor, "n i"],
    state: Tensor | Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Any:
    """Return the new state of one cell: a tensor, or hidden and cell state where that is what it was given."""
    alone = isinstance(state, Tensor)
    new = step(F.linear(x, w_ih, b_ih), (state,) if isinstance(state, Tensor) else tuple(state), w_hh, b_hh)
    return new[0] if alone else new


def whole(
    step: Step,
    x: Float[Tensor, "a b i"],
    initial: Tensor | Sequence[Tensor],
    weights: Sequence[Tensor],
    biased: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """Return the outputs and final states of a whole recurrent net, as torch's fused calls do.

    Steps are on axis 1 if `batch_first`, else on axis 0. `weights` has for each layer and direction the two matrices,
    two biases if `biased`, and an LSTM's projection if it has one.
    """
    time, directions = int(batch_first), 1 + bidirectional
    states = (initial,) if isinstance(initial, Tensor) else tuple(initial)
    size = len(weights) // (layers * directions)
    last: list[State] = []
    for layer in range(layers):
        outputs = []
        for backward in range(directions):
            at = layer * directions + backward
            own = weights[at * size : (at + 1) * size]
            start = tuple(state[at] for state in states)
            hidden, final = _one_direction(step, x, start, own, biased, time, bool(backward))
            outputs.append(hidden)
            last.append(final)
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if train and dropout > 0 and layer < layers - 1:  # noise goes with the examples, which have to come first
            x = F.dropout(x, dropout) if batch_first else F.dropout(x.transpose(0, 1), dropout).transpose(0, 1)
    return x, *(torch.stack(each) for each in zip(*last, strict=True))


def _one_direction(
    step: Step, x: Tensor, state: State, weights: Sequence[Tensor], biased: bool, time: int, backward: bool
) -> tuple[Tensor, State]:
    """Return the hidden states of one layer in one direction, and its final state."""
    w_ih, w_hh, *others = weights
    b_ih, b_hh, *projection = others if biased else (None, None, *others)
    gates = F.linear(x, w_ih, b_ih).unbind(time)
    hidden: list[Tensor] = []
    for gates_t in reversed(gates) if backward else gates:
        state = step(gates_t, state, w_hh, b_hh, *projection)
        hidden.append(state[0])
    return torch.stack(hidden[::-1] if backward else hidden, time), state


def is_packed(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a fused call is on a packed sequence, whose examples have no axis."""
    return "batch_sizes" in kwargs or (len(args) > 3 and not isinstance(args[3], (bool, int)))


_CELLS: dict[Callable[..., Any], Step] = {
    torch.lstm_cell: lstm_step,
    torch.gru_cell: gru_step,
    torch.rnn_tanh_cell: rnn_tanh_step,
    torch.rnn_relu_cell: rnn_relu_step,
}
_FUSED: dict[Callable[..., Any], Step] = {
    torch.lstm: lstm_step,
    torch.gru: gru_step,
    torch.rnn_tanh: rnn_tanh_step,
    torch.rnn_relu: rnn_relu_step,
}
FUSED = frozenset(_FUSED)
"""Whole recurrent nets in one call."""

RECURRENT: dict[Callable[..., Any], Callable[..., Any]] = dict(
    chain(
        ((function, partial(cell, step)) for function, step in _CELLS.items()),
        ((function, partial(whole, step)) for function, step in _FUSED.items()),
    )
)
"""The elementary calls that each of torch's consists of."""
