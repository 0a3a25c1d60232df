"""Time training steps, relative to SGD steps of the same model in the same run: interleaved rounds, medians.

`python apps/benchmark.py` times fisherfn's K-FAC steps on four nets (fully connected, convolutional, with transposed
convolutions) and computes the average step of a training. It also times the refresh of statistics and factors of every
method, relative to K-FAC. `--peers` times other libraries on the same weights and batches, in the same rounds
(`make .venv/installed-peers` installs them). `--page docs/performance.md` writes the tables into that page and draws
its picture. Timings are noisy; compare ratios within one run. With `--device cuda` every call is synchronised, and its
memory is measured too.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from common.benchmark import clock, latency, ours, picture, report
from common.benchmark.contenders import Contender, attempted, first_line
from common.benchmark.large import LARGE
from common.benchmark.optimizers import COMPILED, OPTIMIZERS, sgd
from common.benchmark.peers import PACKAGES, PEERS
from common.benchmark.problems import WORKLOADS, Problem, problem
from common.config import POSITIVE, check_listed, listed, option, parse
from common.runs import check_device, reported

EXACT_ON, EXACT_EXAMPLES = ("AE_CURVES", "cuda_convnet"), 128
INSTRUCTIONS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
"""Processor flags of Linux that determine the speed of matrix products."""


@dataclass(frozen=True)
class BenchmarkConfig:
    """The settings of the benchmark."""

    rounds: int = option(20, "number of interleaved rounds, over which medians are taken", check=POSITIVE)
    workloads: str = option(",".join(WORKLOADS), "nets to time, comma-separated; also resnet50 and gpt2_block")
    batch_size: int | None = option(None, "batch size; default: that of each net", check=POSITIVE)
    peers: bool = option(False, "time other libraries too")
    compile: bool = option(True, "time compiled steps too; compiling takes a few minutes per net")
    refresh: bool = option(True, "time every method's refresh, and the exact natural gradient")
    latency: int | None = option(
        None, "number of consecutive steps whose percentiles are taken, with import and build times", check=POSITIVE
    )
    threads: int = option(2, "number of torch threads", check=POSITIVE)
    device: str = option("cpu", "device: cpu, cuda, cuda:1, …")
    matmul_precision: Literal["highest", "high"] = option(
        "highest", "precision of float32 products and convolutions on a GPU: high uses TensorFloat-32"
    )
    page: str | None = option(None, "page whose tables are replaced; its picture is images/performance.png")
    result_dir: str = option("results", "folder for results")

    def __post_init__(self) -> None:
        check_listed("workloads", self.workloads, WORKLOADS | LARGE)


def measure(name: str, config: BenchmarkConfig) -> dict[str, Any]:
    """Time all contenders on one workload, in the same rounds."""
    posed = pose(name, config)
    found: dict[str, Contender] = {report.UNIT: sgd(posed)}
    found |= {label: ours.kfac(posed, variant) for label, variant in ours.VARIANTS.items()}
    if config.compile:
        found |= {label: attempted(build, posed) for label, build in (ours.COMPILED | COMPILED).items()}
    if config.peers:
        found |= {label: attempted(build, posed) for label, build in (PEERS | OPTIMIZERS).items()}
    refreshes = ours.refreshes(posed) if config.refresh else {}
    exact = {}
    if config.refresh and name in EXACT_ON:
        compiles = config.compile and all(found[label].parts is not None for label in ours.COMPILED)
        exact = ours.exact(problem(name, config.batch_size or EXACT_EXAMPLES, config.device), compiles)
    steps: dict[tuple[str, str], Callable[[], Any]] = {
        (label, part): step for label, contender in found.items() for part, step in contender.calls().items()
    }
    steps |= {("refresh", method): step for method, step in refreshes.items()}
    steps |= {("exact", kind): step for kind, step in exact.items()}
    others = [key for key in steps if key[0] in PEERS | OPTIMIZERS | COMPILED]
    timings, failed = clock.measure_forgiving(steps, others, config.rounds, config.device, report.title(name))
    for (label, part), error in failed.items():
        found[label] = Contender(None, covers="–", error=f"{part}: {type(error).__name__}: {first_line(error)}")

    def timed(label: str, parts: Mapping[str, Any]) -> dict[str, Any]:
        return {part: timings[label, part]._asdict() for part in parts}

    return {
        "contenders": {label: one._asdict() | {"parts": timed(label, one.calls())} for label, one in found.items()},
        "refresh": timed("refresh", refreshes),
        "exact": timed("exact", exact),
        "latency": latencies(posed, config) if config.latency else {},
    }


def latencies(posed: Problem, config: BenchmarkConfig) -> dict[str, Any]:
    """Return percentiles of step times for both kinds of refresh, and the time of a build per layer."""
    found = latency.latencies(posed, config.latency or 0, config.device)
    spreads = {label: spread._asdict() for label, spread in found.items()}
    return {"steps": spreads, "build_ms_per_layer": latency.build_ms_per_layer(posed)}


def pose(name: str, config: BenchmarkConfig) -> Problem:
    """Return the workload with this name."""
    if name in LARGE:
        return LARGE[name].make(config.batch_size or LARGE[name].batch_size, config.device)
    return problem(name, config.batch_size, config.device)


def about(config: BenchmarkConfig) -> dict[str, Any]:
    """Return the circumstances of the run: machine, versions and settings."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "fisherfn": version("fisherfn"),
        "torch": torch.__version__,
    }
    facts |= {"peers": {package: version(package) for package in PACKAGES}} if config.peers else {}
    facts |= {"rounds": config.rounds, "threads": config.threads, "cores": os.cpu_count(), "processor": instructions()}
    facts |= {"import_seconds": round(latency.import_seconds(), 2)} if config.latency else {}
    if config.device.startswith("cuda"):
        facts |= {"gpu": torch.cuda.get_device_name(config.device), "matmul_precision": config.matmul_precision}
    return facts


def instructions() -> list[str]:
    """Return the `INSTRUCTIONS` of this processor, if the system lists them."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    listed = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.M)
    return [name for name in INSTRUCTIONS if listed and name in listed[1].split()]


def chosen(config: BenchmarkConfig) -> list[str]:
    """Return the workloads to time."""
    return listed(config.workloads)


def write(numbers: report.Numbers, config: BenchmarkConfig) -> None:
    """Write the numbers as JSON, and the tables and picture of a page if one is given."""
    path = Path(config.result_dir) / "benchmark.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(numbers, indent=1))
    print(f"\nThe numbers are in {path}.")
    if config.page:
        page = Path(config.page)
        page.write_text(report.filled(page.read_text(), report.tables(numbers)))
        drawn = page.parent / "images" / "performance.png"
        drawn.parent.mkdir(exist_ok=True)
        picture.mean_steps(numbers, drawn)
        print(f"The tables and the picture of {page} were replaced.")


def main(config: BenchmarkConfig) -> None:
    """Time all workloads and print their tables."""
    names = chosen(config)
    check_device(config.device)
    torch.set_num_threads(config.threads)
    if config.device.startswith("cuda"):
        # torch's default uses TensorFloat-32 for convolutions but not for products
        torch.set_float32_matmul_precision(config.matmul_precision)
        torch.backends.cudnn.allow_tf32 = config.matmul_precision == "high"
    # ignore warnings of peers
    warnings.filterwarnings("ignore")
    workloads: dict[str, Any] = {}
    for name in names:
        workloads[name] = measure(name, config)
        print("\n" + report.parts({"workloads": {name: workloads[name]}}), flush=True)
    numbers = {"about": about(config), "workloads": workloads}
    tables = report.tables(numbers) | {"memory": report.memory(numbers), "latency": report.latency(numbers)}
    print("\n" + "\n\n".join(text for kind, text in tables.items() if text and kind != "parts"))
    write(numbers, config)


if __name__ == "__main__":
    with reported():
        main(parse(BenchmarkConfig, description=__doc__ or ""))
