"""A group of ranks, and the few messages that a data-parallel step sends through it.

All messages are collectives of `torch.distributed`; nothing here has a protocol of its own. A collective that fails
because a rank has ended or does not answer raises `RankError` on the ranks that wait for it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from fisherfn.errors import RankError, StructureError

MOMENT = 5.0
"""Seconds that a rank waits for the others to report a failure, to name the one that does not."""

PARTS = 3
"""Numbers of single precision that together hold one number of double precision."""


_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""The gather of equal tensors, which has another name in older versions of torch."""


class Shard(NamedTuple):
    """The place of one rank's examples in the global batch, which is the shards of all ranks in order of rank.

    Attributes:
        rank: this rank.
        counts: number of examples of every rank.
    """

    rank: int
    counts: tuple[int, ...]

    @property
    def own(self) -> int:
        """Return the number of examples on this rank."""
        return self.counts[self.rank]

    @property
    def start(self) -> int:
        """Return the index of this rank's first example in the global batch."""
        return sum(self.counts[: self.rank])

    @property
    def total(self) -> int:
        """Return the number of examples of the global batch."""
        return sum(self.counts)

    def weighted(self, mean: Tensor) -> Tensor:
        """Return this rank's part of the global mean, given the mean over its own examples; zero for an empty shard."""
        return mean * (self.own / self.total) if self.own else torch.zeros_like(mean)


@dataclass(frozen=True)
class Ranks:
    """A process group, as the few messages that are sent through it.

    Attributes:
        group: a group of `torch.distributed`; None for all ranks.
        observe: called with the purpose and the payload in bytes of each message, for measurements.
    """

    group: Any = None
    observe: Callable[[str, int], None] | None = None

    def __post_init__(self) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise StructureError(
                "there is no process group: start the program with torchrun (or srun), and call "
                'torch.distributed.init_process_group("gloo") first, or "nccl" on GPUs.'
            )
        if dist.get_rank(self.group) < 0:
            raise StructureError("this process is not a member of the group: call data_parallel on its members only.")

    @property
    def size(self) -> int:
        """Return the number of ranks."""
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Return this process's place in the group."""
        return dist.get_rank(self.group)

    @property
    def device(self) -> torch.device:
        """Return the device from which this group sends small messages."""
        nccl = dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def total(self, what: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums of tensors over all ranks, in one message per dtype."""
        found: dict[int, Tensor] = {}
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            places = [place for place, tensor in enumerate(tensors) if tensor.dtype == dtype]
            flat = torch.cat([tensors[place].reshape(-1) for place in places])
            self._sum(what, flat)
            parts = flat.split([tensors[place].numel() for place in places])
            found |= {place: part.view(tensors[place].shape) for place, part in zip(places, parts, strict=True)}
        return [found[place] for place in range(len(tensors))]

    def total_and_table(
        self, what: str, tensors: Sequence[Tensor], numbers: Float[Tensor, " n"]
    ) -> tuple[list[Tensor], Float[Tensor, "w n"]]:
        """Return sums over all ranks, and the numbers of every rank, exactly, in the same message.

        Each rank has places of its own for its numbers, to which the others add zeros. A number of double precision is
        sent as a sum of up to three of the message's precision.
        """
        dtype = tensors[0].dtype if tensors else torch.float64
        slots = torch.zeros(self.size, PARTS, len(numbers), dtype=dtype, device=numbers.device)
        rest = numbers.double()
        for part in range(PARTS):
            slots[self.rank, part] = rest.to(dtype)
            rest = torch.where(torch.isfinite(rest), rest - rest.to(dtype).double(), 0.0)
        *sums, slots = self.total(what, [*tensors, slots])
        return sums, slots.double().sum(1)

    def table(self, what: str, numbers: Int[Tensor, " n"]) -> Int[Tensor, "w n"]:
        """Return the whole numbers of every rank."""
        return self._gather(what, numbers.to(self.device)).cpu()

    def gathered(self, what: str, mine: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Return the tensors of every rank as bytes, in one message; `sizes` are the numbers of bytes of the ranks.

        A gather pads all parts to the longest one. Where that is more than a sum sends (twice the whole), as with more
        ranks than blocks, each rank writes its part into zeros, and these are added up.
        """
        longest, whole = max(sizes), sum(sizes)
        flat = torch.cat([to_bytes(tensor) for tensor in mine]) if mine else torch.zeros(0, dtype=torch.uint8)
        device = flat.device if mine else self.device
        if crossing(sizes) < self.size * longest:
            summed, start = torch.zeros(whole, dtype=torch.uint8, device=device), sum(sizes[: self.rank])
            summed[start : start + len(flat)] = flat
            self._sum(what, summed)
            return list(summed.split(list(sizes)))
        padded = torch.cat([flat.to(device), torch.zeros(longest - len(flat), dtype=torch.uint8, device=device)])
        return [row[:size] for row, size in zip(self._gather(what, padded), sizes, strict=True)]

    # ---------------------------------------------------------------------------------------------------------

    def _sum(self, what: str, flat: Tensor) -> None:
        self._observed(what, flat)
        with self._answered(what):
            dist.all_reduce(flat, group=self.group)

    def _gather(self, what: str, flat: Tensor) -> Tensor:
        self._observed(what, flat)
        table = flat.new_empty(self.size * flat.numel())
        with self._answered(what):
            _all_gather(table, flat.contiguous(), group=self.group)
        return table.view(self.size, *flat.shape)

    def _observed(self, what: str, flat: Tensor) -> None:
        if self.observe is not None:
            self.observe(what, flat.numel() * flat.element_size())

    @contextlib.contextmanager
    def _answered(self, what: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:
            first = str(error).splitlines()[0][:200]
            silent = self._silent()
            named = f"No word from rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent))}. " if silent else ""
            raise RankError(
                f"rank {self.rank} of {self.size} did not get the others' part of the message {what!r} ({first}). "
                f"{named}Another rank has ended, does not answer, or is at another call: look at the first error in "
                "the output of the other ranks. Then start all ranks again from the last checkpoint."
            ) from error

    def _silent(self) -> list[int]:
        """Return the ranks that do not report the failure to the store through which the group was formed.

        A rank that still waits in the failed message has not reported it, so all ranks are given a moment.
        """
        group: Any = self.group or dist.group.WORLD
        members = [dist.get_global_rank(group, rank) for rank in range(self.size)]
        began, silent = time.monotonic(), list(range(self.size))
        try:
            store = dist.distributed_c10d._get_default_store()
            store.set(f"fisherfn/failed/{members[self.rank]}", "")
            while silent and time.monotonic() - began < (MOMENT if len(silent) > 1 else MOMENT / 5):
                time.sleep(0.05)
                silent = [rank for rank in range(self.size) if not store.check([f"fisherfn/failed/{members[rank]}"])]
        except (RuntimeError, ValueError):  # the store was in the rank that has ended
            return []
        return silent


def crossing(sizes: Sequence[int]) -> int:
    """Return the bytes that `Ranks.gathered` sends to each rank, given those of every rank's part.

    A gather pads all parts to the longest one. A sum sends at most twice the whole, whatever the parts.
    """
    return min(len(sizes) * max(sizes), 2 * sum(sizes))


def to_bytes(tensor: Tensor) -> Tensor:
    """Return the memory of a tensor as flat bytes."""
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.stride(0) != 1:  # a single number counts as contiguous with any stride
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8) if flat.dtype != torch.bool else flat.to(torch.uint8)


def from_bytes(flat: Tensor, like: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the tensor of this memory, with the dtype of `like`."""
    if like.dtype == torch.bool:
        return flat.bool().view(torch.Size(shape))
    return flat.clone().view(like.dtype).view(torch.Size(shape))  # a copy: its memory must be aligned
