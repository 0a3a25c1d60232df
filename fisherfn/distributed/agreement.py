"""The check that all ranks make the same call, before any of them waits for another.

Each rank sends a few whole numbers: its number of examples, whether the call failed there, and a fingerprint of
everything that must agree. All ranks see the same table, so that all of them raise, or none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from fisherfn.distributed.ranks import Ranks, Shard
from fisherfn.errors import EmptyBatchError, FisherfnError, RankError

T = TypeVar("T")

TEXT = 400
"""Bytes of an error's text that are sent to the other ranks."""


def fingerprint(value: object) -> int:
    """Return a whole number of 63 bits for a value: equal for equal texts (or bytes), in every process."""
    data = value if isinstance(value, bytes) else repr(value).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


def of_tensors(tensors: Mapping[str, Tensor]) -> int:
    """Return the fingerprint of the values of some tensors, bit for bit."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return int.from_bytes(digest.digest(), "big") >> 1


def agreed(ranks: Ranks, facts: Mapping[str, object], check: Callable[[], int]) -> Shard:
    """Return the place of this rank's examples, once all ranks agree on the facts and passed their own check.

    Args:
        ranks: the ranks.
        facts: what must be equal, by the name that an error gives it; a whole number is a fingerprint already.
        check: a check of this rank's arguments, which returns its number of examples.

    Raises:
        RankError: on every rank, if the facts differ or the check failed on one of them.
        EmptyBatchError: no rank has an example.
    """
    own, error = 0, None
    try:
        own = check()
    except FisherfnError as raised:
        error = raised
    numbers = [value if isinstance(value, int) else fingerprint(value) for value in facts.values()]
    table = ranks.table("agreement", torch.tensor([int(error is not None), own, *numbers], dtype=torch.int64))
    failed = [rank for rank, flag in enumerate(table[:, 0].tolist()) if flag]
    if failed:
        text = _text_of(ranks, failed[0], error)
        raise RankError(
            f"the call failed on {_named(failed)} of {ranks.size}, so no rank can go on. Rank {failed[0]}: {text}"
        ) from error
    for column, name in enumerate(facts, start=2):
        values = table[:, column].tolist()
        common = max(set(values), key=lambda value: (values.count(value), value == values[0]))
        other = [rank for rank, value in enumerate(values) if value != common]
        if other:
            raise RankError(
                f"the ranks disagree on {name}: {_named(other)} of {ranks.size} differs from the others. All ranks "
                "must make the same calls, with equal models, methods and settings; only their examples differ."
            )
    shard = Shard(ranks.rank, tuple(table[:, 1].tolist()))
    if shard.total == 0 and "the batch" in facts:
        raise EmptyBatchError("no rank has an example: the mean over the batch does not exist. Skip empty batches.")
    return shard


def nothing() -> int:
    """Return zero examples: the check of a call without a batch."""
    return 0


def _text_of(ranks: Ranks, source: int, error: FisherfnError | None) -> str:
    """Return the text of one rank's error on all ranks."""
    text = "" if error is None else f"{type(error).__name__}: {error}"
    mine = torch.zeros(TEXT, dtype=torch.int64)
    data = list(text.encode()[:TEXT])
    mine[: len(data)] = torch.tensor(data, dtype=torch.int64)
    sent = bytes(number for number in ranks.table("error", mine)[source].tolist() if number)
    return sent.decode(errors="ignore")


def _named(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
