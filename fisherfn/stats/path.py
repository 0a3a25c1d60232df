"""The path of a run: every layer is called as at the build, and no other call reads its parameters.

A model may choose its calls by the values of its inputs. The inputs and output-gradients of a run are read as those of
the calls that the build saw, so another path would give wrong gradients. No tensor is read: only names and
configurations are compared.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from fisherfn.errors import StructureError
from fisherfn.stats.blocks import LayerCall
from fisherfn.stats.intercept import Intercept
from fisherfn.stats.layout import Layout
from fisherfn.stats.records import Record

_REMEDY = "the model's path depends on its input. Build with inputs that take the same path."


def check_path(layout: Layout, mode: Intercept) -> None:
    """Raise unless a run used every layer as often as the build did, and in the same calls.

    Raises:
        StructureError: the run took another path.
    """
    for block in layout.layers:
        uses = len(mode.records.get(block.weight, ()))
        if uses != len(block.uses):
            raise StructureError(
                f"layer {block.key!r} was used {uses} times, {len(block.uses)} at the build: {_REMEDY}"
            )
    check_calls(layout, mode)


def check_calls(layout: Layout, mode: Intercept) -> None:
    """Raise if a run used a parameter in other calls than the build did; how often a layer is used is not compared.

    Raises:
        StructureError: another function, configuration or bias, or another call that reads a parameter of a layer.
    """
    owned = layout.owned
    for key, weight, calls in layout.calls:
        for record, expected in zip(mode.records.get(weight, ()), calls, strict=False):
            if (record.kind, record.call.config, record.bias) == expected:
                continue
            difference = _difference(record, expected, owned)
            if difference:
                raise StructureError(f"layer {key!r} was called {difference}: {_REMEDY}")
    again = owned & mode.other_uses
    if again:
        raise StructureError(f"{min(again)!r} of a layer is read by one more call than at the build: {_REMEDY}")
    for name in layout.unread:
        if mode.reads(name):
            raise StructureError(f"{name!r} is read, unlike at the build: {_REMEDY}")


def _difference(record: Record, expected: LayerCall, owned: Collection[str]) -> str:
    """Return what distinguishes a call from that of the build; empty if nothing does."""
    if record.kind != expected.kind:
        return f"as {record.kind}, at the build as {expected.kind}"
    config = record.call.config
    if config != expected.config and _without_types(config) != _without_types(expected.config):
        return f"with {config}, at the build with {expected.config}"
    if (record.bias if record.bias in owned else None) != expected.bias:
        return f"with the bias {record.bias!r}, at the build with {expected.bias!r}"
    return ""


def _without_types(config: Any) -> list[Any]:
    """Return a configuration without data types: parameters may have another precision than at the build."""
    return [part for part in config or () if not isinstance(part, torch.dtype)]
