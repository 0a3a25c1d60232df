"""What a step costs, in SGD steps of the same model in the same run: interleaved rounds, medians.

`python apps/benchmark.py` times the parts of a K-FAC step on the CURVES and MNIST autoencoders (batch 256) and on
cuda_convnet (batch 128), puts them together as the mean step of a cycle, and what every method's refresh of statistics
and factors costs beside K-FAC's. Timings are noisy; the ratios of one run are what to read. With `--device cuda` every
call is waited for, and the memory that it takes is measured too.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from tqdm.auto import tqdm

import fisherfn as ff
from common.config import POSITIVE, option, parse
from common.data import Data, Split
from common.models import initialise, resolve
from common.trainer import reported

MODELS = {"CURVES": "AE_CURVES", "MNIST": "AE_MNIST", "CIFAR10": "cuda_convnet"}
CYCLES = ((5, 10), (10, 100))
"""Steps between statistics and between inverses."""

REFRESH = "refresh "
"""Before a method's name: its statistics and factors, without a gradient or a step."""


@dataclass(frozen=True)
class BenchmarkConfig:
    """How carefully to measure."""

    rounds: int = option(30, "interleaved rounds; medians are taken over them", check=POSITIVE)
    batch_size: int | None = option(None, "examples a step; null: 256, for cuda_convnet 128", check=POSITIVE)
    threads: int = option(2, "threads of torch", check=POSITIVE)
    device: str = option("cpu", "where to compute: cpu, cuda, cuda:1, …")
    matmul_precision: Literal["highest", "high"] = option(
        "highest", "of float32 products and convolutions on a GPU: high rounds their factors to TensorFloat-32"
    )
    refresh: bool = option(True, "time every method's refresh too")
    result_dir: str = option("results", "folder of results")


class Measured(NamedTuple):
    """By kind of step: median milliseconds, and on a GPU the most MiB that it holds beyond what is held before it."""

    ms: dict[str, float]
    peak_mib: dict[str, float]


class Problem(NamedTuple):
    """A net and a batch of random images."""

    model: Any
    params: dict[str, torch.Tensor]
    context: Any
    batch: tuple[torch.Tensor, torch.Tensor]
    likelihood: Any


def problem(name: str, batch_size: int | None, device: str) -> Problem:
    """The net for this data; autoencoders on flat images, the convolutional one with labels."""
    generator = torch.Generator().manual_seed(0)
    convolutional = MODELS[name] == "cuda_convnet"
    shape = (3, 32, 32) if convolutional else (1, 28, 28)
    x = torch.rand(batch_size or (128 if convolutional else 256), *shape, generator=generator)
    y = torch.randint(10, x.shape[:1], generator=generator) if convolutional else None
    likelihood = ff.Categorical() if convolutional else ff.Bernoulli()
    data = Data(name, Split(x, y), Split(x, y), MODELS[name], likelihood, likelihood)
    spec = resolve(MODELS[name], data, inputs="images" if convolutional else "flat")
    net = initialise(spec.build(data), "kaiming_normal" if convolutional else "xavier_uniform", generator)
    model, params, context = ff.functional(net.to(device).train())
    x = x.to(device)
    batch = (x, y.to(device)) if y is not None else (x.flatten(1), x.flatten(1))
    return Problem(model, params, context, batch, likelihood)


def steps(name: str, config: BenchmarkConfig) -> dict[str, Callable[[], Any]]:
    """What is timed, by name: whole training steps of one kind, then refreshes."""
    model, params, context, batch, likelihood = problem(name, config.batch_size, config.device)
    generator = torch.Generator(config.device).manual_seed(0)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}

    def warm(method: str) -> tuple[ff.NaturalGradient, ff.State]:
        ng = ff.natural_gradient(model, params, batch[0], likelihood=likelihood, method=method, context=context)
        _, state, _ = ng.step(params, ng.init(params, damping=1.0), batch, generator=generator, context=context)
        return ng, state

    ng, state = warm("kfac")

    def sgd() -> Any:
        loss = likelihood.nll(model(leaves, batch[0], context)[0], batch[1]).mean()
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return [p.detach() - 1e-3 * g for p, g in zip(leaves.values(), grads, strict=True)]

    def kfac(update: bool, invert: bool, clip: bool = True) -> Any:
        nat, _, info = ng.step(
            params, state, batch, update=update, invert=invert, inner=clip, generator=generator, context=context
        )
        nat = ff.kl_clip(nat, info.inner, lr=1.0, bound=1e-2) if clip else nat
        return ff.tree.add(params, nat, scale=-1.0)

    def refresh(ng: ff.NaturalGradient, state: ff.State) -> Callable[[], Any]:
        return lambda: ng.update(state, ng.stats(params, batch, generator=generator, context=context))

    timed: dict[str, Callable[[], Any]] = {
        "sgd": sgd,
        "plain": lambda: kfac(False, False),
        "plain, no clip": lambda: kfac(False, False, clip=False),
        "with statistics": lambda: kfac(True, False),
        "with statistics and inverses": lambda: kfac(True, True),
    }
    if config.refresh:
        timed |= {REFRESH + method: refresh(*warm(method)) for method in ff.METHODS}
    return timed


def measure(name: str, config: BenchmarkConfig) -> Measured:
    """Each kind of step: the first two rounds warm up, and the second of them shows the memory."""
    timed, gpu = steps(name, config), config.device.startswith("cuda")
    times: dict[str, list[float]] = {kind: [] for kind in timed}
    peaks: dict[str, float] = {}
    for round_ in tqdm(range(config.rounds + 2), desc=name, disable=None, leave=False):
        for kind, step in timed.items():
            if gpu and round_ == 1:
                peaks[kind] = peak_mib(step, config.device)
            ms = milliseconds(step, config.device if gpu else None)
            if round_ >= 2:
                times[kind].append(ms)
    return Measured({kind: statistics.median(values) for kind, values in times.items()}, peaks)


def milliseconds(step: Callable[[], Any], gpu: str | None) -> float:
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


def cycle(medians: dict[str, float], update_every: int, invert_every: int) -> float:
    """The mean step of a cycle, in SGD steps."""
    inverses, updates = 1, invert_every // update_every
    total = (
        inverses * medians["with statistics and inverses"]
        + (updates - inverses) * medians["with statistics"]
        + (invert_every - updates) * medians["plain"]
    )
    return total / invert_every / medians["sgd"]


def report(name: str, measured: Measured) -> str:
    """Milliseconds and ratios, to read; on a GPU memory too."""
    medians, peaks = measured
    lines = [f"\n{MODELS[name]}: an SGD step takes {medians['sgd']:.1f} ms"]
    lines += [f"  K-FAC step, {kind:28} {ms:7.1f} ms  {ms / medians['sgd']:5.2f} SGD steps"
              for kind, ms in medians.items() if kind != "sgd" and not kind.startswith(REFRESH)]  # fmt: skip
    lines += [f"  mean step, statistics every {update}, inverses every {invert}: {cycle(medians, update, invert):.2f}"
              " SGD steps" for update, invert in CYCLES]  # fmt: skip
    kfac = medians.get(REFRESH + "kfac", 1.0)
    lines += [f"  {kind:28} {ms:7.1f} ms  {ms / medians['sgd']:5.2f} SGD steps  {ms / kfac:5.2f} of K-FAC's"
              for kind, ms in medians.items() if kind.startswith(REFRESH)]  # fmt: skip
    lines += [f"  {kind:28} {mib:9.1f} MiB at most, beside what is held" for kind, mib in peaks.items()]
    return "\n".join(lines)


def main(config: BenchmarkConfig) -> None:
    """All nets; the numbers as JSON."""
    torch.set_num_threads(config.threads)
    where = {"torch": torch.__version__, "threads": config.threads, "device": config.device}
    if config.device.startswith("cuda"):
        # torch's own default rounds convolutions and not products
        torch.set_float32_matmul_precision(config.matmul_precision)
        torch.backends.cudnn.allow_tf32 = config.matmul_precision == "high"
        where |= {"gpu": torch.cuda.get_device_name(config.device), "matmul_precision": config.matmul_precision}
    found: dict[str, Measured] = {}
    for name in MODELS:
        found[name] = measure(name, config)
        print(report(name, found[name]), flush=True)
    numbers = {field: {name: getattr(one, field) for name, one in found.items()} for field in Measured._fields}
    path = Path(config.result_dir) / "benchmark.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(where | numbers, indent=1))
    print(f"\nThe numbers are in {path}.")


if __name__ == "__main__":
    with reported():
        main(parse(BenchmarkConfig, description=__doc__ or ""))
