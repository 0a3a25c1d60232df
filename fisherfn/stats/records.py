"""The calls of layers in a run: what is recorded of each, and who may receive them."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from fisherfn.layers import Call
from fisherfn.stats.shared import Copies, Followed
from fisherfn.stats.steps import Place


class Record(NamedTuple):
    """An intercepted call of a layer.

    Attributes:
        kind: name of the layer family.
        call: tensors and static configuration of the call.
        bias: name of the bias, if it is a parameter.
        output: output of the call, before any tap.
        copies: for an input that does not depend on the examples, a function that copies it once per example.
        place: position of the examples in the output, found by the second trace of the build.
        selected: True if values chose the rows of the input, such as those of a mask.
    """

    kind: str
    call: Call
    bias: str | None
    output: Tensor
    copies: Copies | None = None
    place: Place | None = None
    selected: bool = False

    def input(self, examples: int) -> Tensor:
        """Return the input with an axis of examples."""
        return self.call.input if self.copies is None else self.copies(examples)


@runtime_checkable
class Recorder(Protocol):
    """A receiver of layer calls, in place of taps, for a run that is the caller's own."""

    def admit(self, func: Any, args: Any, kwargs: Any, followed: Followed | None) -> None:
        """Raise the typed error for a call that such a run cannot contain."""
        ...

    def tapped(self, name: str, use: int, x: Tensor, output: Tensor, call: Call | None) -> Tensor:
        """Return the output of a use of a layer with a tap; `call` is None if no example enters, so `x` are copies."""
        ...
