"""The nets of the comparison (apps/compare.py) and the records of its runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from common.baselines import Schedule
from common.train_config import LABELS

TITLES = {"sgd": LABELS["sgd"], "adam": LABELS["adam"], "adamw": "AdamW", "soap": "SOAP"} | LABELS
"""Names of the optimizers, in the order of the tables: first the baselines."""


class Net(NamedTuple):
    """A net of the comparison: its trainer, data and length, and the largest learning rate tried of each baseline.

    Attributes:
        app: trainer.
        data: data set.
        model: net; None for the one that suits the data.
        epochs: length of every run.
        rates: by baseline, three times the decimal logarithm of the largest rate; the others follow in thirds.
        batch_size: None for the trainer's.
        title: for tables and pictures.
    """

    app: str
    data: str
    model: str | None
    epochs: int
    rates: dict[str, int]
    batch_size: int | None = None
    title: str = ""


def _rates(sgd: int, adam: int) -> dict[str, int]:
    return {"sgd": sgd, "adam": adam, "adamw": adam, "soap": adam + 1}


NETS: dict[str, Net] = {
    "MNIST": Net("train_mlp", "MNIST", "AE_MNIST", 30, _rates(-6, -6), title="MNIST autoencoder"),
    "CURVES": Net(
        "train_mlp", "CURVES", "AE_CURVES", 40, _rates(-6, -6), title="CURVES autoencoder as published, ReLU code"
    ),
    "CURVES_TANH": Net(
        "train_mlp", "CURVES", "AE_CURVES_TANH", 40, _rates(-7, -6), title="CURVES autoencoder, tanh and linear code"
    ),
    "FACES": Net("train_mlp", "FACES", None, 10, _rates(-7, -7), title="FACES autoencoder, batch 256"),
    "CIFAR10": Net("train_cnn", "CIFAR10", "cuda_convnet", 10, _rates(-2, -5), title="cuda_convnet, CIFAR-10 subset"),
    "MNIST_TANH": Net(
        "train_mlp", "MNIST", "AE_MNIST_TANH", 30, _rates(-7, -6), title="MNIST autoencoder, tanh and linear code"
    ),
    "CURVES_SIGMOID": Net(
        "train_mlp", "CURVES", "AE_CURVES_SIGMOID", 40, _rates(-6, -6), title="CURVES autoencoder, sigmoid"
    ),
    "MNIST_SIGMOID": Net(
        "train_mlp", "MNIST", "AE_MNIST_SIGMOID", 30, _rates(-6, -6), title="MNIST autoencoder, sigmoid"
    ),
    "FACES_1024": Net(
        "train_mlp", "FACES", None, 10, _rates(-7, -7), batch_size=1024, title="FACES autoencoder, batch 1,024"
    ),
    "CONV_MNIST": Net(
        "train_autoencoder", "MNIST", "conv_AE_MNIST", 10, _rates(-9, -4), title="convolutional autoencoder, MNIST"
    ),
    "CONV_CIFAR10": Net(
        "train_autoencoder",
        "CIFAR10",
        "conv_AE_CIFAR10",
        10,
        _rates(-11, -4),
        title="convolutional autoencoder, CIFAR-10 subset",
    ),
}
"""The first five are the core of the study; the same command does the rest."""


RACES = ("plain", "compiled")

TWICE = "twice"

BATCHES = (32, 128, 2048)
"""Batch sizes of the short runs of the phase endure."""

SHORT = 300
"""Steps of a run with one of these."""


class Run(NamedTuple):
    """A run: what it was asked to do, and what came of it.

    Attributes:
        net: a key of `NETS`.
        optim: a baseline or a natural gradient.
        lr: learning rate; None where the optimizer finds it.
        schedule: of the learning rate; None likewise.
        seed: of everything.
        kind: "plain" or "compiled" for a race, "twice" for a run of twice the length, "batch N" for `SHORT` steps with
            batches of N, empty for the runs that search and repeat.
        points: (step, seconds of training, training loss, test loss), at every epoch or more often.
        stopped: "diverged", the name of an error, "reached" (the target of a race or `SHORT`), or empty.
        warm: seconds of compiling.
        threads: of torch.
    """

    net: str
    optim: str
    lr: float | None
    schedule: Schedule | None
    seed: int
    kind: str = ""
    points: list[tuple[float, ...]] = []
    stopped: str = ""
    warm: float = 0.0
    threads: int = 0

    @property
    def key(self) -> tuple[Any, ...]:
        """The run that was asked for."""
        return self.net, self.optim, self.lr, self.schedule, self.seed, self.kind

    def fresh(self) -> Run:
        """Return the same run before it was made."""
        return Run(*self.key)

    def half(self, epochs: int) -> Run:
        """Return the run of half the length that a run of twice the length goes through: nothing depends on the end."""
        whole = len(self.points) > epochs
        return self._replace(kind="", points=self.points[: epochs + 1], stopped="" if whole else self.stopped)

    @property
    def batch_size(self) -> int | None:
        """Batch size of a short run; None for the net's."""
        return int(self.kind.removeprefix("batch ")) if self.kind.startswith("batch ") else None

    @property
    def loss(self) -> float:
        """Final training loss; infinite for a run that did not end."""
        failed = self.stopped not in ("", "reached") or not self.points or not math.isfinite(self.points[-1][2])
        return math.inf if failed else self.points[-1][2]

    def line(self) -> str:
        """Return the run in a line for the terminal."""
        how = "" if self.lr is None else f" lr {self.lr:g} {self.schedule}"
        seconds = self.points[-1][1] if self.points else 0.0
        note = f" {self.stopped}" if self.stopped else ""
        return f"{self.net} {self.optim}{how} seed {self.seed} {self.kind} {self.loss:.5f} {seconds:.1f} s{note}"


def read(path: Path) -> list[Run]:
    """Return the finished runs of a file; a line that was cut off is none, a number that is none is NaN."""
    runs = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            run = Run(**json.loads(text))
        except json.JSONDecodeError:
            continue
        points = [tuple(math.nan if value is None else value for value in point) for point in run.points]
        runs.append(run._replace(points=points))
    return runs


def write(path: Path, run: Run) -> None:
    """Add a finished run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    points = [[float(f"{v:.7g}") if math.isfinite(v) else None for v in point] for point in run.points]
    whole = not path.exists() or path.read_text().endswith("\n")
    with path.open("a") as file:
        file.write("" if whole else "\n")  # after a line that was cut off
        file.write(json.dumps(run._asdict() | {"points": points}) + "\n")


def best(runs: Iterable[Run]) -> Run | None:
    """Return the run with the lowest final training loss, or None where none ended."""
    ended = [run for run in runs if math.isfinite(run.loss)]
    return min(ended, key=lambda run: run.loss, default=None)
