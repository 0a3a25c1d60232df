"""From a configuration to a finished result: what every trainer does around its models.

Reads top to bottom: task, optimizer, run, pictures.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

import fisherfn as ff
from common import optimizers, tensorboard
from common.checkpoints import CheckpointError
from common.config import ConfigError, as_yaml, filled
from common.data import Data, Split, enlarged, load
from common.loop import Settings, Snapshot, Task, start, train
from common.models import Model, initialise, resolve
from common.plots import loss_curves, reconstructions
from common.results import Results
from common.train_config import TrainConfig

TUNED = Path(__file__).parents[1] / "configs" / "tuned.yml"
"""Settings found by `apps/search.py`, by model, data and optimizer; what the command line leaves open is from here."""


FIXED: dict[str, float] = {"lr": 1.0, "damping": 1.0, "kl_bound": 0.01, "momentum": 0.9}
"""A natural gradient whose numbers are all fixed, where something needs one: studies at matched damping, cg_steps."""

COUNTS = ("epoch", "step", "seconds", "batches", "skipped", "in_a_row")
"""What a checkpoint's facts say of a snapshot beside its tensors."""

METHOD_OPTIONS = {
    "damping_form": "damping_form",
    "structure": "structure",
    "coarse_space": "coarse",
    "krylov": "krylov",
    "coarse_form": "form",
}
"""Options that only some methods have, and what these call them."""


def tuned(app: str, model: str, data: str, optim: str) -> dict[str, Any]:
    """Return the recorded settings of a first-order optimizer for this model and data, else the trainer's."""
    if optim in ff.METHODS:  # these find their own
        return {}
    table = yaml.safe_load(TUNED.read_text())
    return {**table["default"][app][optim], **table["tuned"].get(model, {}).get(data, {}).get(optim, {})}


def make_task(config: TrainConfig, data: Data) -> tuple[Task, nn.Module]:
    """Model and data, ready to train; inputs are flattened for nets of linear layers, else of the net's size."""
    name = config.model or config.model_for(data)
    spec = resolve(name, data, inputs=config.inputs)
    data = enlarged(data, spec.size) if spec.size else data
    net = spec.build(data)
    initialise(net, config.init_params, torch.Generator().manual_seed(config.seed))
    net = net.to(config.device)
    model, params, context = ff.functional(net.train())
    predict, _, _ = ff.functional(copy.deepcopy(net).eval())
    splits = [_examples(split, spec, config.device) for split in (data.train, data.test)]
    likelihood = data.reconstruction if spec.task == "reconstruct" else data.prediction
    if likelihood is None:
        raise ConfigError(f"{data.name} has no labels for {name} to predict: choose an autoencoder")
    per_output = splits[0][1][0].numel() if spec.task == "reconstruct" else 1
    drops = _drops(model, params, context, splits[0][0])
    return Task(model, predict, params, context, likelihood, splits[0], splits[1], per_output, drops), net


def _drops(model: Any, params: dict[str, Tensor], context: dict[str, Tensor], x: Tensor) -> bool:
    """Whether the model asks for dropout's seeds."""
    try:
        with torch.no_grad():
            model(params, x[:2], context)
    except ff.errors.NoiseError:
        return True
    return False


def make_optimizer(config: TrainConfig, task: Task) -> optimizers.Optimizer:
    """Return the optimizer that `--optim` names, on this task."""
    implicit = (config.optim, config.fisher) == ("exactNG", "type2") and config.structure != "block"
    if config.cg_steps is not None and not implicit:
        raise ConfigError("cg_steps goes with optim exactNG, fisher type2 and structure full: leave it out otherwise")
    if config.optim == "sgd":
        momentum = _number(config.momentum)
        momentum = FIXED["momentum"] if momentum is None else momentum
        return optimizers.sgd(
            task.model, task.likelihood, lr=_tuned(config.lr, "lr"), momentum=momentum, nesterov=config.nesterov,
            weight_decay=config.weight_decay, compile=config.compile,
        )  # fmt: skip
    if config.optim == "adam":
        return optimizers.adam(
            task.model, task.likelihood, lr=_tuned(config.lr, "lr"), betas=(config.beta_1, config.beta_2),
            weight_decay=config.weight_decay, compile=config.compile,
        )  # fmt: skip
    ng = natural_gradient(config, task)
    given = {name: _number(getattr(config, name)) for name in FIXED}
    fixed: dict[str, Any] = {name: FIXED[name] if value is None else value for name, value in given.items()}
    if config.cg_steps is not None:
        return optimizers.implicit(
            ng, **fixed, weight_decay=config.weight_decay, iterations=config.cg_steps, compile=config.compile
        )
    if all(given[name] is not None for name in ("lr", "damping", "kl_bound")):
        return optimizers.natural(
            ng, **fixed, ema=config.ema, weight_decay=config.weight_decay, cadence=cadence(config),
            fisher_batch_size=config.fisher_batch_size, compile=config.compile,
        )  # fmt: skip
    if config.fisher_batch_size is not None:
        raise ConfigError("fisher_batch_size goes with fixed numbers: give lr, damping and kl_bound, too")
    kl_bound = given.pop("kl_bound")
    auto: dict[str, Any] = {name: "auto" if value is None else value for name, value in given.items()}
    adaptive = ff.adaptive(ng, **auto, kl_bound=kl_bound or None, ema=config.ema, weight_decay=config.weight_decay)
    return optimizers.adaptive(adaptive, cadence(config), compile=config.compile)


def cadence(config: TrainConfig) -> ff.Cadence:
    """Return when statistics are taken and inverses refreshed: as given, else ever less often."""
    if config.optim == "exactNG":  # averages nothing, and the Fisher of an old batch is none
        default = ff.Cadence.fixed(1, 1)
    else:
        default = ff.Cadence()
    update, invert = default.update, default.invert
    if config.update_every is not None:
        update = (config.update_every, config.update_every)
    if config.invert_every is not None:
        invert = (config.invert_every, config.invert_every)
    return ff.Cadence(update, invert, default.growth)


def natural_gradient(config: TrainConfig, task: Task) -> ff.NaturalGradient:
    """The library's natural gradient for this task, as configured."""
    x = task.train[0][: config.batch_size]
    return ff.natural_gradient(
        task.model, task.params, x, likelihood=task.likelihood, method=method(config), fisher=config.fisher,
        samples=config.fisher_samples, context=task.seeded(task.context, x.shape[0], torch.Generator().manual_seed(0)),
    )  # fmt: skip


def method(config: TrainConfig) -> ff.Method:
    """The method that `--optim` names, with those of its options that were given."""
    build = ff.METHODS[config.optim]
    known = inspect.signature(build).parameters
    options: dict[str, Any] = {}
    if config.optim == "twolevel_kfac":
        published = config.coarse_space in ("tselepidis", "tpselepedis")
        options = {"form": "additive" if published else "balanced"}
        if config.damping_form is not None:
            options["fine"] = ff.kfac(damping_form=config.damping_form)
            config = dataclasses.replace(config, damping_form=None)
    for name, parameter in METHOD_OPTIONS.items():
        if getattr(config, name) is not None:
            if parameter not in known:
                raise ConfigError(f"{name} is no option of {config.optim}: leave it out, or choose another optim")
            options[parameter] = getattr(config, name)
    return build(**options)


def run(config: TrainConfig, app: str | None = None) -> Path:
    """Train as configured; returns the result folder. Nothing is written before data and model are known to work.

    The folder is the trainer's, or `app`'s for an app that runs trainers.
    """
    data = load(config.data, data_path=config.data_path, seed=config.seed, download=config.download)
    model = config.model or config.model_for(data)
    config = filled(config, {"model": model})
    config = opened(config, tuned(config.app, model, data.name, config.optim))
    with (
        contextlib.closing(Results.open(config, app or config.app)) as results,
        contextlib.closing(tensorboard.opened(config.tensorboard, results.path)) as board,
        stopped() as signals,
    ):
        check_device(config.device)
        task, _ = make_task(config, data)
        optimizer = make_optimizer(config, task)
        if config.verbose:
            print(described(config, task), flush=True)
        snapshot = start(task, optimizer)
        recorded: list[dict[str, float]] = []
        if config.resume:
            snapshot = restore(results, snapshot)
            recorded = results.metrics()
        for epoch in train(
            task, optimizer, snapshot, settings(config, data), partial(watched, results, config.save_every, signals)
        ):
            snapshot = epoch.snapshot
            if all(metrics["epoch"] != snapshot.epoch for metrics in recorded):
                results.record(epoch.metrics)
            board.write(results.metrics())
            save(results, snapshot)
            if not config.quiet:
                print(line(epoch.metrics), flush=True)
        pictures(results, task, data, snapshot)
    print(f"Everything is in {results.path}: metrics.jsonl, config.yaml, checkpoint.pt and the pictures.")
    return results.path


def opened(config: TrainConfig, settings: dict[str, Any]) -> TrainConfig:
    """Return the configuration with recorded settings where it has nothing, or "auto"."""
    wanted = {name: value for name, value in settings.items() if _number(getattr(config, name)) is None}
    return dataclasses.replace(config, **wanted)


def described(config: TrainConfig, task: Task) -> str:
    """All settings as a file that `--config` reads, and the coverage report of a natural gradient."""
    report = f"\n{natural_gradient(config, task).layout}\n" if config.optim in ff.METHODS else ""
    return as_yaml(config) + report


def settings(config: TrainConfig, data: Data) -> Settings:
    """How the run goes through the data."""
    label = f"{data.name} {config.optim}"
    return Settings(config.num_epochs, config.batch_size, config.seed, config.num_workers, not config.quiet, label)


def line(metrics: dict[str, float]) -> str:
    """One epoch as a line to read."""
    accuracy = f"  test accuracy {metrics['test_accuracy']:.3f}" if "test_accuracy" in metrics else ""
    skipped = f"  {metrics['skipped']:.0f} steps skipped as not ok" if metrics["skipped"] else ""
    return (
        f"epoch {metrics['epoch']:3.0f}  train loss {metrics['train_loss']:.5f}  test loss {metrics['test_loss']:.5f}"
        f"{accuracy}  {metrics['seconds']:7.1f} s{skipped}"
    )


def save(results: Results, snapshot: Snapshot) -> None:
    """The snapshot as a flat checkpoint."""
    trees = {"params": snapshot.params, "context": snapshot.context, "state": snapshot.state}
    meta = {name: getattr(snapshot, name) for name in COUNTS}
    results.save_checkpoint(ff.tree.flatten(trees) | {"state.draws": snapshot.draws}, meta)


def restore(results: Results, like: Snapshot) -> Snapshot:
    """The checkpoint as a snapshot, in the structure of a fresh one.

    Raises:
        CheckpointError: it lacks what this version keeps, or belongs to another model or method.
    """
    flat, meta = results.load_checkpoint()
    draws = flat.pop("state.draws")
    trees = {"params": like.params, "context": like.context, "state": like.state}
    try:
        saved_trees = ff.tree.unflatten(trees, flat)
    except ff.errors.StructureError as error:
        raise CheckpointError(
            f"the checkpoint in {results.path} does not fit this run, or an older version wrote it: start again with "
            f"--overwrite, or resume with the version that wrote it. {error}"
        ) from error
    trees = ff.tree.map(lambda saved, fresh: saved.to(fresh.device), saved_trees, trees)
    return Snapshot(**trees, **{name: meta[name] for name in COUNTS}, draws=draws)


class Stopped(SystemExit):
    """A run that was asked to stop and has saved where it stands; the exit code is the convention's, 128 + signal."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)


@contextlib.contextmanager
def stopped() -> Iterator[list[int]]:
    """The signals SIGINT and SIGTERM as they come, for the loop to end at the next step; a second one ends at once."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if received:
            raise Stopped(number)
        received.append(number)

    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield received
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def watched(
    results: Results, save_every: int | None, signals: list[int], step: int, at: Callable[[], Snapshot]
) -> None:
    """After a step: save where it is due, and leave where a signal asks for it."""
    if signals or (save_every and step % save_every == 0):
        save(results, at())
    if signals:
        name = signal.Signals(signals[0]).name
        print(f"\n{name}: stopped after step {step}; --resume goes on from there", file=sys.stderr)
        raise Stopped(signals[0])


def pictures(results: Results, task: Task, data: Data, snapshot: Snapshot) -> None:
    """Losses per epoch and per second, and for autoencoders what the net makes of test images."""
    loss_curves({results.path.name: results.metrics()}, results.path / "loss.png")
    if task.per_output == 1:
        return
    x = task.test[0][:10]
    with torch.no_grad():
        outputs, _ = task.predict(snapshot.params, x, snapshot.context)
    images = outputs.sigmoid() if isinstance(task.likelihood, ff.Bernoulli) else outputs
    shape = (-1, *data.test.inputs.shape[1:])
    reconstructions(x.reshape(shape).cpu(), images.reshape(shape).cpu(), results.path / "reconstructions.png")


def _examples(split: Split, spec: Model, device: str) -> tuple[Tensor, Tensor]:
    x = (split.inputs.flatten(1) if spec.inputs == "flat" else split.inputs).to(device)
    return x, x if spec.task == "reconstruct" or split.labels is None else split.labels.to(device)


def check_device(name: str) -> None:
    """Raise `ConfigError` where nothing can be computed on it."""
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name} cannot be used here: {str(error).splitlines()[0]} Try --device cpu") from None


def _tuned(value: float | str | None, name: str) -> float:
    number = _number(value)
    if number is None:
        raise ConfigError(f"{name} is open: give --{name}, or enter it in {TUNED.name}")
    return number


def _number(value: float | str | None) -> float | None:
    """A number, or None where it is open: "auto" is what nothing given means."""
    return None if isinstance(value, str) else value


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Errors that the project raises on purpose are for the reader: one line, exit code 1, no traceback."""
    try:
        yield
    except ff.FisherfnError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
