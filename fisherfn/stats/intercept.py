"""Interception of layers without hooks: a torch-function mode around one run of the model.

The mode recognises calls whose weight *is* one of the parameters (the same tensor), records their inputs and adds a
zero "tap" to their outputs. Differentiating with respect to the taps gives the output-gradients, and no module is ever
changed. If the input of a call does not depend on the examples, the tap is added at a later broadcast
(`fisherfn.stats.shared`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fisherfn import decompositions, randomness, tree
from fisherfn.decompositions import Elementary, without_affine
from fisherfn.errors import StructureError
from fisherfn.layers import (
    ELEMENTWISE,
    EMBEDDING,
    Call,
    Family,
    Orders,
    as_experts,
    as_grouped_product,
    families,
    is_transpose,
    untransposed,
)
from fisherfn.stats.reads import changes_nothing, inside_function, values_read
from fisherfn.stats.records import Record, Recorder
from fisherfn.stats.scout import Scout
from fisherfn.stats.selected import Selected
from fisherfn.stats.shared import Followed, layer_copies, spread
from fisherfn.stats.steps import Growth, Traced, traced
from fisherfn.types import PyTree, Tree

Taps = dict[str, tuple[Tensor, ...]]
"""Zero taps (or their gradients): one tensor per use, under the name of the weight."""


_NESTED = {list, tuple, dict}
"""Types of arguments that may hold tensors."""


class Intercept(Elementary):
    """Record the layer calls of a run, and add `taps`, if given, to the outputs in order of use.

    The mode also records which parameters are read by calls other than layers, and whether some call couples examples.

    Args:
        params: the parameters, recognised by identity.
        taps: zero taps for each use of a layer.
        uncoupled: hold the batch statistics of batch norms fixed, so that their known coupling does not hide another.
        shared: object that finds the tensors shared by all examples (second trace of the build) or follows them.
        recorder: receiver of the layer calls, in place of `taps`.
    """

    def __init__(
        self,
        params: Tree,
        taps: Taps | None = None,
        uncoupled: bool = False,
        shared: Scout | Followed | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        super().__init__()
        self._uncoupled = uncoupled
        self._params = params
        self._names = {id(tensor): name for name, tensor in params.items()}
        self._taps = taps
        self._recorder = recorder
        self._entered = _level()
        self._shared = shared
        self._scout = shared if isinstance(shared, Scout) else None
        self._followed = shared if isinstance(shared, Followed) else None
        self.records: dict[str, list[Record]] = {}
        self.other_uses: set[str] = set()
        self.couples = False
        self.trace: list[Traced] = []  # the calls of a trace, with their names and shapes
        self._transposes: dict[int, tuple[Tensor, Tensor]] = {}
        self._orders = Orders()
        self._tracing = taps is None and recorder is None and self._followed is None
        self._selected = Selected() if self._tracing else None
        for name in self._followed.plan.parameters if self._followed else ():
            self._follow(name, params[name])

    def begin(self, inputs: PyTree) -> None:
        """Note the inputs of a run of the build, whose values may choose rows."""
        if self._selected is not None:
            self._selected.begin(inputs)

    def elementary(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call, and record it if it is a layer or reads parameters."""
        if self._recorder is None:
            randomness.refuse(func, args, kwargs)
            for family in families(func):
                family.refuse(func, args, kwargs)
            decompositions.refuse(func, args, kwargs, self._is_parameter)
        else:
            self._recorder.admit(func, args, kwargs, self._followed)
        # tensors inside a transform that the model itself applies (jvp, grad, vmap) are invalid after it has ended
        here = _level() == self._entered and not (self._tracing and inside_function())
        simpler = self._simpler(func, args, kwargs) if here else None
        if simpler is not None:
            with self:
                return simpler()
        if here and args and id(args[0]) in self._names and changes_nothing(func, args, kwargs):
            return args[0]
        if self._followed is not None and here:
            shared = self._followed.among(values_read(func, args, kwargs))
            if shared and not self._enters_layer(func, args, kwargs):
                output = self._followed.take(func, args, kwargs, shared)
                self._note_reads(func, output, args, kwargs)
                return output
        uncoupled = self._without_coupling(func, args, kwargs)
        output = uncoupled() if uncoupled is not None and self._uncoupled else func(*args, **kwargs)
        self._orders.note(func, args, output)
        if self._selected is not None:
            with torch._C.DisableTorchFunction():
                self._selected.note(func, args, (args, kwargs), output)
        growth = self._compare(func, (args, kwargs), output)
        # a kernel that a batch norm standardises has no examples
        self.couples |= uncoupled is not None and growth != [None]
        matched = self._match(func, args, kwargs) if here else None
        if matched is not None:
            self._note_reads(func, output, args, kwargs, matched[1])
            return self._record(*matched, func, args, kwargs, output, growth)
        if here and args and id(args[0]) in self._names and is_transpose(func, args[0], output):
            self._transposes[id(output)] = output, args[0]  # a call that uses the transpose reads the weight
        else:
            self._note_reads(func, output, args, kwargs)
        if self._scout is not None:
            self._scout.look(func, args, kwargs, output, growth if here else None, self._names)
        return output

    def _simpler(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the call rewritten as a plain layer and further calls; None if it needs no rewriting."""

        def original(tensor: Any) -> Tensor | None:
            return self._transposes[id(tensor)][1] if id(tensor) in self._transposes else None

        plain = untransposed(func, args, kwargs, original) if self._transposes else None
        plain = plain or as_experts(func, args, kwargs, self._orders, self._is_parameter, original)
        plain = plain or as_grouped_product(func, args, kwargs, self._is_parameter)
        return plain or without_affine(func, args, kwargs, partial(self._apart, (args, kwargs)))

    def _match(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Family, Call] | None:
        """Return the family and the call of a layer whose weight is a parameter; None for any other call."""
        for family in families(func):
            call = family.match(func, args, kwargs)
            if call is not None and id(call.weight) in self._names:
                return family, call
        return None

    def _without_coupling(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[[], Tensor] | None:
        """Return a version without mixing of a call that mixes examples by design; None for any other call."""
        found = (family.uncoupled(func, args, kwargs) for family in families(func))
        return next((call for call in found if call is not None), None)

    def _is_parameter(self, leaf: Any) -> bool:
        return id(leaf) in self._names

    def _note_reads(self, func: Any, output: Any, args: Any, kwargs: Any, call: Call | None = None) -> None:
        """Record the parameters from which a call computes tensors, besides as a layer (reading a shape is no use)."""
        values: Sequence[Any] = (*args, *kwargs.values()) if kwargs else args
        if not _NESTED.isdisjoint(map(type, values)):
            values = tree.leaves(values)
        # every call of every step comes here: most read no parameter, and most others are layers
        if self._names.keys().isdisjoint(map(id, values)) and self._transposes.keys().isdisjoint(map(id, values)):
            return
        read = {*map(id, tree.leaves(values_read(func, args, kwargs)))}
        if call is not None:
            read -= {id(call.weight), id(call.bias)}
        read |= {id(self._transposes[key][1]) for key in read & self._transposes.keys()}
        read &= self._names.keys()
        if read and any(isinstance(leaf, Tensor) for leaf in tree.leaves(output)):
            self.other_uses |= {self._names[key] for key in read}

    def reads(self, name: str) -> bool:
        """Return True if some call read this parameter."""
        biases = (record.bias for records in self.records.values() for record in records)
        return name in self.other_uses or name in self.records or name in biases

    def _record(
        self,
        family: Family,
        call: Call,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
        growth: Growth,
    ) -> Tensor:
        name = self._names[id(call.weight)]
        use = len(self.records.setdefault(name, []))
        bias = None if call.bias is None else self._names.get(id(call.bias))
        selected = self._selected is not None and call.input in self._selected
        if selected or not self._is_shared_use(name, use, growth):  # no selected row may look like none of any example
            place = growth[0] if growth else None
            self.records[name].append(Record(family.name, call, bias, output, place=place, selected=selected))
            if self._scout is not None:
                own = (call.weight, call.bias if bias is not None else None)
                self._scout.look(func, args, kwargs, output, growth, self._names, besides=own)
            return self._tapped(name, use, call.input, output, call)
        assert self._shared is not None
        if self._scout is not None:
            self._scout.note_parameters((args, kwargs), self._names, besides=(call.weight, call.bias))
        shared = self._shared.among(args, kwargs)
        shared = {key: entry for key, entry in shared.items() if key not in (id(call.weight), id(call.bias))}
        inputs, outputs = layer_copies(
            shared, family, func, args, kwargs, call, output, lambda x, y: self._tapped(name, use, x, y)
        )
        self.records[name].append(Record(family.name, call, bias, output, inputs))
        self._shared.add_layer(func, name, shared, output, outputs)
        return output

    def _tapped(self, name: str, use: int, x: Tensor, output: Tensor, call: Call | None = None) -> Tensor:
        """Return an output with its tap, if there is one; `x` is the input, `call` None if the input is shared."""
        if self._recorder is not None:
            return self._recorder.tapped(name, use, x, output, call)
        taps = () if self._taps is None else self._taps.get(name, ())
        if use >= len(taps):
            return output
        if taps[use].shape != output.shape:  # torch would broadcast one position to many
            raise StructureError(
                f"the output of {name!r} has shape {tuple(output.shape)}, and by the build {tuple(taps[use].shape)}: "
                "values of the inputs change shapes inside the model. Trim or select outside of it, or mask instead."
            )
        return output + taps[use].to(output.dtype)

    # ------------------------------------------------------------------------- tensors shared by all examples

    def _follow(self, name: str, parameter: Tensor) -> None:
        """Follow a parameter that all examples share: its copies are the parameter plus its tap."""
        assert self._followed is not None

        def ones(examples: int) -> Tensor:
            return parameter.new_ones(examples)

        def copies(examples: int) -> Tensor:
            return self._tapped(name, 0, ones(examples), spread(parameter, examples))

        self.records[name] = [Record(ELEMENTWISE.name, Call(parameter, parameter, None), None, parameter, ones)]
        self._followed.add(parameter, frozenset([name]), copies)

    def _apart(self, arguments: PyTree, weight: Any, bias: Any) -> tuple[bool, bool]:
        """Return for a layer's weight and its bias True if each should be applied in a call of its own.

        A tensor that is no parameter may be computed from parameters; only a run with a plan knows this. If a layer's
        input is shared, the plan has a step for each of its calls.
        """
        follows = self._followed is None or bool(self._followed.among(arguments))

        def computed(tensor: Any) -> bool:
            return isinstance(tensor, Tensor) and id(tensor) not in self._names and follows

        tied = any(record.kind == EMBEDDING.name for record in self.records.get(self._names.get(id(weight), ""), ()))
        bias_alone = id(bias) in self._names and (tied or id(weight) not in self._names)
        return computed(weight), computed(bias) or bias_alone

    def _enters_layer(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return True if a call on shared tensors is a use of a layer in the plan; this consumes its step."""
        assert self._followed is not None
        matched = self._match(func, args, kwargs)
        if matched is None:
            return False
        name = self._names[id(matched[1].weight)]
        if not self._is_shared_use(name, len(self.records.get(name, ())), None):
            return False
        self._followed.next(func)
        return True

    def _is_shared_use(self, name: str, use: int, growth: Growth) -> bool:
        """Return True if the input of this use of a layer does not depend on the examples."""
        if self._followed is None:
            return growth == [None]
        uses = self._followed.plan.layers.get(name, ())
        return use < len(uses) and uses[use]

    def _compare(self, func: Callable[..., Any], arguments: PyTree, output: Any) -> Growth:
        """Return how the outputs grow with the number of examples, in the second of two traces."""
        if self._scout is not None:
            return self._scout.growth(func, arguments, output)
        if self._taps is None:
            self.trace.append(traced(func, arguments, output))
        return None


def _level() -> int | None:
    """Return the nesting level of torch's function transforms; None outside of all."""
    level: int | None = torch._C._functorch.maybe_current_level()
    return level
