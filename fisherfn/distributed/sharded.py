"""Parameters that are sharded over the ranks on their first dimension, as `fully_shard` (FSDP2) leaves them.

They are whole only during a call that runs the model: one message gathers all of them. What the call returns for the
parameters is cut into the same shards.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fisherfn.distributed.agreement import fingerprint
from fisherfn.distributed.ranks import Ranks, from_bytes
from fisherfn.errors import StructureError
from fisherfn.stats.whole import is_sharded
from fisherfn.types import Tree


@dataclass(frozen=True)
class Sharding:
    """The placement of a tree like params: some tensors are sharded on their first dimension, the others are whole.

    Attributes:
        ranks: the ranks that hold the shards, in the order of the shards.
        meshes: the device mesh of each sharded tensor, by name.
    """

    ranks: Ranks
    meshes: Mapping[str, Any]

    def gather(self, values: Mapping[str, Tensor]) -> Tree:
        """Return the tree with whole tensors, equal on all ranks: one message for all shards."""
        mine = {name: values[name].detach().to_local() for name in self.meshes}  # type: ignore[attr-defined]
        everyone = range(self.ranks.size)
        rows = {name: [rows_of(values[name], rank, self.ranks.size) for rank in everyone] for name in mine}
        width = {name: values[name].shape[1:].numel() * local.element_size() for name, local in mine.items()}
        sizes = [sum(len(rows[name][rank]) * width[name] for name in mine) for rank in everyone]
        parts = self.ranks.gathered("parameters", list(mine.values()), sizes)
        whole, at = dict(values), [0] * self.ranks.size
        for name, local in mine.items():
            pieces = []
            for rank, part in enumerate(parts):
                count = len(rows[name][rank])
                start, at[rank] = at[rank], at[rank] + count * width[name]
                pieces.append(from_bytes(part[start : at[rank]], local, (count, *local.shape[1:])))
            whole[name] = torch.cat(pieces)
        return whole

    def scatter(self, values: Mapping[str, Tensor]) -> Tree:
        """Return the tree with this rank's shards of whole tensors, which are equal on all ranks; sends nothing."""
        tensors: Any = sys.modules["torch.distributed.tensor"]
        found = dict(values)
        for name, mesh in self.meshes.items():
            whole = values[name]
            rows = rows_of(whole, self.ranks.rank, self.ranks.size)
            mine = whole[rows.start : rows.stop].clone(memory_format=torch.contiguous_format)  # the rest is freed
            stride = torch.empty(whole.shape, device="meta").stride()
            found[name] = tensors.DTensor.from_local(
                mine, mesh, [tensors.Shard(0)], run_check=False, shape=whole.shape, stride=stride
            )
        return found


def sharding_of(values: Mapping[str, Tensor], ranks: Ranks) -> Sharding | None:
    """Return the placement of a tree like params; None if all tensors are whole.

    Raises:
        StructureError: tensors that are placed in another way than `fully_shard` does on a mesh of these ranks.
    """
    meshes = {name: value.device_mesh for name, value in values.items() if is_sharded(value)}  # type: ignore[attr-defined]
    if not meshes:
        return None
    members = dist.get_process_group_ranks(ranks.group if ranks.group is not None else dist.group.WORLD)
    for name, mesh in meshes.items():
        value: Any = values[name]
        if mesh.ndim != 1:
            raise StructureError(
                f"{name!r} is placed on a mesh of {mesh.ndim} dimensions, as tensor parallelism and hybrid sharding "
                "make them, where a rank computes with a part of a layer or shares its batch with others. Use "
                "fully_shard on a mesh of one dimension, or pass `param.full_tensor()`."
            )
        if mesh.mesh.tolist() != list(members):
            raise StructureError(
                f"{name!r} is sharded over the ranks {mesh.mesh.tolist()}, and the batch over {list(members)}: pass "
                "data_parallel the group of that mesh, `mesh.get_group()`."
            )
        if not value.placements[0].is_shard(0):
            raise StructureError(
                f"{name!r} is placed as {value.placements[0]}: only tensors that are sharded on dimension 0 (as "
                "fully_shard does) and whole tensors are supported. Pass `param.full_tensor()` of others, or "
                "redistribute them to Shard(0)."
            )
        mine = rows_of(value, ranks.rank, ranks.size)
        if value.to_local().shape != (len(mine), *value.shape[1:]):
            raise StructureError(
                f"{name!r} has {value.to_local().shape[0]} rows on rank {ranks.rank}, where torch.chunk gives "
                f"{len(mine)} of {value.shape[0]}: distribute it with fully_shard or distribute_tensor."
            )
    return Sharding(ranks, meshes)


def placement(values: object) -> int:
    """Return a fingerprint of the placement of a tree, for the agreement between ranks; 0 if all tensors are whole."""
    if not isinstance(values, Mapping):
        return 0
    placed = [(name, str(value.placements)) for name, value in values.items() if is_sharded(value)]
    return fingerprint(placed) if placed else 0


def stand_ins(values: Mapping[str, Tensor]) -> Tree:
    """Return the tree with zeros of the whole shape for sharded tensors, which store one number each."""

    def of(value: Any) -> Tensor:
        whole: Tensor = value.to_local().new_zeros(()).expand(value.shape) if is_sharded(value) else value
        return whole

    return {name: of(value) for name, value in values.items()} if isinstance(values, Mapping) else values


def rows_of(whole: Tensor, rank: int, size: int) -> range:
    """Return the rows of a tensor that are on a rank, as `torch.chunk` divides them: the last ranks may have none."""
    rows = whole.shape[0]
    share = -(-rows // size)
    return range(min(rows, rank * share), min(rows, (rank + 1) * share))
