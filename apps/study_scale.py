"""Measure steps of large nets: a GPT-2 of 124 million parameters and a ResNet-50, with time and peak memory.

`python apps/study_scale.py` takes one SGD step and a few steps of K-FAC on each net, every one in a process of its own,
and prints the seconds of each kind of step and the peak memory of the process. The nets have random weights and inputs.
Quadratic costs in the number of layers, classes or positions would show here.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fisherfn as ff
from common.benchmark.large import WIDTH, TransformerBlock
from common.benchmark.problems import Problem, posed
from common.config import POSITIVE, check_listed, listed, option, parse
from common.data import Data, Split
from common.models import MODELS, initialise
from common.runs import reported

LAYERS, VOCABULARY = 12, 50_257
METHODS = ("sgd", "kfac", "ekfac")


@dataclass(frozen=True)
class ScaleConfig:
    """The settings of the measurement."""

    nets: str = option("gpt2,resnet50", "comma-separated nets: gpt2, resnet50")
    optims: str = option("sgd,kfac", f"comma-separated optimizers: {', '.join(METHODS)}")
    batch_size: int = option(1, "examples per step", check=POSITIVE)
    positions: int = option(128, "length of the sequences of GPT-2", check=POSITIVE)
    layers: int = option(LAYERS, "blocks of GPT-2", check=POSITIVE)
    pixels: int = option(224, "side of the images of the ResNet-50", check=POSITIVE)
    threads: int = option(2, "number of torch threads", check=POSITIVE)

    def __post_init__(self) -> None:
        check_listed("nets", self.nets, NETS)
        check_listed("optims", self.optims, METHODS)


class GPT2(nn.Module):
    """A stack of blocks between an embedding and an output layer that share their weight."""

    def __init__(self, positions: int, layers: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(positions, WIDTH)
        self.blocks, self.norm = nn.Sequential(*(TransformerBlock() for _ in range(layers))), nn.LayerNorm(WIDTH)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of every next token."""
        h = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return F.linear(self.norm(self.blocks(h)), self.tokens.weight)


def gpt2(config: ScaleConfig) -> Problem:
    """Build the language model with random tokens."""
    torch.manual_seed(0)
    ids = torch.randint(VOCABULARY, (config.batch_size, config.positions + 1))
    return posed(GPT2(config.positions, config.layers), (ids[:, :-1], ids[:, 1:]), ff.Categorical())


def resnet50(config: ScaleConfig) -> Problem:
    """Build a ResNet-50 with random images; its batch norms use their running statistics."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(config.batch_size, 3, config.pixels, config.pixels, generator=generator)
    y = torch.randint(1000, (config.batch_size,), generator=generator)
    likelihood, labels = ff.Categorical(), torch.tensor([999])  # the number of classes is read from labels
    data = Data("random", Split(x[:1], labels), Split(x[:1], labels), "resnet50", likelihood, likelihood)
    net = initialise(MODELS["resnet50"].build(data), "kaiming_normal", generator).eval()
    return posed(net, (x, y), likelihood)


NETS: dict[str, Callable[[ScaleConfig], Problem]] = {"gpt2": gpt2, "resnet50": resnet50}


def measured(net: str, optim: str, config: ScaleConfig) -> str:
    """Take the steps and return a line of the table."""
    torch.set_num_threads(config.threads)
    problem = NETS[net](config)
    size = sum(p.numel() for p in problem.params.values()) / 1e6
    start, seconds = memory(), []
    if optim == "sgd":
        optimizer = torch.optim.SGD(problem.net.parameters(), lr=1e-3)
        x, y = problem.batch

        def descend() -> None:
            optimizer.zero_grad()
            problem.likelihood.nll(problem.net(x), y).mean().backward()
            optimizer.step()

        seconds.append(("step", timed(descend, repeat=3)))
    else:
        began = time.perf_counter()
        ng = ff.natural_gradient(
            problem.model, problem.params, problem.batch[0], likelihood=problem.likelihood, method=optim,
            context=problem.context,
        )  # fmt: skip
        seconds.append(("build", time.perf_counter() - began))
        state, draws = ng.init(problem.params, damping=1.0), torch.Generator().manual_seed(0)

        def step(update: bool, invert: bool) -> None:
            nonlocal state
            _, state, info = ng.step(
                problem.params, state, problem.batch, update=update, invert=invert, generator=draws,
                context=problem.context,
            )  # fmt: skip
            ff.check(info)

        for name, update, invert, repeat in (
            ("statistics and inverses", True, True, 1), ("statistics", True, False, 2), ("step", False, False, 3),
        ):  # fmt: skip
            seconds.append((name, timed(lambda u=update, i=invert: step(u, i), repeat)))  # type: ignore[misc]
    times = ", ".join(f"{name} {value:.1f} s" for name, value in seconds)
    return f"{net} ({size:.0f} million parameters) {optim}: {times}; {memory():.1f} GiB ({start:.1f} before the first)"


def timed(call: Callable[[], None], repeat: int) -> float:
    """Return the shortest time of a call."""
    best = float("inf")
    for _ in range(repeat):
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best


def memory() -> float:
    """Return the peak memory of this process in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(config: ScaleConfig) -> None:
    """Measure every net with every optimizer."""
    for net in listed(config.nets):
        for optim in listed(config.optims):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                print(pool.submit(measured, net, optim, config).result(), flush=True)


if __name__ == "__main__":
    with reported():
        main(parse(ScaleConfig, description=__doc__ or ""))
