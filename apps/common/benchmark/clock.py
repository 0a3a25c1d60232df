"""Time and memory of calls, in interleaved rounds: what slows one round down slows down everyone in it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Container, Hashable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from tqdm.auto import tqdm

K = TypeVar("K", bound=Hashable)
BUDGET = 8000.0
"""Milliseconds for one kind of call: slower ones are timed in fewer rounds."""


class Timing(NamedTuple):
    """Milliseconds: median and quartiles; on a GPU the most MiB held beyond what is held before the call."""

    ms: float
    low: float
    high: float
    peak_mib: float | None = None


def measure(steps: Mapping[K, Callable[[], Any]], rounds: int, device: str, title: str) -> dict[K, Timing]:
    """Each call once a round, slow ones in fewer, evenly spaced rounds."""
    return measure_forgiving(steps, (), rounds, device, title)[0]


def measure_forgiving(
    steps: Mapping[K, Callable[[], Any]], forgiven: Container[K], rounds: int, device: str, title: str
) -> tuple[dict[K, Timing], dict[K, Exception]]:
    """The same where some calls may fail in a later round: their errors in place of their timings."""
    gpu = device if device.startswith("cuda") else None
    # first calls are slower: they warm up, and tell how often there is time for more
    stride = {key: every(milliseconds(step, gpu), rounds) for key, step in steps.items()}
    times: dict[K, list[float]] = {key: [] for key in steps}
    failed: dict[K, Exception] = {}
    for round_ in tqdm(range(rounds), desc=title, disable=None, leave=False):
        for key, step in steps.items():
            if round_ % stride[key] == 0:
                try:
                    times[key].append(milliseconds(step, gpu))
                except Exception as error:
                    if key not in forgiven:
                        raise
                    stride[key] = rounds + 1  # not again
                    failed[key] = error
    well = {key: values for key, values in times.items() if key not in failed}
    peaks = {key: peak_mib(steps[key], gpu) if gpu else None for key in well}
    return {key: Timing(*quartiles(values), peaks[key]) for key, values in well.items()}, failed


def every(ms: float, rounds: int) -> int:
    """Rounds from one timing of such a call to the next."""
    return min(rounds, math.ceil(rounds * ms / BUDGET))


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile; of one value three times it."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def milliseconds(step: Callable[[], Any], gpu: str | None = None) -> float:
    """How long a call takes; on a GPU until all that it began there is done."""
    if gpu:
        torch.cuda.synchronize(gpu)
    began = time.perf_counter()
    step()
    if gpu:
        torch.cuda.synchronize(gpu)
    return 1e3 * (time.perf_counter() - began)


def peak_mib(step: Callable[[], Any], gpu: str) -> float:
    """The most memory that a call holds beyond what is held before it, its result included."""
    torch.cuda.reset_peak_memory_stats(gpu)
    before = torch.cuda.memory_allocated(gpu)
    step()
    return (torch.cuda.max_memory_allocated(gpu) - before) / 2**20
