"""The configuration of a training run; config.py reads it from the command line and YAML files.

Another trainer declares a dataclass of its own in the same way, or inherits from this one and adds to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import fisherfn as ff
from common.config import FRACTION, NON_NEGATIVE, POSITIVE, ConfigError, option, validate
from common.data import DATA
from common.models import MODELS, SCHEMES

OPTIMIZERS = ("sgd", "adam", *ff.METHODS)
"""Names of `--optim`: the first-order baselines and every method of the library."""


@dataclass(frozen=True)
class TrainConfig:
    """What a run is: its data, model and optimizer, how long it runs, and where its result goes.

    Rates, damping and clip are in the units of docs/conventions.md: of the mean over examples of the NLL.
    """

    data: str = option("CURVES", "data set", aliases=("dataset",), choices=DATA, own=True)
    data_path: str | None = option(None, "folder with the files of the data set; null: ./data", aliases=("data_root",))
    download: bool = option(False, "fetch published files that are missing")
    model: str | None = option(None, "net; null: the one that suits the data", choices=MODELS, own=True)
    init_params: str = option("xavier_uniform", "how parameters are drawn", choices=SCHEMES)
    optim: str = option("kfac", "optimizer", aliases=("optimizer",), choices=OPTIMIZERS)

    batch_size: int = option(256, "examples a step", check=POSITIVE)
    num_epochs: int = option(20, "passes through the data", aliases=("epochs", "n_epochs"), check=NON_NEGATIVE)
    lr: float | None = option(
        None, "rate; null: as tuned for this data and optimizer", aliases=("learning_rate",), check=POSITIVE
    )
    momentum: float = option(0.9, "weight of the previous direction, for all but adam", check=FRACTION)
    nesterov: bool = option(False, "Nesterov's look-ahead, for sgd")
    weight_decay: float = option(0.0, "decoupled from the gradient, in rates", check=NON_NEGATIVE)
    beta_1: float = option(0.9, "adam: weight of the old first moment", check=FRACTION)
    beta_2: float = option(0.999, "adam: weight of the old second moment", check=FRACTION)

    damping: float | None = option(None, "added to the Fisher; null: as tuned", check=NON_NEGATIVE)
    clipping: float | None = option(
        None, "bound of the KL clip, 0 for no clip; null: as tuned", aliases=("kl_clip",), check=NON_NEGATIVE
    )
    ema: float = option(0.95, "weight of the old factors in the running average", check=FRACTION)
    damping_form: Literal["factored", "eigen"] = option("factored", "how damping enters Kronecker factors")
    fisher: Literal["mc", "type2", "empirical"] = option("mc", "labels sampled, in exact expectation, or the data's")
    fisher_samples: int = option(1, "draws an example, for mc", check=POSITIVE)
    fisher_batch_size: int | None = option(None, "examples for the statistics; null: the whole batch", check=POSITIVE)
    update_every: int = option(5, "steps between statistics", aliases=("T_cov",), check=POSITIVE)
    invert_every: int = option(10, "steps between inverses", aliases=("T_inv",), check=POSITIVE)

    seed: int = option(0, "of everything that is random", check=NON_NEGATIVE)
    device: str = option("cpu", "where to compute: cpu, cuda, cuda:1, …")
    num_workers: int = option(0, "processes that load data", check=NON_NEGATIVE)
    result_dir: str = option("results", "folder of all results")
    result_name: str | None = option(None, "the result's own folder; null: from data, model, optimizer and seed")
    overwrite: bool = option(False, "replace an existing result of that name")
    resume: bool = option(False, "go on from an existing result's checkpoint")
    quiet: bool = option(False, "no progress bar and no line an epoch")

    def __post_init__(self) -> None:
        validate(self)
        if self.overwrite and self.resume:
            raise ConfigError("overwrite and resume exclude each other: give one of them")
