"""Time and memory of calls, measured in interleaved rounds, so that a disturbance affects all calls equally."""

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
"""Time budget in milliseconds for one kind of call; slower calls are timed in fewer rounds."""


class Timing(NamedTuple):
    """Median and quartiles in milliseconds; on a GPU also the peak memory in MiB beyond that before the call."""

    ms: float
    low: float
    high: float
    peak_mib: float | None = None


def measure(steps: Mapping[K, Callable[[], Any]], rounds: int, device: str, title: str) -> dict[K, Timing]:
    """Time each call once per round, slow ones in fewer, evenly spaced rounds."""
    return measure_forgiving(steps, (), rounds, device, title)[0]


def measure_forgiving(
    steps: Mapping[K, Callable[[], Any]], forgiven: Container[K], rounds: int, device: str, title: str
) -> tuple[dict[K, Timing], dict[K, Exception]]:
    """Time calls of which some may fail in a later round; failed calls give their errors instead of timings."""
    gpu = device if device.startswith("cuda") else None
    # first calls are slower: they warm up, and show how many more calls fit the budget
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
                    stride[key] = rounds + 1  # skip it from now on
                    failed[key] = error
    well = {key: values for key, values in times.items() if key not in failed}
    peaks = {key: peak_mib(steps[key], gpu) if gpu else None for key in well}
    return {key: Timing(*quartiles(values), peaks[key]) for key, values in well.items()}, failed


def every(ms: float, rounds: int) -> int:
    """Return the number of rounds from one timing of a call to the next."""
    return min(rounds, math.ceil(rounds * ms / BUDGET))


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return median, lower and upper quartile; for one value three times this value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def milliseconds(step: Callable[[], Any], gpu: str | None = None) -> float:
    """Measure the time of a call; on a GPU until all its work is done."""
    if gpu:
        torch.cuda.synchronize(gpu)
    began = time.perf_counter()
    step()
    if gpu:
        torch.cuda.synchronize(gpu)
    return 1e3 * (time.perf_counter() - began)


def peak_mib(step: Callable[[], Any], gpu: str) -> float:
    """Measure the peak memory of a call in addition to that before it, including its result."""
    torch.cuda.reset_peak_memory_stats(gpu)
    before = torch.cuda.memory_allocated(gpu)
    step()
    return (torch.cuda.max_memory_allocated(gpu) - before) / 2**20
