"""The result folder of a sweep or of a part of it: only one process writes to it, and only to the same sweep."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from common.atomic import empty_folder
from common.config import ConfigError, as_yaml
from common.results import MAY_CHANGE, ResultExistsError, locked
from common.sweep.grid import Values
from common.sweep.stages import plain, read_settings, write_json
from common.train_config import TrainConfig

FILE = "sweep.json"
"""Settings, size of the groups and measured times of a sweep."""

SINGLE = ("verbose", "tensorboard", "num_workers")
"""Options of a trainer that a sweep does not have."""


def settings_of(config: TrainConfig, values: Values, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return what defines a sweep: its own settings, those of the trainer, and the values of the grid.

    Only a plain sweep may be resumed with another number of epochs: stages depend on it.
    """
    recorded = yaml.safe_load(as_yaml(config))
    fixed = {name: value for name, value in recorded.items() if name not in MAY_CHANGE}
    staged = {"num_epochs": config.num_epochs} if own.get("halving") or own.get("population") else {}
    return {**own, **fixed, **staged, **values, "order": list(values)}  # runs are numbered in this order of the grid


def check_options(config: TrainConfig) -> None:
    """Raise `ConfigError` for an option of the trainer that a sweep would ignore."""
    for name in SINGLE:
        if getattr(config, name):
            raise ConfigError(f"{name} is no option of a sweep: leave it out")


@contextlib.contextmanager
def opened(folder: Path, settings: Mapping[str, Any], *, overwrite: bool, resume: bool) -> Iterator[None]:
    """Prepare the result folder, and lock it while the sweep runs.

    Raises:
        ConfigError: there is nothing to resume, or a sweep with other settings.
        ResultExistsError: the folder has another result, or another process writes to it.
    """
    file = folder / FILE
    if resume:
        if not file.exists():
            raise ConfigError(f"there is no sweep in {folder} to resume")
        check_same(folder, settings)
    elif not file.exists() and _in_use(folder):
        raise ResultExistsError(f"{folder} has other files, such as parts of a sweep: give another --result_name")
    elif file.exists() and not overwrite:
        raise ResultExistsError(f"{folder} exists already: give --overwrite, --resume, or another --result_name")
    folder.mkdir(parents=True, exist_ok=True)
    handle = locked(folder)
    try:
        if not (resume or overwrite) and file.exists():
            raise ResultExistsError(f"{folder} was made by another run in the meantime: give another --result_name")
        if not resume:
            empty_folder(folder, last=file.name)
            write_json(file, {"settings": settings})
        yield
    finally:
        os.close(handle)


def parts_of(whole: Path, settings: Mapping[str, Any]) -> list[Path]:
    """Return the folders of all parts of a sweep.

    Raises:
        ConfigError: there are none, or some of another sweep.
        ResultExistsError: the folder has the results of a sweep that was not split.
    """
    if (whole / FILE).exists():
        raise ResultExistsError(f"{whole} has a sweep without parts: give the --result_name of the parts")
    parts = sorted(path.parent for path in whole.glob("slice-*-of-*/metrics.jsonl"))
    if not parts:
        raise ConfigError(f"there are no slices in {whole}: start them with --slice i/n")
    for part in parts:
        check_same(part, settings)
    counts = sorted({int(part.name.rpartition("-")[2]) for part in parts})
    if len(counts) > 1:
        raise ConfigError(
            f"{whole} has slices of {' and of '.join(map(str, counts))} parts: delete those of the other sweep"
        )
    return parts


def check_same(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if a sweep was started with other settings; a merge has no `slice` to compare."""
    before, settings = read_settings(folder / FILE)["settings"], plain(settings)
    names = [name for name in {**settings, **before} if name != "slice" or name in settings]
    names = [name for name in names if name != "order" or name in before]  # older versions did not record it
    for name in names:
        there, here = before.get(name), settings.get(name)
        if there != here:
            raise ConfigError(
                f"the sweep in {folder} was started with another {name}, {there} instead of {here}: repeat its command"
            )


def _in_use(folder: Path) -> bool:
    """Return whether there is more than what a killed start leaves: a part of the first file."""
    return folder.is_dir() and any(not entry.name.startswith(f".{FILE}.") for entry in folder.iterdir())
