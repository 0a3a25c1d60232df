"""Factors of a whole data set from its batches: the same as those of one large batch, however the examples are split.

Every example counts once. A method whose factors are means over examples is averaged batch by batch in one pass
(K-FAC). E-KFAC needs two passes: the first one gives the basis, the second one the eigenvalues in it. The factors of
the other methods are no means, so the raw statistics of all batches are joined, and the memory grows with the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from fisherfn import masked
from fisherfn.base import Method
from fisherfn.errors import EmptyBatchError, StructureError
from fisherfn.state import State, detached
from fisherfn.stats import Batch, Stats, join
from fisherfn.taps import ChunkedTap
from fisherfn.types import Info

AT_ONCE = 2048
"""Largest number of examples that are multiplied with each other: two matrices of 32 MiB per block in float64."""


def fit(
    method: Method,
    empty: State,
    loader: Iterable[Batch],
    collect: Callable[[Any], Stats],
    generator: torch.Generator | None,
) -> tuple[State, Info]:
    """Return the state after all batches, and their mean loss and masks.

    Args:
        method: the method whose factors are computed.
        empty: the state before the first batch; its average must count all examples equally (`ema` of 1).
        loader: the batches.
        collect: the statistics of a batch.
        generator: the one that `collect` samples labels from; each pass starts from its state before the first one.

    Raises:
        EmptyBatchError: the data set has no batch.
        StructureError: an iterator that can only be read once, where two passes are needed.
    """
    passes = max(1, method.fit_passes)
    if passes > 1 and iter(loader) is loader:
        raise StructureError(
            f"{method.name} reads the data set {passes} times: pass a list of batches or a DataLoader, not an iterator."
        )
    first = None if generator is None else generator.get_state()
    state, info = empty, Info()
    for number in range(passes):
        if generator is not None and first is not None:
            generator.set_state(first)  # the same labels in every pass
        stats = (collect(batch) for batch in loader)
        start = empty._replace(factors=method.between_passes(state.factors) if number else empty.factors)
        state, info = _one_pass(method, start, stats if method.fit_passes else _joined(stats))
    return state, info


def _one_pass(method: Method, state: State, parts: Iterable[Stats]) -> tuple[State, Info]:
    """Average the factors over the parts, each counted by its examples."""
    total, loss = 0, torch.zeros(())
    checks, sound = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for stats in parts:
        counted, rho = state.counted(float(stats.examples), stats.layout.block_shapes)
        taps = dict(stats.lazy_taps)
        if stats.examples > AT_ONCE:  # in chunks: no matrix of all pairs of examples is formed
            taps = {key: ChunkedTap(tap, AT_ONCE) for key, tap in taps.items()}
        result = method.update(state.factors, taps, rho, inverting=not method.fit_passes)
        state = counted._replace(factors=detached(result.factors, stats.loss))
        total += stats.examples
        loss = loss + (detached(stats.loss, stats.loss) - loss) * (stats.examples / total)
        checks, sound = masked.all_true(checks, stats.checks), masked.all_true(sound, result.ok)
    if not total:
        raise EmptyBatchError("the data set has no batch: the mean over its examples does not exist.")
    return state, Info(loss=loss, checks={**checks, "statistics": sound})


def _joined(parts: Iterable[Stats]) -> Iterator[Stats]:
    """Yield one batch with the statistics of all parts, or nothing if there is no part."""
    found = list(parts)
    if found:
        yield join(found)
