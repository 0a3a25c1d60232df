"""Measure the growth of costs with a net: exponents of time in width, depth, batch, positions and classes.

`python apps/study_growth.py` times K-FAC (statistics with factors, inverses, gradient and preconditioning) on nets of
which one size changes. It fits time = c · sizeᵖ to the upper half of the sizes, where products outweigh the overhead
per call, and prints the exponents of the theory for comparison. With `--device cuda` it also fits peak memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import fisherfn as ff
from common.atomic import replace_text
from common.benchmark import clock
from common.benchmark.ours import Prepared, prepared
from common.benchmark.problems import posed
from common.config import POSITIVE, option, parse
from common.models.initialisation import built, initialise
from common.runs import check_device, reported

THEORY = {
    "width": ("2 (batch ≪ width) to 3", "3", "2 to 3"),
    "depth": ("1", "1", "1"),
    "batch": ("1", "0", "1"),
    "positions": ("1", "0", "1"),
    "classes": ("1 to 2", "up to 3", "1 to 2"),
}
"""Theoretical exponents of statistics, inverses and step; with classes only the last layer grows."""

SIZES = {
    "width": (256, 512, 768, 1024, 1536, 2048),
    "depth": (2, 4, 8, 16, 24, 32),
    "batch": (64, 128, 256, 512, 1024, 2048),
    "positions": (16, 64, 144, 256, 400, 576),
    "classes": (256, 512, 1024, 1536, 2048, 3072),
}
PARTS = ("statistics", "inverses", "step")


@dataclass(frozen=True)
class GrowthConfig:
    """The settings of the measurement."""

    rounds: int = option(9, "number of interleaved rounds, over which medians are taken", check=POSITIVE)
    threads: int = option(2, "number of torch threads", check=POSITIVE)
    device: str = option("cpu", "device: cpu, cuda, cuda:1, …")
    result: str = option("results/growth.json", "file for the numbers")


class Net(NamedTuple):
    """A function that builds a module, the shape of its inputs, and its number of classes."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int


def chain(width: int = 512, depth: int = 4, batch: int = 256, classes: int = 10) -> Net:
    """Build linear layers of one width and a last one to the classes."""

    def make() -> nn.Module:
        layers: list[nn.Module] = [part for _ in range(depth) for part in (nn.Linear(width, width), nn.ReLU())]
        return nn.Sequential(*layers, nn.Linear(width, classes))

    return Net(make, (batch, width), classes)


def image(positions: int, batch: int = 64) -> Net:
    """Build two convolutions with this number of positions."""

    def make() -> nn.Module:
        layers = [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.AdaptiveAvgPool2d(1)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 10))

    side = math.isqrt(positions)
    return Net(make, (batch, 16, side, side), 10)


def ready(axis: str, size: int, device: str) -> Prepared:
    """Build K-FAC on the net of this size."""
    make, shape, classes = image(size) if axis == "positions" else chain(**{axis: size})
    generator = torch.Generator().manual_seed(0)
    net = initialise(built(make), "kaiming_normal", generator)
    x, y = torch.rand(shape, generator=generator), torch.randint(classes, shape[:1], generator=generator)
    return prepared(posed(net.to(device), (x.to(device), y.to(device)), ff.Categorical()), "kfac")


def calls(one: Prepared) -> dict[str, Callable[[], Any]]:
    """Return the timed calls."""
    return {
        "statistics": lambda: one.ng.update(one.state, one.stats(curvature=True)),
        "inverses": lambda: one.ng.invert(one.state),
        "step": lambda: one.step(update=False, invert=False),
    }


def exponent(sizes: list[int], values: list[float]) -> float:
    """Return the slope of the least-squares line of log values over log sizes."""
    x, y = torch.tensor(sizes, dtype=torch.float64).log(), torch.tensor(values, dtype=torch.float64).log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / x.square().sum())


def main(config: GrowthConfig) -> None:
    """Measure all axes; print a table and write the numbers as JSON."""
    check_device(config.device)
    Path(config.result).parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(config.threads)
    numbers: dict[str, Any] = {}
    print(f"{'':12}{'statistics':>12}{'theory':>24}{'inverses':>12}{'theory':>12}{'step':>8}{'theory':>12}")
    for axis, sizes in SIZES.items():
        steps = {(size, part): call for size in sizes for part, call in calls(ready(axis, size, config.device)).items()}
        found = clock.measure(steps, config.rounds, config.device, axis)
        upper = list(sizes[len(sizes) // 2 :])
        numbers[axis] = {"sizes": sizes, "theory": dict(zip(PARTS, THEORY[axis], strict=True))}
        for part in PARTS:
            numbers[axis][part] = {"ms": [found[size, part].ms for size in sizes]}
            numbers[axis][part]["exponent"] = exponent(upper, [found[size, part].ms for size in upper])
            peaks = [found[size, part].peak_mib for size in upper]
            if all(peaks):
                numbers[axis][part]["memory_exponent"] = exponent(upper, [float(peak or 0) for peak in peaks])
        row = [(f"{numbers[axis][part]['exponent']:.2f}", numbers[axis]["theory"][part]) for part in PARTS]
        (s, st), (i, it), (p, pt) = row
        print(f"{axis:12}{s:>12}{st:>24}{i:>12}{it:>12}{p:>8}{pt:>12}", flush=True)
    replace_text(Path(config.result), json.dumps(numbers, indent=1))
    print(f"\nThe numbers are in {config.result}.")


if __name__ == "__main__":
    with reported():
        main(parse(GrowthConfig, description=__doc__ or ""))
