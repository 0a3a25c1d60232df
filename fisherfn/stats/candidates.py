"""Conversion of two traces to blocks: which weights look like layers, where their examples are, and which cannot."""

from __future__ import annotations

import torch
from torch import Size, Tensor

from fisherfn.layers import COPIED, ELEMENTWISE, FAMILIES, LINEAR, TIED, TIED_KINDS, FallbackConfig
from fisherfn.stats.blocks import Block, Use
from fisherfn.stats.intercept import Intercept
from fisherfn.stats.records import Record
from fisherfn.stats.scout import Scout
from fisherfn.stats.steps import Place
from fisherfn.types import Tree


def candidates(
    mode: Intercept, more: Intercept, scout: Scout, params: Tree, examples: int
) -> tuple[list[Block], dict[str, str]]:
    """Return a block for each weight that some layer family recognised, and the reasons why others have none."""
    blocks: list[Block] = []
    why: dict[str, str] = {}
    biases_of = [{r.bias for r in records if r.bias is not None} for records in mode.records.values()]
    bias_names = set[str]().union(*biases_of)
    shared = {name for name in bias_names if sum(name in biases for biases in biases_of) > 1}
    claimed = mode.other_uses | shared
    for name in params:
        if name not in mode.records:
            if name in scout.failed:
                why[name] = f"no layer family claims it, read by {scout.failed[name]}"
            elif name not in bias_names and name in mode.other_uses:
                blocks.append(_shared(name, params[name], scout.copied.get(name)))
            continue
        records = mode.records[name]
        kinds = list(dict.fromkeys(r.kind for r in records))
        biases = {r.bias for r in records if r.bias is not None}
        again = more.records.get(name, [])
        places = _places(records, again, examples)
        reason = None
        if any(record.copies for record in again) and name in scout.failed:
            reason = f"{kinds[0]} layer that no example enters, its output read by {scout.failed[name]}"
        elif any(record.selected for record in records):
            reason = f"{kinds[0]} layer whose rows are chosen by values (a mask), not by their place"
        elif places is None:
            reason = f"{kinds[0]} layer whose first axis is not the example's"
        elif name in mode.other_uses:
            reason = f"{kinds[0]} layer of {name!r} is used in other ways too"
        elif set(kinds) == TIED_KINDS and not biases:
            kinds = [TIED.name]
        elif len(kinds) > 1 or len({_matrix_shape(r, params[name]) for r in records}) > 1:
            reason = f"{name!r} is the weight of different layers, {' and '.join(kinds)}"
        if reason is not None or places is None:
            why |= dict.fromkeys({name, *biases}, str(reason))
            continue
        why |= dict.fromkeys(biases & claimed, f"bias of {name!r} that is used in other ways too")
        # a bias that the outputs do not depend on, as that of the last layer under a derivative, is not in params
        bias = next((r.bias for r in records if r.bias in params and r.bias not in claimed), None)
        claimed |= {bias} if bias is not None else set()
        uses = tuple(
            _use(record, other.copies is not None, bias, place, params[name].dtype, kinds[0])
            for record, other, place in zip(records, again, places, strict=True)
        )
        key = name.rpartition(".")[0] or name
        bias_shape = Size() if bias is None else params[bias].shape
        blocks.append(Block(key, kinds[0], name, params[name].shape, bias, bias_shape, uses, _seen(records, uses)))
    return blocks, why


def _shared(name: str, parameter: Tensor, call: str | None) -> Block:
    """Return the block of a parameter that all examples share up to a broadcast or a call run once per example."""
    config = FallbackConfig(parameter.shape)
    use = Use(config, parameter.shape, False, parameter.dtype, shared=True)
    seen = f"seen in the trace{'' if call is None else f', copies for {call}'}; {config.form}"
    kind = ELEMENTWISE if call is None else COPIED
    return Block(name, kind.name, name, parameter.shape, None, Size(), (use,), seen)


def _use(record: Record, shared: bool, bias: str | None, place: Place, dtype: torch.dtype, kind: str) -> Use:
    whole = shared and FAMILIES[record.kind].any_axis
    shape = record.output.shape if whole else Size(n for a, n in enumerate(record.output.shape) if a != place.axis)
    dtype = torch.promote_types(record.output.dtype, dtype)
    transposed = kind == TIED.name and record.kind == LINEAR.name
    return Use(record.call.config, shape, bias is not None and record.bias == bias, dtype, *place, shared, transposed)


def _places(records: list[Record], more: list[Record], examples: int) -> list[Place] | None:
    """Return for each use the position of the examples, with the axis counted from the left; None if not found.

    One example more makes exactly one axis longer, the same one in the layer's input and output.
    """
    if len(records) != len(more):
        return None
    places = []
    for record, other in zip(records, more, strict=True):
        family = FAMILIES[record.kind]
        if other.copies is not None:  # the input is shared by the examples: copies have them on the first axis
            places.append(Place(0, 1 if family.any_axis else record.output.shape[0]))
            continue
        axes = [
            _grown(a.shape, b.shape) for a, b in ((record.call.input, other.call.input), (record.output, other.output))
        ]
        axis = axes[0]
        if axis is None or axes[1] != axis or (axis > 0 and not family.any_axis):
            return None
        length, longer = record.output.shape[axis], other.output.shape[axis]
        if length != record.call.input.shape[axis] or length * (examples + 1) != longer * examples:
            return None
        places.append(Place(axis, length // examples, 1 if other.place is None else other.place.outer))
    return places


def _grown(shape: Size, other: Size) -> int | None:
    """Return the one axis in which two shapes differ; None if there is not exactly one."""
    if len(shape) != len(other):
        return None
    axes = [axis for axis, (a, b) in enumerate(zip(shape, other, strict=True)) if a != b]
    return axes[0] if len(axes) == 1 else None


def _matrix_shape(record: Record, weight: Tensor) -> Size:
    return FAMILIES[record.kind].to_matrix(torch.empty(weight.shape, device="meta"), record.call.config).shape


def _seen(records: list[Record], uses: tuple[Use, ...]) -> str:
    """Return for the report what the trace found."""
    times = f", used {len(uses)} times" if len(uses) > 1 else ""
    g = torch.empty((1, uses[0].repeats, *uses[0].output_shape), device="meta")
    shared = uses[0].repeats * FAMILIES[records[0].kind].columns(g, records[0].call.config).shape[3]
    late = ", no example enters" if any(use.shared for use in uses) else ""
    return f"seen in the trace{times}{late}" + (f", {shared} shared positions" if shared > 1 else "")
