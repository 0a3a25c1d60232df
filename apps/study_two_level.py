"""Measure the effect of a coarse space on K-FAC: distance to the exact step, training loss and cost.

`python apps/study_two_level.py --data CURVES` measures three quantities, all at one λ. K-FAC and the fine method of
every two-level method are damped by λI, like the exact natural gradient, so that all approximate the same step.

1. Along K-FAC's run, on single batches: the energy ‖z − z*‖² / ‖z*‖² of the step z in the norm of F + λI, with z* the
   exact solution (a zero step has energy 1), and the conjugate-gradient steps on (F + λI) z = ∇ to an energy of 1 %,
   preconditioned by the method.
2. The training loss after a number of steps with KL clip and momentum, over seeds.
3. Seconds per step, including statistics and inverses, relative to K-FAC in the same run.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

import fisherfn as ff
from common import optimizers
from common.config import POSITIVE, filled, option, parse
from common.data import load
from common.loop import Task
from common.plots import curve_grid
from common.runs import reported
from common.train_config import APPS, TrainConfig
from common.trainer import FIXED, make_task

FOLDER = "study_two_level"
FINE = ff.kfac(damping_form="eigen")


def two_level(coarse: str, form: str | None = "balanced", krylov: bool = False) -> ff.Method:
    """Build a two-level method over K-FAC with λI."""
    return ff.two_level(FINE, coarse, krylov, form)


METHODS = {
    "K-FAC": FINE,
    "nicolaides": two_level("nicolaides"),
    "nicolaides, Krylov": two_level("nicolaides", krylov=True),
    "spectral": two_level("spectral"),
    "residual": two_level("residual"),
    "tselepidis": two_level("tselepidis", form=None),
    "nicolaides, multiplicative": two_level("nicolaides", "multiplicative"),
}
LINEAR = ("K-FAC", "nicolaides", "nicolaides, Krylov", "spectral", "tselepidis")
"""Symmetric linear operators, which conjugate gradients can use as preconditioners."""

ENERGY = 0.01
LIMIT = 300
"""Largest number of conjugate-gradient steps."""


@dataclass(frozen=True)
class StudyConfig:
    """The settings of the study."""

    app: str = option("train_mlp", "trainer whose nets and data are used", choices=APPS)
    data: str | None = option(None, "data set; default: that of the trainer", aliases=("dataset",))
    data_path: str | None = option(None, "folder with the data files; default: ./data", aliases=("data_root",))
    model: str | None = option(None, "model; default: the one for the data")
    batch_size: int | None = option(None, "batch size; default: that of the trainer", check=POSITIVE)
    damping: float | None = option(None, "λ; default: 1", check=POSITIVE)
    kl_bound: float | None = option(None, "KL bound; default: 0.01", aliases=("clipping",), check=POSITIVE)
    steps: int = option(200, "steps per run", check=POSITIVE)
    seeds: int = option(3, "runs per method, seeds 0, 1, …", check=POSITIVE)
    points: int = option(3, "batches of the K-FAC run on which distances are measured", check=POSITIVE)
    result_dir: str = option("results", "folder for results")
    quiet: bool = option(False, "no progress bar")


def study(config: StudyConfig) -> Path:
    """Run all measurements; print the table, write picture and numbers; return the folder."""
    full, task = prepared(config, 0)
    distances = list(measured(config, full, task))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    bar = tqdm(total=config.seeds * len(METHODS), disable=True if config.quiet else None, unit="run")
    for seed in range(config.seeds):
        full, task = prepared(config, seed)
        for name, method in METHODS.items():
            bar.set_description(f"{full.data} {name}")
            runs[name].append(trained(config, full, task, method))
            bar.update()
    bar.close()
    folder = Path(config.result_dir) / FOLDER / f"{full.data}-{full.model}".replace(":", "-")
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"config": dataclasses.asdict(full), "steps": config.steps, "distances": distances, "runs": runs}
    (folder / "result.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
    picture(runs, f"{full.model} on {full.data}, λ = {full.damping:g}: training loss", folder / "losses.png")
    print(table(distances, runs))
    print(f"\nresult.json and losses.png are in {folder}.")
    return folder


def prepared(config: StudyConfig, seed: int) -> tuple[TrainConfig, Task]:
    """Return the trainer's configuration with all defaults, and model and data."""
    own = {"app", "steps", "seeds", "points", "result_dir", "quiet"}
    given = {k: v for k, v in dataclasses.asdict(config).items() if k not in own and v is not None}
    full = APPS[config.app](**given, optim="kfac", seed=seed)
    data = load(full.data, data_path=full.data_path, seed=0)
    model = full.model or full.model_for(data)
    full = filled(full, FIXED | {"model": model})
    return full, make_task(full, data)[0]


def natural_gradient(full: TrainConfig, task: Task, method: ff.Method) -> ff.NaturalGradient:
    """Build the natural gradient of a method on this task."""
    x = task.train[0][: full.batch_size]
    return ff.natural_gradient(
        task.model, task.params, x, likelihood=task.likelihood, method=method, context=task.context
    )


def run(config: StudyConfig, full: TrainConfig, task: Task, method: ff.Method) -> Iterator[tuple[Any, Any, Any, float]]:
    """Train with momentum and clip; yield batch, parameters, context and loss before every step."""
    fixed: Any = {name: float(getattr(full, name)) for name in FIXED}
    optimizer = optimizers.natural(natural_gradient(full, task, method), **fixed, ema=full.ema)
    params, context, state = task.params, task.context, optimizer.init(task.params)
    generator = torch.Generator().manual_seed(full.seed)
    for index in range(config.steps):
        chosen = torch.randint(len(task.train[0]), (full.batch_size,), generator=generator)
        batch = (task.train[0][chosen], task.train[1][chosen])
        new = optimizer.step(params, state, batch, context, optimizer.draw(batch, generator), index)
        yield batch, params, context, float(new.info.loss) / task.per_output
        params, context, state = new.params, new.context, new.state


def trained(config: StudyConfig, full: TrainConfig, task: Task, method: ff.Method) -> dict[str, Any]:
    """The losses of all steps, the mean of the last tenth, and seconds per step."""
    began, losses = time.perf_counter(), []
    for _, _, _, loss in run(config, full, task, method):
        losses.append(loss)
        if not math.isfinite(loss):
            break
    tail = losses[-max(1, config.steps // 10) :]
    finite = len(losses) == config.steps and math.isfinite(losses[-1])
    return {
        "losses": [loss for loss in losses if math.isfinite(loss)],
        "train_loss": statistics.fmean(tail) if finite else None,
        "seconds": (time.perf_counter() - began) / len(losses),
    }


# ------------------------------------------------------------------------------------------------------- distances


def measured(config: StudyConfig, full: TrainConfig, task: Task) -> Iterator[dict[str, Any]]:
    """Measure the energy of one step and conjugate-gradient steps, by method, at some steps of the K-FAC run."""
    due = {round(config.steps * (p + 1) / config.points) - 1 for p in range(config.points)}
    nets = {name: natural_gradient(full, task, method) for name, method in METHODS.items()}
    for index, (batch, params, context, loss) in enumerate(run(config, full, task, FINE)):
        if index not in due:
            continue
        ng = nets["K-FAC"]
        stats = ng.stats(params, batch, generator=torch.Generator().manual_seed(index), context=context)
        found = {name: distance(net, params, stats, float(full.damping or 0.0), name) for name, net in nets.items()}
        yield {"step": index, "loss": loss, "methods": found}


def distance(
    ng: ff.NaturalGradient, params: dict[str, Tensor], stats: ff.Stats, damping: float, name: str
) -> dict[str, float | None]:
    """Measure the energy of the method's step from these statistics, and its conjugate-gradient steps."""
    state = ng.init(params, damping=damping)
    for act in (lambda s: ng.update(s, stats), ng.invert):
        state, info = act(state)
        ff.check(info)
    F = ng.fisher(stats)
    grads = stats.grads
    exact = F.solve(grads, damping)
    whole = ff.tree.dot(grads, exact)

    def energy(z: dict[str, Tensor]) -> float:
        d = ff.tree.add(z, exact, scale=-1.0)
        return float(ff.tree.dot(d, damped(d)) / whole)

    def damped(z: dict[str, Tensor]) -> dict[str, Tensor]:
        return ff.tree.add(F @ z, z, scale=damping)

    steps = conjugate(damped, lambda r: ng.precondition(state, r), grads, float(whole)) if name in LINEAR else None
    return {"energy": energy(ng.precondition(state, grads)), "steps": steps}


def conjugate(damped: Callable[[Any], Any], precondition: Callable[[Any], Any], grads: Any, whole: float) -> int | None:
    """Count preconditioned conjugate-gradient steps from zero to an energy of 1 %; None if it is not reached.

    With r = ∇ − F_• x the energy of x is ⟨∇, z*⟩ − ⟨x, ∇⟩ − ⟨x, r⟩ over ⟨∇, z*⟩, without additional products.
    """
    x, r = ff.tree.zeros_like(grads), grads
    z = precondition(r)
    p, rz = z, ff.tree.dot(r, z)
    for step in range(1, LIMIT + 1):
        product = damped(p)
        alpha = float(rz / ff.tree.dot(p, product))
        x, r = ff.tree.add(x, p, scale=alpha), ff.tree.add(r, product, scale=-alpha)
        if whole - float(ff.tree.dot(x, grads) + ff.tree.dot(x, r)) <= ENERGY * whole:
            return step
        z = precondition(r)
        rz, before = ff.tree.dot(r, z), rz
        p = ff.tree.add(z, p, scale=float(rz / before))
    return None


# ------------------------------------------------------------------------------------------------------ the report


def table(distances: list[dict[str, Any]], runs: dict[str, list[dict[str, Any]]]) -> str:
    """Format one line per method: energies and steps at every point, loss over seeds, cost."""
    at = " / ".join(str(point["step"] + 1) for point in distances)
    lines = [f"{'':28}{'energy at ' + at:>30}{'CG steps to 1 %':>20}{'training loss':>22}{'cost':>7}"]
    unit = statistics.median(found["seconds"] for found in runs["K-FAC"])
    for name, found in runs.items():
        points = [point["methods"][name] for point in distances]
        energies = " / ".join(f"{point['energy']:.3g}" for point in points)
        steps = " / ".join("–" if point["steps"] is None else str(point["steps"]) for point in points)
        ends = [one["train_loss"] for one in found if one["train_loss"] is not None]
        loss = f"{statistics.fmean(ends):.4f}" if ends else "–"
        loss += f" ± {statistics.stdev(ends):.4f}" if len(ends) > 1 else ""
        loss += f" ({len(ends)} of {len(found)})" if len(ends) < len(found) else ""
        cost = statistics.median(one["seconds"] for one in found) / unit
        lines.append(f"{name:28}{energies:>30}{steps:>20}{loss:>22}{cost:7.2f}")
    return "\n".join(lines)


def picture(runs: dict[str, list[dict[str, Any]]], title: str, path: Path) -> None:
    """Draw training losses as means of ten steps, one panel per seed."""
    seeds = range(len(next(iter(runs.values()))))
    panels = {f"seed {seed}": {name: smoothed(found[seed]["losses"]) for name, found in runs.items()} for seed in seeds}
    strokes = {"nicolaides, multiplicative": ":"}
    curve_grid([(title, panels)], path, log=[True], strokes=strokes, columns=max(3, len(seeds)))


def smoothed(losses: list[float]) -> list[tuple[float, float]]:
    """Return means of ten steps each."""
    parts = [(at, losses[at : at + 10]) for at in range(0, len(losses), 10)]
    return [(at + len(part) / 2, statistics.fmean(part)) for at, part in parts]


if __name__ == "__main__":
    with reported():
        study(parse(StudyConfig, description=__doc__ or ""))
