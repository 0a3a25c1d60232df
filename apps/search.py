"""Search learning rates of first-order optimizers with equal budgets: same problem, seed and number of trials for each.

Natural gradients need no search, as they choose their own settings (docs/adaptive.md).

`python apps/search.py --app train_cnn --data CIFAR10 --data_path DIR` records every trial in
apps/configs/search/cuda_convnet-CIFAR10.json and the best of each optimizer (lowest final training loss) in
apps/configs/tuned.yml, from which the trainers take settings that the command line does not give.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

import yaml

import fisherfn as ff
from common.atomic import replace_text
from common.config import POSITIVE, SEED, option, parse, validate
from common.data import Data, load
from common.loop import Settings, start, train
from common.runs import check_device, reported
from common.train_config import APPS, TrainConfig
from common.trainer import TUNED, make_optimizer, make_task

Grid = dict[str, list[dict[str, float]]]
"""The settings to try, by optimizer."""


def thirds(first: int, count: int, digits: int = 6) -> list[dict[str, float]]:
    """Return `count` learning rates, downwards in thirds of a decade from 10^(first/3)."""
    return [{"lr": round(10 ** ((first - third) / 3), digits)} for third in range(count)]


GRIDS: dict[str, Grid] = {
    "train_mlp": {
        "sgd": thirds(-3, 10),
        "adam": thirds(-3, 10),
    },
    "train_cnn": {
        "sgd": thirds(-3, 8),  # 1e-1 … 4.6e-4
        "adam": thirds(-4, 8),  # 4.6e-2 … 2.2e-4
    },
    "train_autoencoder": {
        # the loss is a sum over 784 or 3,072 outputs, so learning rates of sgd are smaller
        "sgd": thirds(-9, 8, digits=8),  # 1e-3 … 4.6e-6
        "adam": thirds(-3, 8),  # 1e-1 … 4.6e-4
    },
}
"""The grids, by trainer; in each, every optimizer has the same number of settings."""


@dataclass(frozen=True)
class SearchConfig:
    """The problem and the budget of a search."""

    app: str = option("train_mlp", "trainer", choices=APPS)
    model: str | None = option(None, "net; default: the one for the data")
    data: str | None = option(None, "data set; default: that of the trainer")
    data_path: str | None = option(None, "folder with the data files; default: ./data")
    num_epochs: int = option(20, "epochs per trial", check=POSITIVE)
    batch_size: int | None = option(None, "batch size; default: that of the trainer", check=POSITIVE)
    seed: int = option(0, "seed of initialisation, data order and labels", check=SEED)
    device: str = option("cpu", "device: cpu, cuda, cuda:1, …")

    def __post_init__(self) -> None:
        validate(self)
        validate(self.trainer())

    def trainer(self) -> TrainConfig:
        """Return the configuration of the trainer, without optimizer."""
        given = {key: value for key, value in dataclasses.asdict(self).items() if key != "app" and value is not None}
        return APPS[self.app](**given)


def base(config: SearchConfig) -> tuple[TrainConfig, Data]:
    """Return the shared configuration of all trials, with its model named, and the data."""
    full = config.trainer()
    check_device(full.device)
    data = load(full.data, data_path=full.data_path, seed=full.seed)
    return dataclasses.replace(full, model=full.model or full.model_for(data)), data


def search(full: TrainConfig, data: Data) -> list[dict[str, Any]]:
    """Run all trials, in the order of the grids."""
    trials = []
    for optim, grid in GRIDS[full.app].items():
        for settings in grid:
            chosen: dict[str, Any] = {"optim": optim, **settings}
            trials.append({**chosen, **trial(dataclasses.replace(full, **chosen), data)})
            print(json.dumps(trials[-1]), flush=True)
    return trials


def trial(config: TrainConfig, data: Data) -> dict[str, Any]:
    """Return the metrics of the last epoch, or why training stopped; a diverged trial has no loss."""
    task, _ = make_task(config, data)
    optimizer = make_optimizer(config, task)
    last: dict[str, Any] = {}
    settings = Settings(config.num_epochs, config.batch_size, config.seed)
    try:
        for epoch in train(task, optimizer, start(task, optimizer), settings):
            last = epoch.metrics
            if not math.isfinite(last["train_loss"]):
                return {"train_loss": None, "stopped": f"loss {last['train_loss']} after epoch {last['epoch']}"}
    except ff.FisherfnError as error:
        return {"train_loss": None, "stopped": type(error).__name__}
    return {key: last[key] for key in last if key not in ("epoch", "step", "skipped")}


def best(trials: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the settings with the lowest final training loss, for each optimizer with a finished trial."""
    chosen: dict[str, dict[str, float]] = {}
    for optim in dict.fromkeys(trial["optim"] for trial in trials):
        finished = [t for t in trials if t["optim"] == optim and t["train_loss"] is not None]
        if finished:
            winner = min(finished, key=lambda t: t["train_loss"])
            chosen[optim] = {"lr": winner["lr"]}
    return chosen


def record(full: TrainConfig, name: str, trials: list[dict[str, Any]]) -> None:
    """Write every trial to a file, and the best settings to the table of tuned settings, by model and data."""
    model = str(full.model)
    folder = TUNED.parent / "search"
    folder.mkdir(exist_ok=True)
    keys = ("model", "num_epochs", "batch_size", "seed", "init_params")
    budget = {"app": full.app, "data": name} | {key: getattr(full, key) for key in keys}
    lines = ",\n".join("  " + json.dumps(trial) for trial in trials)
    path = folder / f"{model}-{name}.json".replace(":", "-")
    replace_text(path, f'{{"budget": {json.dumps(budget)},\n "trials": [\n{lines}\n]}}\n')
    table = yaml.safe_load(TUNED.read_text())
    entry = table["tuned"].setdefault(model, {}).setdefault(name, {})
    entry.update(best(trials))
    header = "".join(line for line in TUNED.read_text().splitlines(keepends=True) if line.startswith("#"))
    replace_text(TUNED, header + yaml.safe_dump(table, sort_keys=False))
    print(f"{path.name}: {len(trials)} trials; the best of each optimizer are in {TUNED.name}: {best(trials)}")


if __name__ == "__main__":
    with reported():
        full, data = base(parse(SearchConfig, description=__doc__ or ""))
        record(full, data.name, search(full, data))
