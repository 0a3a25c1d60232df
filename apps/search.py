"""Equal-budget search: ten settings for each optimizer on the same data, seed, batch size and epochs.

`python apps/search.py --data MNIST --data_path DIR` records every trial in apps/configs/search/MNIST.json and the best
of each optimizer (lowest final training loss) in apps/configs/tuned.yml, where the trainers look for what the command
line leaves open.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import fisherfn as ff
from common.config import option, parse
from common.data import load
from common.loop import Settings, Task, start, train
from common.train_config import TrainConfig
from common.trainer import TUNED, make_optimizer, make_task, reported

THIRDS = [round(10 ** (-1 - third / 3), 6) for third in range(10)]
"""1e-1 … 1e-4 in thirds of a decade."""

GRIDS: dict[str, list[dict[str, float]]] = {
    "sgd": [{"lr": lr} for lr in THIRDS],
    "adam": [{"lr": lr} for lr in THIRDS],
    "kfac": [
        {"lr": lr, "damping": damping, "clipping": clipping}
        for lr, damping, clipping in [
            (1.0, 0.1, 0.001),
            (1.0, 1.0, 0.001),
            (1.0, 1.0, 0.01),
            (1.0, 1.0, 0.1),
            (1.0, 3.0, 0.3),
            (1.0, 10.0, 0.01),
            (1.0, 10.0, 0.1),
            (1.0, 10.0, 1.0),
            (0.3, 1.0, 0.001),
            (0.3, 10.0, 1.0),
        ]
    ],
}


SETTINGS = ("lr", "damping", "clipping")
"""What is searched."""


@dataclass(frozen=True)
class SearchConfig:
    """What is searched, on which budget."""

    data: str = option("CURVES", "data set")
    data_path: str | None = option(None, "folder of data files")
    num_epochs: int = option(20, "epochs a trial")
    batch_size: int = option(256, "examples a step")
    seed: int = option(0, "of initialisation, order and labels")


def search(config: SearchConfig) -> list[dict[str, Any]]:
    """All trials, in the order of the grids."""
    data = load(config.data, data_path=config.data_path, seed=config.seed)
    trials = []
    for optim, grid in GRIDS.items():
        for settings in grid:
            shared: dict[str, Any] = {**dataclasses.asdict(config), **settings}
            full = dataclasses.replace(TrainConfig(), model=data.model, optim=optim, **shared)
            task, _ = make_task(full, data)
            trials.append({"optim": optim, **settings, **trial(full, task)})
            print(json.dumps(trials[-1]), flush=True)
    return trials


def trial(config: TrainConfig, task: Task) -> dict[str, Any]:
    """The last epoch's metrics, or why there is none; a diverged trial has no loss."""
    optimizer = make_optimizer(config, task)
    last: dict[str, Any] = {}
    try:
        run = train(
            task, optimizer, start(task, optimizer), Settings(config.num_epochs, config.batch_size, config.seed)
        )
        for epoch in run:
            last = epoch.metrics
            if not math.isfinite(last["train_loss"]):
                return {"train_loss": None, "stopped": f"loss {last['train_loss']} after epoch {last['epoch']}"}
    except ff.FisherfnError as error:
        return {"train_loss": None, "stopped": type(error).__name__}
    return {key: last[key] for key in ("train_loss", "test_loss", "seconds")}


def best(trials: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The settings with the lowest final training loss, for each optimizer."""
    chosen: dict[str, dict[str, float]] = {}
    for optim in GRIDS:
        finished = [t for t in trials if t["optim"] == optim and t["train_loss"] is not None]
        winner = min(finished, key=lambda t: t["train_loss"])
        chosen[optim] = {key: winner[key] for key in winner if key in SETTINGS}
    return chosen


def record(config: SearchConfig, trials: list[dict[str, Any]]) -> None:
    """Every trial beside the configurations, the best in the table of tuned settings."""
    folder = TUNED.parent / "search"
    folder.mkdir(exist_ok=True)
    budget = {key: value for key, value in dataclasses.asdict(config).items() if key != "data_path"}
    lines = ",\n".join("  " + json.dumps(trial) for trial in trials)
    path = folder / f"{config.data.replace(':', '-')}.json"
    path.write_text(f'{{"budget": {json.dumps(budget)},\n "trials": [\n{lines}\n]}}\n')
    table = yaml.safe_load(TUNED.read_text()) | {config.data: best(trials)}
    header = "".join(line for line in TUNED.read_text().splitlines(keepends=True) if line.startswith("#"))
    TUNED.write_text(header + yaml.safe_dump(table, sort_keys=False))
    print(f"{Path(path).name}: {len(trials)} trials; the best of each optimizer are in {TUNED.name}: {best(trials)}")


if __name__ == "__main__":
    with reported():
        config = parse(SearchConfig, description=__doc__ or "")
        record(config, search(config))
