"""Seeing layers without hooks: a torch-function mode around one run of the model.

The mode recognises calls whose weight *is* one of the parameters (the same tensor), notes their inputs and adds a zero
"tap" to their outputs. Differentiating by the taps gives output-gradients, and no module is ever changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisherfn import tree
from fisherfn.errors import CoverageError, NoiseError
from fisherfn.layers import (
    Call,
    Elementary,
    apart,
    changes_weight,
    couples_examples,
    draws_globally,
    families,
    is_fused_recurrence,
)
from fisherfn.types import PyTree, Tree

Taps = dict[str, tuple[Tensor, ...]]
"""Zero taps (or their gradients): for each weight's name one tensor a use."""


class Record(NamedTuple):
    """An intercepted call, by names."""

    kind: str
    call: Call
    bias: str | None
    output: Tensor


class Intercept(Elementary):
    """Records the layer calls of a run; with `taps`, adds them to the outputs in order of use.

    Without taps (the build's trace) it also notes which parameters anything but a layer reads, and whether some call
    couples examples. With `uncoupled`, batch norms keep their batch's statistics fixed, so that the coupling they are
    known for does not hide another.
    """

    def __init__(self, params: Tree, taps: Taps | None = None, uncoupled: bool = False) -> None:
        super().__init__()
        self._uncoupled = uncoupled
        self._names = {id(tensor): name for name, tensor in params.items()}
        self._taps = taps
        self._entered = _level()
        self.records: dict[str, list[Record]] = {}
        self.other_uses: set[str] = set()
        self.couples = False

    def elementary(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a call, and notes what it is to the parameters."""
        self._refuse(func, args, kwargs)
        couples = couples_examples(func, args, kwargs)
        self.couples |= couples
        output = apart(args, kwargs) if couples and self._uncoupled else func(*args, **kwargs)
        # what a layer sees inside a transform of the model's own (jvp, grad, vmap) is nothing once that has ended
        for family in families(func) if _level() == self._entered else ():
            call = family.match(func, args, kwargs)
            if call is not None and id(call.weight) in self._names:
                self._note_reads(output, (args, kwargs), besides=(call.weight, call.bias))
                return self._record(family.name, call, output)
        self._note_reads(output, (args, kwargs))
        return output

    def _refuse(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if draws_globally(func, args, kwargs):
            raise NoiseError(
                f"the model calls {func.__name__}, which draws from the global generator: a gradient would not be a "
                "function of its arguments. Call net.eval(), or make the model with ff.functional(net) and put "
                'context["dropout"] = ff.dropout_seeds(N, generator); other noise is an input like x, or a context.'
            )
        if changes_weight(func, args, kwargs):
            raise CoverageError(
                "the model renormalises an embedding while it runs (max_norm), which changes the caller's parameters: "
                "drop max_norm and renormalise between steps."
            )
        if is_fused_recurrence(func) and any(id(leaf) in self._names for leaf in tree.leaves((args, kwargs))):
            raise CoverageError(
                f"the model calls the fused {func.__name__}, whose steps cannot be seen one by one, and no per-example "
                "gradient can be had of it: write the recurrence with nn.Linear or a cell (nn.LSTMCell, nn.GRUCell), "
                "or keep its parameters out of params."
            )

    def _note_reads(self, output: Any, arguments: PyTree, besides: tuple[Tensor | None, ...] = ()) -> None:
        """Parameters that a call turns into tensors in another way than a layer's (asking for a shape is none)."""
        if self._taps is not None or not any(isinstance(leaf, Tensor) for leaf in tree.leaves(output)):
            return
        known = {id(tensor) for tensor in besides}
        read = {id(leaf) for leaf in tree.leaves(arguments)} - known
        self.other_uses |= {name for key, name in self._names.items() if key in read}

    def _record(self, kind: str, call: Call, output: Tensor) -> Tensor:
        name = self._names[id(call.weight)]
        records = self.records.setdefault(name, [])
        bias = None if call.bias is None else self._names.get(id(call.bias))
        records.append(Record(kind, call, bias, output))
        taps = () if self._taps is None else self._taps.get(name, ())
        if len(records) > len(taps):
            return output
        return output + taps[len(records) - 1].to(output.dtype)


def _level() -> int | None:
    """How many of torch's function transforms are around."""
    level: int | None = torch._C._functorch.maybe_current_level()
    return level
