"""Count dead code units on CURVES, by damping and KL bound: the reason why K-FAC can get stuck.

`python apps/study_plateau.py` trains the CURVES autoencoder for a few epochs for each pair, and counts the code units
(the six ReLU units in the middle) that no training image activates. If all six are dead, the output is constant, the
gradient of everything before the code is zero, and the loss stays at that of the best constant output.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.config import POSITIVE, option, parse
from common.data import load
from common.loop import Settings, Snapshot, Task, start, train
from common.plots import heatmap
from common.runs import reported
from common.train_config import TrainConfig
from common.trainer import make_optimizer, make_task, tuned

DAMPINGS = (0.1, 1.0, 10.0, 100.0)
CLIPS = (0.001, 0.01, 0.1, 1.0)


@dataclass(frozen=True)
class StudyConfig:
    """The settings of the study."""

    num_epochs: int = option(3, "epochs per run", check=POSITIVE)
    seeds: int = option(3, "runs per pair, seeds 0, 1, …", check=POSITIVE)
    result_dir: str = option("results", "folder for results")


def study(config: StudyConfig) -> None:
    """Run every pair and the tuned baselines; print a table, draw a picture and write the numbers as JSON."""
    data = load("CURVES")
    folder = Path(config.result_dir) / "study_plateau"
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = [{"damping": d, "kl_bound": c, "lr": 1.0} for d in DAMPINGS for c in CLIPS]
    runs = [("kfac", pair) for pair in pairs] + [
        (name, tuned("train_mlp", data.model, data.name, name)) for name in ("sgd", "adam")
    ]
    for optim, settings in runs:
        for seed in range(config.seeds):
            full = dataclasses.replace(TrainConfig(), optim=optim, seed=seed, **settings)
            task, _ = make_task(full, data)
            optimizer = make_optimizer(full, task)
            loss, dead = float("nan"), -1
            for epoch in train(task, optimizer, start(task, optimizer), Settings(config.num_epochs, 256, seed)):
                loss, dead = epoch.metrics["train_loss"], dead_code_units(task, epoch.snapshot)
            rows.append({"optim": optim, **settings, "seed": seed, "train_loss": loss, "dead_code_units": dead})
            print(json.dumps(rows[-1]), flush=True)
    (folder / "runs.json").write_text(json.dumps(rows, indent=1))
    panels = [
        ("dead code units of 6, mean over seeds", grid(rows, "dead_code_units"), "{:.1f}"),
        ("training loss, mean over seeds", grid(rows, "train_loss"), "{:.3f}"),
    ]
    heatmap(
        panels, rows=[f"{d:g}" for d in DAMPINGS], columns=[f"{c:g}" for c in CLIPS], axes=("damping λ", "clip κ"),
        path=folder / "plateau.png",
    )  # fmt: skip
    print(f"runs.json and plateau.png are in {folder}.")


def grid(rows: list[dict[str, Any]], key: str) -> list[list[float]]:
    """Return means over seeds, by damping and KL bound."""

    def cell(damping: float, clip: float) -> float:
        return float(np.mean([r[key] for r in rows if (r.get("damping"), r.get("kl_bound")) == (damping, clip)]))

    return [[cell(damping, clip) for clip in CLIPS] for damping in DAMPINGS]


@torch.no_grad()
def dead_code_units(task: Task, snapshot: Snapshot) -> int:
    """Count units of the narrowest layer that are zero on every training image."""
    params = snapshot.params
    weights = [name for name in params if name.endswith("weight")]
    code = min(range(len(weights)), key=lambda index: params[weights[index]].shape[0])
    x = task.train[0]
    for name in weights[: code + 1]:
        x = torch.nn.functional.linear(x, params[name], params[name.replace("weight", "bias")]).relu()
    return int((x.amax(0) <= 0).sum())


if __name__ == "__main__":
    with reported():
        study(parse(StudyConfig, description=__doc__ or ""))
