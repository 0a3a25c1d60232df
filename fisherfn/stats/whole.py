"""Recognise tensors that are sharded over ranks, without importing what makes them, and tensors that share memory."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisherfn.errors import StructureError


def is_sharded(tensor: object) -> bool:
    """Return True for a DTensor, as FSDP2 and tensor parallelism make them."""
    module: Any = sys.modules.get("torch.distributed.tensor")  # without this module no such tensor exists
    return module is not None and isinstance(tensor, module.DTensor)


def check_whole(tensors: Mapping[str, Tensor]) -> None:
    """Raise `StructureError` if a tensor is sharded over ranks."""
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            raise StructureError(
                f"{name!r} is a DTensor, as FSDP2 and tensor parallelism make them, and this call needs whole tensors: "
                "pass `param.full_tensor()`, and a net without fully_shard. The natural gradient of "
                "ff.distributed.data_parallel takes parameters that fully_shard has sharded in ng.init, ng.stats, "
                "ng.step and ng.precondition."
            )


def check_apart(tensors: Mapping[str, Tensor]) -> None:
    """Raise `StructureError` if two trained parameters share numbers: a step of one would replace that of the other."""
    plain = {name: p for name, p in tensors.items() if type(p) in (Tensor, nn.Parameter) and p.requires_grad}
    own = {name: p for name, p in plain.items() if p.device.type != "meta"}
    places: dict[int, list[str]] = {}
    for name, p in own.items():
        if p.numel() and p.layout == torch.strided:
            places.setdefault(p.untyped_storage().data_ptr(), []).append(name)
    for names in places.values():
        for one, other in itertools.combinations(names, 2):
            if _meet(own[one], own[other]):
                raise StructureError(
                    f"the parameters {one!r} and {other!r} share memory, so a step of one would change the other: make "
                    "them one parameter (dec.weight = enc.weight), or use it as it is needed in the forward "
                    "(x @ enc.weight)."
                )


def _meet(one: Tensor, other: Tensor) -> bool:
    """Return True if two tensors of one storage have a number in common."""
    first, second = sorted((one, other), key=lambda p: p.storage_offset())
    end = first.storage_offset() + sum((n - 1) * step for n, step in zip(first.shape, first.stride(), strict=True))
    if end < second.storage_offset():
        return False
    mark = torch.zeros(one.untyped_storage().nbytes() // one.element_size(), dtype=torch.bool)
    mark.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
    return bool(mark.as_strided(other.shape, other.stride(), other.storage_offset()).any())
