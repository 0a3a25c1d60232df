"""Compare natural gradients without tuning with tuned first-order optimizers, per step and in wall-clock time.

`python apps/compare.py --data_path DIR` goes through the nets, in this order for each:

1. search: every baseline with 6 learning rates x 2 schedules on seed 0 (SOAP 3 x 2);
2. repeat: the best of each, and every natural gradient without hyperparameters, on all seeds;
3. endure: every natural gradient without hyperparameters, on each seed for twice the length, and for a few hundred
   steps with other batch sizes; none may diverge or stop learning;
4. race: the tuned Adam, other baselines and the natural gradients one after another with nothing else running, until
   they reach the training loss at which that Adam ended; plain, and compiled with `--compile`.

A run is one line in `FOLDER/NET.jsonl`, written when it is finished; finished runs are not repeated. The study can
therefore be stopped at any time and done in parts: `--nets MNIST --optims adam,kfac --phases search,repeat`. Search,
repeat and endure count steps and may share the machine; the race needs it alone. `--phases report` writes the tables
and pictures.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fisherfn as ff
from common.baselines import BASELINES, Schedule, baseline
from common.config import POSITIVE, ConfigError, check_listed, listed, option, parse
from common.data import load
from common.loop import Settings, Snapshot, Task, evaluate, start, train
from common.runs import reported
from common.steps import Optimizer
from common.study import BATCHES, NETS, RACES, SHORT, TWICE, Net, Run, best, read, write
from common.study_report import TARGET, report
from common.train_config import APPS, TrainConfig
from common.trainer import cadence, make_optimizer, make_task

PHASES = ("search", "repeat", "endure", "race", "report")
CORE = "MNIST,CURVES,CURVES_TANH,FACES,CIFAR10"

RATES = 6
SCHEDULES: tuple[Schedule, ...] = ("constant", "cosine")
"""Learning rates of each baseline, in thirds of a decade, each with every schedule; SOAP has half as many."""

CHECKS, CLOSER, CLOSE = 4, 5, 1.25
"""Evaluations per epoch of a race, and how many times more often once the loss is below `CLOSE` times the target.

With 20 steps between two evaluations a race of 180 steps would be known to a tenth only.
"""

Ready = dict[tuple[str, str], Optimizer]
"""Compiled natural gradients by net and method: pure functions, so that one trains every seed."""


@dataclass(frozen=True)
class CompareConfig:
    """The settings of the study."""

    nets: str = option(CORE, f"comma-separated nets: {', '.join(NETS)}")
    optims: str = option("sgd,adam,adamw,kfac", "optimizers: sgd, adam, adamw, soap, and every natural gradient")
    phases: str = option("search,repeat,report", f"phases, in this order: {', '.join(PHASES)}")
    seeds: int = option(3, "number of seeds 0, 1, … of everything but the search", check=POSITIVE)
    compile: bool = option(False, "compile the steps of the race")
    threads: int = option(2, "number of torch threads", check=POSITIVE)
    data_path: str | None = option(None, "folder with the files of the data sets; default: ./data")
    page: str | None = option(None, "page for the tables; the picture is written next to it")
    folder: str = option("results/compare", "folder for the records")

    def __post_init__(self) -> None:
        check_listed("nets", self.nets, NETS)
        check_listed("optims", self.optims, (*BASELINES, *ff.METHODS))
        check_listed("phases", self.phases, PHASES)


def main(config: CompareConfig) -> None:
    """Run the phases, net by net."""
    nets, optims, phases = (listed(value) for value in (config.nets, config.optims, config.phases))
    torch.set_num_threads(config.threads)
    ready: Ready = {}
    for net in nets:
        records = Path(config.folder) / f"{net}.jsonl"
        for run in (run for phase in PHASES if phase in phases for run in planned(phase, net, optims, config, records)):
            if run.key not in keys(records):
                done = execute(run, NETS[net], config, ready)
                for part in (done, done.half(NETS[net].epochs)) if done.kind == TWICE else (done,):
                    if part.key not in keys(records):
                        write(records, part)
                        print(part.line(), flush=True)
    if "report" in phases:
        report(Path(config.folder), nets, Path(config.page) if config.page else None)


def keys(records: Path) -> set[tuple[Any, ...]]:
    """Return what the recorded runs were asked to do."""
    return {run.key for run in read(records)}


def planned(phase: str, net: str, optims: list[str], config: CompareConfig, records: Path) -> Iterator[Run]:
    """Return the runs of one phase; a repeat or race of baselines needs their search."""
    if phase == "search":
        for optim in (name for name in optims if name in BASELINES):
            yield from searched(net, optim)
    elif phase == "endure":
        for optim in (name for name in optims if name not in BASELINES):
            free = Run(net, optim, None, None, 0)
            yield from (free._replace(seed=seed, kind=TWICE) for seed in range(config.seeds))
            yield from (free._replace(kind=f"batch {size}") for size in BATCHES)
    elif phase in ("repeat", "race"):
        for seed in range(config.seeds):
            for optim in sorted(optims, key=lambda name: name != TARGET) if phase == "race" else optims:
                run = winner(net, optim, read(records))
                if run is None:
                    print(f"{net}: no finished search of {optim}, so no {phase}")
                elif phase == "repeat":
                    yield run._replace(seed=seed)
                else:
                    yield run._replace(seed=seed, kind="compiled" if config.compile else "plain")


def searched(net: str, optim: str) -> Iterator[Run]:
    """Return all trials of a baseline, the middle learning rates first."""
    first = NETS[net].rates[optim]
    count = RATES // 2 if optim == "soap" else RATES
    for third in range(count):
        for schedule in SCHEDULES:
            yield Run(net, optim, float(f"{10 ** ((first - third) / 3):.4g}"), schedule, seed=0)


def winner(net: str, optim: str, runs: list[Run]) -> Run | None:
    """Return the run of a search with the lowest final training loss; a natural gradient has no search."""
    if optim not in BASELINES:
        return Run(net, optim, None, None, seed=0)
    chosen = best([run for run in runs if run.optim == optim and run.seed == 0 and not run.kind])
    return None if chosen is None else chosen.fresh()


def execute(run: Run, net: Net, config: CompareConfig, ready: Ready) -> Run:
    """Train and return the run with its points; a natural gradient that was compiled is added to `ready`."""
    full = settings(run, net, config)
    data = load(full.data, data_path=full.data_path, seed=full.seed)
    full = dataclasses.replace(full, model=full.model or full.model_for(data))
    task, module = make_task(full, data)
    optimizer, warm = prepared(run, net, full, task, module, ready)
    points, stopped = trained(run, net, full, config, task, optimizer)
    return run._replace(points=points, stopped=stopped, warm=warm, threads=config.threads)


def prepared(
    run: Run, net: Net, full: TrainConfig, task: Task, module: torch.nn.Module, ready: Ready
) -> tuple[Optimizer, float]:
    """Return the optimizer of a run, compiled before it starts, and the seconds of compiling."""
    build = optimizer_of(run, net, full)
    if run.kind != "compiled":
        return build(task, module), 0.0
    if run.optim in BASELINES:  # the steps of another one are timed: a baseline changes its net
        return build(task, module), warmed(build(task), task, full)
    key = run.net, run.optim
    if key in ready:
        return ready[key], 0.0
    ready[key] = build(task, module)
    return ready[key], warmed(ready[key], task, full)


def trained(
    run: Run, net: Net, full: TrainConfig, config: CompareConfig, task: Task, optimizer: Optimizer
) -> tuple[list[tuple[float, ...]], str]:
    """Train; return the points of the run and why it stopped before its last epoch, if it did."""
    points: list[tuple[float, ...]] = []
    steps = math.ceil(len(task.train[0]) / full.batch_size)
    went = Settings(lasting(run, net, steps), full.batch_size, full.seed, progress=False)
    target = target_of(run, config) if run.kind in RACES and run.optim != TARGET else None
    race, limit = Race(task, points, target, steps), Limit(task, points)
    watch = race.watch if run.kind in RACES else limit.watch if run.batch_size else lambda *_: None
    try:
        for epoch in train(task, optimizer, start(task, optimizer), went, watch):
            if run.kind not in RACES:
                points.append(tuple(epoch.metrics[k] for k in ("step", "seconds", "train_loss", "test_loss")))
            if not math.isfinite(epoch.metrics["train_loss"]):
                return points, "diverged"
    except Reached:
        return points, "reached"
    except ff.FisherfnError as error:
        return points, type(error).__name__
    return points, ""


def settings(run: Run, net: Net, config: CompareConfig) -> TrainConfig:
    """Return the trainer's configuration of a run."""
    optim = "sgd" if run.optim in BASELINES else run.optim
    given: dict[str, Any] = {"data": net.data, "model": net.model, "optim": optim, "seed": run.seed}
    given |= {"data_path": config.data_path, "compile": run.kind == "compiled"}
    if run.batch_size or net.batch_size:
        given["batch_size"] = run.batch_size or net.batch_size
    return APPS[net.app](**given)


def lasting(run: Run, net: Net, steps: int) -> int:
    """Return the epochs of a run, each of so many steps."""
    return math.ceil(SHORT / steps) if run.batch_size else net.epochs * (2 if run.kind == TWICE else 1)


def optimizer_of(run: Run, net: Net, full: TrainConfig) -> Callable[..., Optimizer]:
    """Build the optimizer from a task and its module."""

    def build(task: Task, module: torch.nn.Module | None = None) -> Optimizer:
        if run.optim not in BASELINES:
            return make_optimizer(full, task)
        if module is None:
            _, module = make_task(full, load(full.data, data_path=full.data_path, seed=full.seed))
        steps = net.epochs * math.ceil(len(task.train[0]) / full.batch_size)
        return baseline(
            module, task.likelihood, run.optim, lr=run.lr or 0.0, schedule=run.schedule or "constant", steps=steps,
            compile=full.compile,
        )  # fmt: skip

    return build


def warmed(optimizer: Optimizer, task: Task, full: TrainConfig) -> float:
    """Compile by a step of every kind with every batch size; return the seconds."""
    due = cadence(full)
    kinds = {due(step): step for step in reversed(range(1000))} if full.optim in ff.METHODS else {None: 0}
    last = len(task.train[0]) % full.batch_size
    began = time.perf_counter()
    for size in {full.batch_size, last or full.batch_size}:
        batch = (task.train[0][:size], task.train[1][:size])
        for index in sorted(kinds.values()):
            draws = torch.Generator().manual_seed(0)
            labels = optimizer.draw(batch, draws)
            context = task.seeded(task.context, size, draws)
            params = {name: leaf.clone() for name, leaf in task.params.items()}
            optimizer.step(params, optimizer.init(params), batch, context, labels, index)
    return time.perf_counter() - began


def target_of(run: Run, config: CompareConfig) -> float:
    """Return the final training loss of the tuned Adam with this seed."""
    records = read(Path(config.folder) / f"{run.net}.jsonl")
    ends = [other for other in records if other.optim == TARGET and other.kind == run.kind and other.seed == run.seed]
    if not ends:
        raise ConfigError(f"{run.net}: no race of adam with seed {run.seed} yet; name adam first in --optims")
    return ends[0].points[-1][2]


class Reached(Exception):
    """A run is over before its last epoch is."""


@dataclass
class Limit:
    """Ends a run after `SHORT` steps, with the loss there."""

    task: Task
    points: list[tuple[float, ...]]

    def watch(self, step: int, at: Callable[[], Snapshot]) -> None:
        """Evaluate and end the run where it is due; see `common.loop.Watch`."""
        if step == SHORT:
            loss, _ = evaluate(self.task, at(), self.task.train)
            self.points.append((step, at().seconds, loss, math.nan))
            raise Reached


@dataclass
class Race:
    """Evaluates a few times per epoch, its own time not counted, and ends a run that has reached its target.

    Close to the target it evaluates more often.
    """

    task: Task
    points: list[tuple[float, ...]]
    target: float | None
    steps: int
    spent: float = 0.0
    offset: float = 0.0

    def watch(self, step: int, at: Callable[[], Snapshot]) -> None:
        """Evaluate where it is due; see `common.loop.Watch`."""
        close = bool(self.points) and self.target is not None and self.points[-1][2] < CLOSE * self.target
        every = max(1, self.steps // (CHECKS * (CLOSER if close else 1)))
        if step % self.steps and step % every:
            return
        began = time.perf_counter()
        snapshot = at()
        loss, _ = evaluate(self.task, snapshot, self.task.train)
        self.points.append((step, snapshot.seconds - self.spent, loss, math.nan))
        if self.target is not None and loss <= self.target:
            raise Reached
        self.spent += time.perf_counter() - began


if __name__ == "__main__":
    with reported():
        main(parse(CompareConfig, description=__doc__ or ""))
