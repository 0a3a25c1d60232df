"""Recognise tensors that are sharded over ranks, without importing what makes them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor

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
