"""The result folder of a run, `results/<app>/<name>/`: config.yaml, metrics.jsonl, checkpoint.pt and pictures.

The folder is created with its first file, so a run that fails earlier leaves nothing behind. Files are replaced
atomically: a killed run leaves the old file or the new one, never a partial one.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from common.atomic import WriteError, remove_folder, replace_text
from common.checkpoints import CheckpointError, first_sound, save_checkpoint
from common.config import ConfigError, as_yaml, option_names
from common.damage import understood
from fisherfn.errors import FisherfnError

CONFIG, METRICS, CHECKPOINT = "config.yaml", "metrics.jsonl", "checkpoint.pt"

KEPT = ("checkpoint.1.pt",)
"""Older checkpoints, newest first, for the case that the last one is damaged."""

MAY_CHANGE = {
    "num_epochs", "num_steps", "data_path", "download", "device", "compile", "num_workers", "quiet", "overwrite",
    "resume", "result_dir", "result_name", "save_every", "tensorboard", "verbose",
}  # fmt: skip
"""Options that may differ in a resumed run; the others define the result."""


class ResultExistsError(FisherfnError, FileExistsError):
    """A result with this name exists already."""


class MetricsError(FisherfnError, ValueError):
    """A metrics file that is missing or cannot be read."""


class Results:
    """The result folder of a run; created by `Results.open`."""

    def __init__(self, path: Path, config: Any, writes: bool = True) -> None:
        self.path = path
        self._config, self._writes = config, writes
        self._ready = False
        self._lock: int | None = None

    @classmethod
    def open(cls, config: Any, app: str, writes: bool = True) -> Results:
        """Open the result folder of this configuration; nothing is written yet.

        Args:
            config: a dataclass with `result_dir`, `result_name`, `overwrite` and `resume`; without a name, one is made
                from its `data`, `model`, `optim` and `seed`.
            app: the name of the app, which is a folder.
            writes: False for a process that only reads the checkpoint, because another one writes the results.

        Raises:
            ConfigError: the name is not a plain folder name, or the resumed run differs from the recorded one.
            ResultExistsError: a result of that name exists, and neither `overwrite` nor `resume` is set.
            CheckpointError: there is nothing to resume from.
        """
        name = config.result_name or default_name(config)
        path = Path(config.result_dir) / app / plain_name(name)
        config = dataclasses.replace(config, result_name=name)
        lock = None
        if not writes:
            return cls(path, config, writes)
        if config.resume:
            _check_resumable(path, config)
            lock = locked(path)
        elif config.overwrite:
            _check_replaceable(path)
        elif path.exists():
            raise ResultExistsError(f"{path} exists already: give --overwrite, --resume, or another --result_name")
        results = cls(path, config)
        results._lock = lock
        return results

    def close(self) -> None:
        """Release the lock for other runs."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def record(self, metrics: Mapping[str, float]) -> None:
        """Append the metrics of an epoch and write them to disk; non-finite numbers become null."""
        if not self._writes:
            return
        path = self._folder() / METRICS
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(_line(metrics))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise WriteError(f"cannot write {path}: {error.strerror or error}") from error

    def metrics(self) -> list[dict[str, float]]:
        """Return the epochs recorded so far; null becomes NaN."""
        return read_metrics(self.path) if self._writes else []

    def save_checkpoint(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Replace the checkpoint: tensors by path, and JSON metadata, of which resume needs `meta["epoch"]`.

        The previous one is kept.
        """
        if not self._writes:
            return
        path = self._folder() / CHECKPOINT
        save_checkpoint(path, tensors, meta, kept=[path.with_name(name) for name in KEPT])

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the checkpoint to resume from, with tensors on the CPU; later recorded epochs are dropped.

        A damaged checkpoint is replaced by the previous one, with a warning.
        """
        tensors, meta = first_sound([self.path / name for name in (CHECKPOINT, *KEPT)])
        if self._config.resume and self._writes and (self.path / METRICS).exists():
            with understood(self.path / CHECKPOINT, CheckpointError):
                kept = [metrics for metrics in read_metrics(self.path) if metrics["epoch"] <= meta["epoch"]]
            replace_text(self.path / METRICS, "".join(map(_line, kept)))
        return tensors, meta

    def _folder(self) -> Path:
        """Return the folder, created or emptied at the first call; the configuration is written first."""
        if not self._ready:
            if self._config.overwrite and self.path.exists():
                os.close(locked(self.path))
                remove_folder(self.path, last=CONFIG)  # without it, the rest would not count as a result
            self._make()
            if self._lock is None:
                self._lock = locked(self.path)
            self._ready = True
        return self.path

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=self._config.resume)
        except FileExistsError:
            message = f"{self.path} was created by another run in the meantime: give this run another --result_name"
            raise ResultExistsError(message) from None
        except OSError as error:
            raise WriteError(f"cannot make {self.path}: {error.strerror}; give another --result_dir") from error
        # a run repeated by --config must neither overwrite nor resume by itself
        config = dataclasses.replace(self._config, overwrite=False, resume=False)
        replace_text(self.path / CONFIG, as_yaml(config))


def default_name(config: Any) -> str:
    """Return the default name: data, model, optimizers and seed, with dashes for the dots and colons of user code."""
    parts = (
        str(getattr(config, name))
        for name in ("data", "model", "optim", "gen_optim", "crit_optim", "seed")
        if hasattr(config, name)
    )
    return "-".join(re.sub(r"[^\w-]+", "-", part) for part in parts)


def locked(path: Path) -> int:
    """Lock the folder against other runs; closing the handle, or the end of the process, releases it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        message = f"another run is writing to {path}: wait for it, or give this run another --result_name"
        raise ResultExistsError(message) from None
    return handle


def plain_name(name: str) -> str:
    """Return the name of a result if it is that of a single folder; else raise `ConfigError`."""
    if not re.fullmatch(r"\w[\w .+=,@()\[\]-]*", name):
        raise ConfigError(f"result_name must be a plain folder name without / or .., got {name!r}")
    return name


def _check_replaceable(path: Path) -> None:
    if path.exists() and (path.is_symlink() or not ((path / CONFIG).is_file() or _just_made(path))):
        raise ResultExistsError(f"{path} is not a result folder with a {CONFIG} in it: it is not overwritten")


def _just_made(path: Path) -> bool:
    """Return whether a run was killed before its configuration was whole: the folder holds at most a part of it."""
    return path.is_dir() and all(entry.name.startswith(f".{CONFIG}.") for entry in path.iterdir())


def _check_resumable(path: Path, config: Any) -> None:
    for name in (CONFIG, CHECKPOINT):
        if not (path / name).is_file():
            raise CheckpointError(f"nothing to resume: there is no {path / name}; run without --resume")
    names = option_names(type(config))  # a run of an older version may have other names for the same options
    with understood(path / CONFIG, ConfigError):
        recorded = yaml.safe_load((path / CONFIG).read_text(encoding="utf-8"))
        there = {names.get(name, name): value for name, value in recorded.items()}
    here = yaml.safe_load(as_yaml(config))
    changed = [name for name in here if name not in MAY_CHANGE and name in there and here[name] != there[name]]
    if changed:
        each = ", ".join(f"{name} is {there[name]} there and {here[name]} here" for name in changed)
        raise ConfigError(f"cannot resume {path}: {each}; use the options of that run: --config {path / CONFIG}")


# ---------------------------------------------------------------------------------------------------------- metrics


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Read the epochs of a result folder; null becomes NaN, and a truncated last line is left out."""
    path = folder / METRICS
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise MetricsError(f"no metrics in {folder}: {METRICS}: {error.strerror}") from None
    whole = text[: text.rfind("\n") + 1].splitlines()
    return [_parsed(line, f"{path}:{number}") for number, line in enumerate(whole, 1)]


def result_folders(places: Iterable[Path]) -> list[Path]:
    """Return the result folders among `places` and directly inside them."""
    inside = (folder for place in places for folder in (place, *sorted(place.glob("*"))))
    return list(dict.fromkeys(folder for folder in inside if (folder / METRICS).is_file()))


def _parsed(line: str, where: str) -> dict[str, float]:
    try:
        found = {name: math.nan if value is None else value for name, value in json.loads(line).items()}
        if "epoch" in found and all(isinstance(value, (int, float)) for value in found.values()):
            return found
    except (ValueError, AttributeError, RecursionError):
        pass
    raise MetricsError(f"{where}: not a JSON object of numbers with an epoch: {line[:60]!r}")


def _line(metrics: Mapping[str, float]) -> str:
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    return json.dumps(finite, allow_nan=False) + "\n"
