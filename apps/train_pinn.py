"""Train physics-informed nets: `python apps/train_pinn.py --data POISSON_2D --optim exact`.

The problems have known solutions, so the relative L2 error of the net is measured. Nets, points and error measure are
those of the published comparisons; docs/gallery/physics.md has the results.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm.auto import tqdm

import fisherfn as ff
from common import ranks
from common.checkpoints import CheckpointError
from common.config import NON_NEGATIVE, POSITIVE, SEED, ConfigError, option, parse, validate
from common.damage import understood
from common.pinn.nets import initial, size_of, widths_of
from common.pinn.optimizers import DEFAULTS, GRID, OPTIONS, Settings, optimizer_of
from common.pinn.problems import PROBLEMS, Posed
from common.results import CHECKPOINT, Results
from common.runs import Stopped, check_device, reported, stopped


@dataclass(frozen=True)
class PinnConfig:
    """The settings of a run."""

    app: ClassVar[str] = "train_pinn"
    sections: ClassVar = {"data": "problem and net", "optim": "optimization", "seed": "run"}

    data: str = option("POISSON_2D", "equation", aliases=("problem",), choices=lambda: PROBLEMS)
    model: str | None = option(None, "widths of the tanh net, such as 2-64-1; default: the published net")
    redraw: int | None = option(
        None,
        "steps between new training points; 0: never; default: as published (1 for POISSON_5D, otherwise 0)",
        check=NON_NEGATIVE,
    )

    optim: str = option("exact", "optimizer", choices=lambda: DEFAULTS)
    num_steps: int = option(300, "number of steps", check=POSITIVE)
    damping: float | None = option(None, "damping λ; default: that of the optimizer", check=NON_NEGATIVE)
    momentum: float | None = option(None, "momentum of SPRING; default: 0.9", check=NON_NEGATIVE)
    ema: float | None = option(
        None, "weight of old curvature in averages of kfac and dense; default: 0.95 and 0.6", check=NON_NEGATIVE
    )
    lr: float | None = option(
        None,
        "fixed learning rate in place of a line search; default: line search (adam: 1e-3, lbfgs: 1)",
        check=POSITIVE,
    )
    grid: int = option(GRID, "number of step sizes 1, 1/2, … of the line search", check=POSITIVE)

    seed: int = option(0, "random seed of points and net", check=SEED)
    device: str = option("cpu", "device: cpu, cuda, cuda:1, …")
    record_every: int = option(10, "steps between measurements of the error", check=POSITIVE)
    save_every: int = option(50, "steps between checkpoints", check=POSITIVE)
    result_dir: str = option("results", "folder for all results")
    result_name: str | None = option(None, "name of the result folder; default: from problem, net, optimizer and seed")
    overwrite: bool = option(False, "replace an existing result of that name")
    resume: bool = option(False, "continue from the checkpoint of an existing result")
    quiet: bool = option(False, "no progress bar and no table of results")

    def __post_init__(self) -> None:
        validate(self)
        if self.overwrite and self.resume:
            raise ConfigError("overwrite and resume exclude each other: give only one")
        if self.momentum is not None and not self.momentum < 1:
            raise ConfigError(f"momentum must be in [0, 1), got {self.momentum:g}")
        if self.ema is not None and not self.ema < 1:
            raise ConfigError(f"ema must be in [0, 1), got {self.ema:g}")


def completed(config: PinnConfig) -> PinnConfig:
    """Return the configuration with net and settings filled in.

    Raises:
        ConfigError: a net that does not fit the equation, or an option that the optimizer does not have.
    """
    for name, default_value in {"damping": None, "momentum": None, "ema": None, "lr": None, "grid": GRID}.items():
        given = getattr(config, name)
        if given and given != default_value and name not in OPTIONS[config.optim]:
            raise ConfigError(f"{name} is no option of {config.optim}: leave it out, or choose another optim")
    problem, default = PROBLEMS[config.data], DEFAULTS[config.optim]
    model = config.model or problem.model
    widths = widths_of(model)
    if widths[0] != problem.dimensions or widths[-1] != 1:
        raise ConfigError(f"model must have {problem.dimensions} inputs and 1 output for {config.data}, got {model}")
    open_ones = [name for name in ("damping", "momentum", "lr", "ema") if getattr(config, name) is None]
    filled = {name: getattr(default, name) for name in open_ones}
    redraw = problem.redraw if config.redraw is None else config.redraw
    return dataclasses.replace(config, model=model, redraw=redraw, **filled)


@dataclass(frozen=True)
class Progress:
    """The net after some steps."""

    step: int
    seconds: float
    params: dict[str, torch.Tensor]
    state: Any


def run(config: PinnConfig) -> Path:
    """Train as configured and return the result folder."""
    ranks.alone(config.app)
    config = completed(config)
    with contextlib.closing(Results.open(config, config.app)) as results, stopped() as signals:
        check_device(config.device)
        posed = Posed(PROBLEMS[config.data], config.seed, config.device, config.redraw or 0)
        params = {n: p.to(config.device) for n, p in initial(widths_of(config.model or ""), config.seed).items()}
        settings = Settings(config.damping or 0.0, config.momentum or 0.0, config.lr, config.grid, config.ema or 0.0)
        optimizer = optimizer_of(config.optim, posed, params, settings)
        start = Progress(0, 0.0, params, optimizer.init(params))
        if config.resume:
            start = restored(results, start, config.device)
        if not config.quiet:
            print(f"{PROBLEMS[config.data].title}\n{config.model} net, {size_of(params):,} parameters; {config.optim}")
        for at in steps(config, optimizer, posed, start):
            if at.step % config.record_every == 0 or at.step in (1, config.num_steps):
                loss = float(optimizer.ng.loss(at.params, posed.at(at.step)))  # type: ignore[attr-defined]
                check_finite(loss, at.step)
                error = posed.error(at.params)
                results.record({"epoch": at.step, "loss": loss, "error": error, "seconds": at.seconds})
            if signals or at.step % config.save_every == 0 or at.step == config.num_steps:
                save(results, at)
            if signals:
                print(f"\nstopped after step {at.step}; --resume goes on from there", file=sys.stderr)
                raise Stopped(signals[0])
    if not config.quiet:
        print(table(results))
        print(f"Everything is in {results.path}: metrics.jsonl, config.yaml and checkpoint.pt.")
    return results.path


def steps(config: PinnConfig, optimizer: Any, posed: Posed, at: Progress) -> Iterator[Progress]:
    """Yield the net after each step on the points of that step."""
    quiet = True if config.quiet else None
    for step in tqdm(range(at.step + 1, config.num_steps + 1), disable=quiet, leave=False, unit="step"):
        started = time.perf_counter()
        params, state, loss = optimizer.step(at.params, at.state, posed.at(step))
        check_finite(float(loss), step - 1)
        at = Progress(step, at.seconds + time.perf_counter() - started, params, state)
        yield at


def check_finite(loss: float, step: int) -> None:
    """Raise `NonFiniteError` if training has diverged."""
    if not math.isfinite(loss):
        raise ff.errors.NonFiniteError(
            f"the loss is {loss} after step {step}: give a smaller --lr, or leave it out, or choose another --optim"
        )


def table(results: Results) -> str:
    """Return loss and error of some of the steps as lines."""
    found = {int(each["epoch"]): each for each in results.metrics()}
    shown = [step for step in found if step in (1, 10, 30, 100, 300, 1000, 3000) or step == max(found)]
    lines = ["  step      loss  rel. error  seconds"]
    for step in shown:
        loss, error, seconds = (found[step][name] for name in ("loss", "error", "seconds"))
        lines.append(f"{step:>6}  {loss:8.2e}    {error:8.2e}  {seconds:7.1f}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------ checkpoints


def save(results: Results, at: Progress) -> None:
    """Write parameters and state."""
    flat = ff.tree.flatten({"params": at.params, "state": at.state})
    results.save_checkpoint(flat, {"epoch": at.step, "seconds": at.seconds})


def restored(results: Results, like: Progress, device: str) -> Progress:
    """Read parameters and state; the structure of a state is in the paths of its tensors."""
    flat, meta = results.load_checkpoint()
    flat = {path: leaf.to(device) for path, leaf in flat.items()}
    with understood(results.path / CHECKPOINT, CheckpointError):
        params = {name: flat[f"params/{name}"] for name in like.params}
        saved = {path.removeprefix("state/"): leaf for path, leaf in flat.items() if path.startswith("state/")}
        fixed = ff.tree.leaves(like.state)  # the states of torch's optimizers grow with the first steps
        state = ff.tree.unflatten(like.state, saved) if fixed else nested(saved)
        return Progress(int(meta["epoch"]), float(meta["seconds"]), params, state)


def nested(flat: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return dicts within dicts from tensors by path."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        at = tree
        for folder in folders:
            at = at.setdefault(folder, {})
        at[name] = leaf
    return tree


if __name__ == "__main__":
    with reported():
        run(parse(PinnConfig, description=__doc__))
