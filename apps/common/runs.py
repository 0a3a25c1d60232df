"""A run from its configuration to a finished result, the same for every trainer: results, resume, signals, pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import signal
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

import fisherfn as ff
from common import ranks, tensorboard
from common.checkpoints import CheckpointError
from common.config import ConfigError, as_yaml
from common.damage import understood
from common.data import Data, load
from common.loop import Epoch, Snapshot, Watch
from common.results import CHECKPOINT, Results
from common.run_config import RunConfig

C = TypeVar("C", bound=RunConfig)

COUNTS = ("epoch", "step", "seconds", "batches", "skipped", "in_a_row")
"""Fields of a snapshot that a checkpoint stores as metadata."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a full disk, or of a limit on a file's size; they do not name the file."""


class Training(ABC, Generic[C]):
    """A training that `run` can drive; the constructor of a subclass builds nets and optimizers."""

    spreads = False
    """True if several processes can share the batches of this training."""

    def __init__(self, config: C, data: Data) -> None:
        self.config, self.data = config, data

    @staticmethod
    @abstractmethod
    def completed(config: C, data: Data) -> C:
        """Return the configuration with the settings that it leaves open."""

    @abstractmethod
    def start(self) -> Snapshot:
        """Return the snapshot before the first step."""

    @abstractmethod
    def epochs(self, at: Snapshot, watch: Watch) -> Iterator[Epoch]:
        """Train from a snapshot and yield each epoch."""

    @abstractmethod
    def line(self, metrics: dict[str, float]) -> str:
        """Format the metrics of an epoch for the terminal."""

    @abstractmethod
    def draw(self, results: Results, at: Snapshot) -> None:
        """Write the pictures of the finished run."""

    def draw_epoch(self, folder: Path, at: Snapshot) -> None:  # noqa: B027  # optional
        """Write the pictures of a finished epoch, if there are any."""

    def described(self) -> str:
        """Return all settings as a file that `--config` reads."""
        return as_yaml(self.config)

    def say(self, text: str) -> None:
        """Print a line, unless the run is quiet."""
        if not self.config.quiet:
            print(text, flush=True)


def run(Kind: type[Training[C]], config: C, app: str | None = None) -> Path:
    """Train as configured and return the result folder; nothing is written before data and nets are verified.

    The folder is in that of the trainer, or of `app` if another app runs the trainer.
    """
    with ranks.joined(config.device) as device:
        return _run(Kind, dataclasses.replace(config, device=device), app or config.app)


def _run(Kind: type[Training[C]], config: C, app: str) -> Path:
    """Train in this process, which may be one of several."""
    if not Kind.spreads:
        ranks.alone(config.app)
    if not ranks.first():
        config = dataclasses.replace(config, quiet=True, verbose=False, tensorboard=False)
    data = load(config.data, data_path=config.data_path, seed=config.seed, download=config.download)
    config = Kind.completed(config, data)
    with (
        contextlib.closing(Results.open(config, app, writes=ranks.first())) as results,
        contextlib.closing(tensorboard.opened(config.tensorboard, results.path)) as board,
        stopped() as signals,
    ):
        check_device(config.device)
        training = Kind(config, data)
        if config.verbose:
            training.say(training.described())
        snapshot, recorded = training.start(), set()
        if config.resume:
            snapshot = restore(results, snapshot)
            recorded = {metrics["epoch"] for metrics in results.metrics()}
        for epoch in training.epochs(snapshot, partial(watched, results, config.save_every, signals)):
            snapshot = epoch.snapshot
            if snapshot.epoch not in recorded:
                results.record(epoch.metrics)
            board.write(results.metrics())
            save(results, snapshot)
            if ranks.first():
                training.draw_epoch(results.path, snapshot)
            training.say(training.line(epoch.metrics))
        if ranks.first():
            training.draw(results, snapshot)
    if ranks.first():
        print(f"Everything is in {results.path}: metrics.jsonl, config.yaml, checkpoint.pt and the pictures.")
    return results.path


def check_device(name: str) -> None:
    """Raise `ConfigError` if nothing can be computed on this device."""
    try:
        torch.zeros(1, device=name).item()  # "meta" makes tensors without numbers
    except (RuntimeError, AssertionError) as error:
        said = str(error).splitlines()[0]
        reason = "" if said.startswith("Expected one of") else f" (torch: {said.rstrip('.')})"  # a list of twenty
        raise ConfigError(
            f"device {name} cannot be used here: use cpu or cuda, for example --device cpu{reason}"
        ) from None


# ------------------------------------------------------------------------------------------------------ checkpoints


def save(results: Results, snapshot: Snapshot) -> None:
    """Write the snapshot as a flat checkpoint."""
    trees = {"params": snapshot.params, "context": snapshot.context, "state": snapshot.state}
    meta = {name: getattr(snapshot, name) for name in COUNTS}
    results.save_checkpoint(ff.tree.flatten(trees) | {"state.draws": snapshot.draws}, meta)


def restore(results: Results, like: Snapshot) -> Snapshot:
    """Read the checkpoint as a snapshot, in the structure of a fresh one.

    Raises:
        CheckpointError: it lacks an entry of this version, or belongs to another model or method.
    """
    flat, meta = results.load_checkpoint()
    with understood(results.path / CHECKPOINT, CheckpointError):
        draws, counts = flat.pop("state.draws"), {name: meta[name] for name in COUNTS}
    trees = {"params": like.params, "context": like.context, "state": like.state}
    try:
        saved_trees = ff.tree.unflatten(trees, flat)
    except ff.errors.StructureError as error:
        raise CheckpointError(
            f"the checkpoint in {results.path} does not fit this run, or an older version wrote it: start again with "
            f"--overwrite, or resume with the version that wrote it. {error}"
        ) from error
    trees = ff.tree.map(lambda saved, fresh: saved.to(fresh.device), saved_trees, trees)
    return Snapshot(**trees, **counts, draws=draws)


# ------------------------------------------------------------------------------------------------ signals and errors


class Stopped(SystemExit):
    """A run that a signal stopped, after saving its snapshot if training had begun; the exit code is 128 + N."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)


@contextlib.contextmanager
def stopped() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM for the loop, which ends at the next step; a second signal ends the run at once."""
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
    """Save after a step if a checkpoint is due, and end the run if a signal asks for it."""
    watched_saver(save_every, signals)(step, lambda: save(results, at()))


def watched_saver(save_every: int | None, signals: list[int]) -> Callable[[int, Callable[[], None]], None]:
    """Return a function of the step and a saving function, which saves or ends the run as `watched` does."""

    def after(step: int, save: Callable[[], None]) -> None:
        number = ranks.signalled(signals)
        if number or (save_every and step % save_every == 0):
            save()
        if number:
            if ranks.first():
                name = signal.Signals(number).name
                print(f"\n{name}: stopped after step {step}; --resume goes on from there", file=sys.stderr)
            raise Stopped(number)

    return after


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Print an error in one line, without traceback, and exit with code 1: one raised on purpose, or one of a file.

    Ctrl-C where nothing collects signals, for example while data are loaded, ends with code 130.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("\nSIGINT: stopped", file=sys.stderr)
        raise Stopped(signal.SIGINT) from None
    except ff.FisherfnError as error:
        said = f"{type(error).__name__}: {error}"
    except OSError as error:
        if error.errno in FULL:
            said = f"WriteError: {error.strerror}; free some space, or give another folder or file"
        elif error.filename is not None:  # whether it was to be read or written, the error does not say
            said = f"{type(error).__name__}: cannot use {error.filename}: {error.strerror}; give another folder or file"
        else:
            raise
    else:
        return
    print(said, file=sys.stderr)
    raise SystemExit(1)
