"""The settings that every training run has; the configurations of the trainers extend them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from common.config import POSITIVE, SEED, ConfigError, option, validate


@dataclass(frozen=True)
class RunConfig:
    """The settings of any run: data, model, seed, device and result folder."""

    app: ClassVar[str]

    data: str = option("DIGITS", "data set", aliases=("dataset",), own=True)
    data_path: str | None = option(
        None, "folder with the files of the data set; default: ./data", aliases=("data_root",)
    )
    download: bool = option(False, "fetch published files that are missing")
    model: str | None = option(None, "model; default: the one for the data")

    seed: int = option(0, "random seed", check=SEED)
    device: str = option("cpu", "device: cpu, cuda, cuda:1, …")
    result_dir: str = option("results", "folder for all results")
    result_name: str | None = option(None, "name of the result folder; default: from data, model, optimizers and seed")
    overwrite: bool = option(False, "replace an existing result of that name")
    resume: bool = option(False, "continue from the checkpoint of an existing result")
    save_every: int | None = option(
        None, "steps between additional checkpoints within an epoch; default: none", check=POSITIVE
    )
    tensorboard: bool = option(False, "write event files for TensorBoard to the result folder")
    quiet: bool = option(False, "no progress bar and no line per epoch")
    verbose: bool = option(False, "print all settings before training; for one net also the coverage report")

    def __post_init__(self) -> None:
        validate(self)
        if self.quiet and self.verbose:
            raise ConfigError("quiet and verbose exclude each other: give only one")
        if self.overwrite and self.resume:
            raise ConfigError("overwrite and resume exclude each other: give only one")
