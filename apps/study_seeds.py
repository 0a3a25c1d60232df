"""Compare optimizers with their tuned settings over several seeds: means, standard deviations and curves.

`python apps/study_seeds.py --app train_cnn --data CIFAR10 --data_path DIR --num_epochs 10` trains sgd, adam and kfac
with seeds 0, 1, 2. The seed determines initialisation, order, labels, and random parts of the data. Each run has its
own result folder; `--resume` continues an interrupted study.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import fisherfn as ff
from common.config import NON_NEGATIVE, POSITIVE, check_listed, filled, listed, option, parse
from common.data import load
from common.plots import loss_curves
from common.results import CHECKPOINT, default_name, read_metrics
from common.runs import reported
from common.train_config import APPS, LABELS, OPTIMIZERS, TrainConfig
from common.trainer import run

FOLDER = "study_seeds"
COLUMNS = {
    "train_loss": "train loss",
    "test_loss": "test loss",
    "train_accuracy": "train acc.",
    "test_accuracy": "test acc.",
}

Runs = dict[str, dict[int, list[dict[str, float]]]]
"""Metrics by optimizer and seed."""


@dataclass(frozen=True)
class StudyConfig:
    """The settings of the study."""

    app: str = option("train_mlp", "trainer", choices=APPS)
    model: str | None = option(None, "model; default: the one for the data")
    data: str | None = option(None, "data set; default: that of the trainer")
    data_path: str | None = option(None, "folder with the data files; default: ./data")
    optims: str = option("sgd,adam,kfac", "comma-separated optimizers")
    seeds: int = option(3, "runs per optimizer, seeds 0, 1, …", check=POSITIVE)
    num_epochs: int = option(10, "epochs per run", check=NON_NEGATIVE)
    batch_size: int | None = option(None, "batch size; default: that of the trainer", check=POSITIVE)
    device: str = option("cpu", "device: cpu, cuda, cuda:1, …")
    result_dir: str = option("results", "folder for results")
    resume: bool = option(False, "keep finished runs and continue unfinished ones; otherwise all runs start again")
    quiet: bool = option(False, "no progress bar and no line per epoch")

    def __post_init__(self) -> None:
        check_listed("optims", self.optims, OPTIMIZERS)


def study(config: StudyConfig) -> None:
    """Train all runs; print the table, draw the picture, write the numbers."""
    first = base(config)
    optims = listed(config.optims)
    runs: Runs = {optim: {} for optim in optims}
    for seed in range(config.seeds):
        for optim in optims:
            runs[optim][seed] = one(dataclasses.replace(first, optim=optim, seed=seed), config.resume)
    print("\n" + table(runs, config.num_epochs))
    write(runs, first)


def base(config: StudyConfig) -> TrainConfig:
    """Return the common configuration of all runs, with its model."""
    own = ("app", "optims", "seeds", "resume")
    given = {key: value for key, value in dataclasses.asdict(config).items() if key not in own and value is not None}
    full = APPS[config.app](**given)
    data = load(full.data, data_path=full.data_path)
    return filled(full, {"model": full.model_for(data)})


def one(config: TrainConfig, resume: bool) -> list[dict[str, float]]:
    """Return the metrics of one run; if it diverged, those up to this point."""
    folder = Path(config.result_dir) / FOLDER / default_name(config)
    resume = resume and (folder / CHECKPOINT).exists()
    print(f"\n{LABELS.get(config.optim, config.optim)}, seed {config.seed}", flush=True)
    try:
        run(dataclasses.replace(config, resume=resume, overwrite=not resume), app=FOLDER)
    except ff.errors.NonFiniteError as error:
        print(f"stopped: {error}")
    return read_metrics(folder)


def table(runs: Runs, num_epochs: int) -> str:
    """Format one line per optimizer: mean ± standard deviation over seeds after the last epoch, seconds per epoch."""
    last = {optim: finished(list(seeds.values()), num_epochs) for optim, seeds in runs.items()}
    columns = [key for key in COLUMNS if any(key in metrics for ends in last.values() for metrics in ends)]
    head = f"{'':14}" + "".join(f"{COLUMNS[key]:>20}" for key in columns) + f"{'s per epoch':>12}{'seeds':>8}"
    lines = [head]
    for optim, ends in last.items():
        cells = "".join(f"{spread([metrics[key] for metrics in ends]):>20}" for key in columns)
        seconds = spread([metrics["seconds"] / max(num_epochs, 1) for metrics in ends], digits=1, deviation=False)
        count = f"{len(ends)}/{len(runs[optim])}"
        lines.append(f"{LABELS.get(optim, optim):14}{cells}{seconds:>12}{count:>8}")
    return "\n".join(lines)


def finished(seeds: list[list[dict[str, float]]], num_epochs: int) -> list[dict[str, float]]:
    """Return the last epochs of the runs that finished with a finite loss."""
    ends = [metrics[-1] for metrics in seeds]
    return [end for end in ends if end["epoch"] == num_epochs and math.isfinite(end["train_loss"])]


def spread(values: list[float], digits: int = 5, deviation: bool = True) -> str:
    """Format the mean ± sample standard deviation (n − 1); a dash without values."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if deviation and len(values) > 1 else mean


def write(runs: Runs, config: TrainConfig) -> None:
    """Write the curves and the metrics of all runs to the folder of the results."""
    folder = Path(config.result_dir) / FOLDER
    name = f"{config.data}-{config.model}".replace(":", "-")
    curves = {
        f"{LABELS.get(optim, optim)}, seed {seed}": metrics
        for optim, seeds in runs.items()
        for seed, metrics in seeds.items()
    }
    loss_curves(curves, folder / f"{name}.png")
    (folder / f"{name}.json").write_text(json.dumps(runs, indent=1))
    print(f"\n{name}.png and {name}.json are in {folder}.")


if __name__ == "__main__":
    with reported():
        study(parse(StudyConfig, description=__doc__ or ""))
