"""The configuration of a GAN run; config.py reads it from the command line and YAML files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import fisherfn as ff
from common.config import FRACTION, NON_NEGATIVE, POSITIVE, ConfigError, option, validate
from common.models.gan import GANS, NORMS

DATA = ("DIGITS", "MNIST", "F_MNIST", "CIFAR10", "SVHN")

PLAYERS = ("adam", "sgda", *ff.METHODS)
"""Optimizers of a player; sgda is gradient descent with Nesterov's momentum, for both: descent-ascent."""


@dataclass(frozen=True)
class GanConfig:
    """What a GAN run is: its data, both nets and their optimizers, how long it runs, and where its result goes.

    Rates, damping and clip are in the units of apps/common/gan/players.py: of scores averaged over a player's batch.
    """

    app: ClassVar[str] = "train_gan"

    sections: ClassVar[dict[str, str]] = {
        "data": "data and nets",
        "gen_optim": "optimization",
        "damping": "curvature",
        "momentum": "first-order terms",
        "fid": "quality",
        "seed": "the run",
    }

    data: str = option("DIGITS", "data set", aliases=("dataset",), choices=DATA, own=True)
    data_path: str | None = option(None, "folder with the files of the data set; null: ./data", aliases=("data_root",))
    download: bool = option(False, "fetch published files that are missing")
    model: str | None = option(None, "nets; null: dcgan for images of 28×28, residual for 32×32", choices=GANS)
    width: float = option(1.0, "all channels, in those published", check=POSITIVE)
    critic_norm: str = option(
        "none", "the critic's norm; batch as published, under which the gradient penalty binds nothing", choices=NORMS
    )
    z_dim: int = option(64, "numbers of noise that an image is made of", check=POSITIVE)

    gen_optim: str = option("kfac", "optimizer of the generator", choices=PLAYERS)
    crit_optim: str = option("kfac", "optimizer of the critic", choices=PLAYERS)
    gen_lr: float = option(1e-3, "rate of the generator", check=POSITIVE)
    crit_lr: float = option(1e-3, "rate of the critic", check=POSITIVE)
    crit_repeats: int = option(5, "critic steps for each of the generator", check=POSITIVE)
    c_lambda: float = option(10.0, "weight of the gradient penalty", check=NON_NEGATIVE)
    batch_size: int = option(128, "images a step, real and fake each", check=POSITIVE)
    num_epochs: int = option(
        200, "as many generator steps as the data has batches, so many times", aliases=("n_epochs",), check=NON_NEGATIVE
    )

    damping: float = option(1e-4, "natural gradients: added to the Fisher", check=NON_NEGATIVE)
    clipping: float = option(0.01, "natural gradients: bound of the KL clip, 0 for no clip", check=NON_NEGATIVE)
    gen_damping: float | Literal["auto"] | None = option(
        None, "the generator's damping, where it differs; auto: from the reduction ratio, bad steps taken back",
        check=NON_NEGATIVE,
    )  # fmt: skip
    gen_clipping: float | None = option(None, "the generator's, where it is another", check=NON_NEGATIVE)
    ema: float = option(0.95, "natural gradients: weight of the old factors in the running average", check=FRACTION)
    update_every: int | None = option(
        None, "natural gradients: the player's steps between statistics; null: 100, for exactNG 1", aliases=("T_cov",),
        check=POSITIVE,
    )  # fmt: skip
    invert_every: int | None = option(
        None, "natural gradients: the player's steps between inverses; null: 100, for exactNG 1", aliases=("T_inv",),
        check=POSITIVE,
    )  # fmt: skip
    momentum: float = option(0.9, "weight of the previous direction, for all but adam", check=FRACTION)
    weight_decay: float = option(0.0, "decoupled from the gradient, in rates; for all but adam", check=NON_NEGATIVE)
    beta_1: float = option(0.5, "adam: weight of the old first moment", check=FRACTION)
    beta_2: float = option(0.999, "adam: weight of the old second moment", check=FRACTION)

    fid: Literal["classifier", "inception", "none"] = option(
        "classifier", "features of the FID: of a classifier trained here on the same data, or Inception's (downloaded)"
    )
    fid_every: int = option(1, "epochs between FIDs; the last one always has one", check=POSITIVE)
    fid_samples: int = option(5_000, "fakes in a FID", check=POSITIVE)

    seed: int = option(0, "of everything that is random", check=NON_NEGATIVE)
    device: str = option("cpu", "where to compute: cpu, cuda, cuda:1, …")
    result_dir: str = option("results", "folder of all results")
    result_name: str | None = option(None, "the result's own folder; null: from data, nets, optimizers and seed")
    overwrite: bool = option(False, "replace an existing result of that name")
    resume: bool = option(False, "go on from an existing result's checkpoint")
    save_every: int | None = option(
        None, "generator steps between checkpoints, beside those of every epoch; null: none", check=POSITIVE
    )
    tensorboard: bool = option(False, "event files for TensorBoard, in the result's folder")
    quiet: bool = option(False, "no progress bar and no line an epoch")
    verbose: bool = option(False, "print all settings before training")

    def __post_init__(self) -> None:
        validate(self)
        if self.quiet and self.verbose:
            raise ConfigError("quiet and verbose exclude each other: give one of them")
        if self.overwrite and self.resume:
            raise ConfigError("overwrite and resume exclude each other: give one of them")
