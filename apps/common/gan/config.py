"""The configuration of a GAN run; config.py reads it from the command line and YAML files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import fisherfn as ff
from common.config import FRACTION, NON_NEGATIVE, POSITIVE, option
from common.models.gan import GANS, NORMS
from common.run_config import RunConfig

DATA = ("DIGITS", "MNIST", "F_MNIST", "CIFAR10", "SVHN")

PLAYERS = ("adam", "sgda", *ff.METHODS)
"""Optimizers of a player; sgda is gradient descent with Nesterov momentum for both players: descent-ascent."""


@dataclass(frozen=True)
class GanConfig(RunConfig):
    """The settings of a GAN run: data, both nets and their optimizers, length and result folder.

    Learning rates, damping and KL bound are in the units of apps/common/gan/players.py: scores averaged over a batch.
    """

    app: ClassVar[str] = "train_gan"

    sections: ClassVar[dict[str, str]] = {
        "data": "data and nets",
        "width": "data and nets",
        "gen_optim": "optimization",
        "damping": "curvature",
        "momentum": "first-order terms",
        "fid": "quality",
        "seed": "the run",
    }

    data: str = option("DIGITS", "data set", aliases=("dataset",), choices=DATA, own=True)
    model: str | None = option(None, "nets; default: dcgan for images of 28×28, residual for 32×32", choices=GANS)
    width: float = option(1.0, "scale of all channels, relative to the published nets", check=POSITIVE)
    critic_norm: str = option(
        "none",
        "norm of the critic; batch is the published one, with which the gradient penalty has no effect",
        choices=NORMS,
    )
    z_dim: int = option(64, "dimension of the generator's noise", check=POSITIVE)

    gen_optim: str = option("kfac", "optimizer of the generator", choices=PLAYERS)
    crit_optim: str = option("kfac", "optimizer of the critic", choices=PLAYERS)
    gen_lr: float = option(1e-3, "learning rate of the generator", check=POSITIVE)
    crit_lr: float = option(1e-3, "learning rate of the critic", check=POSITIVE)
    crit_repeats: int = option(5, "critic steps per generator step", check=POSITIVE)
    c_lambda: float = option(10.0, "weight of the gradient penalty", check=NON_NEGATIVE)
    batch_size: int = option(128, "real images per step, and as many fakes", check=POSITIVE)
    num_epochs: int = option(
        200,
        "number of epochs; an epoch has as many generator steps as the data has batches",
        aliases=("n_epochs",),
        check=NON_NEGATIVE,
    )

    damping: float | Literal["auto"] = option(
        1e-4, "natural gradients: damping of the Fisher; auto, for the generator alone: from the reduction ratio",
        check=NON_NEGATIVE,
    )  # fmt: skip
    kl_bound: float = option(
        0.01, "natural gradients: KL bound, 0 for no bound", aliases=("clipping", "kl_clip"), check=NON_NEGATIVE
    )
    gen_damping: float | Literal["auto"] | None = option(
        None, "damping of the generator, if different; auto: from the reduction ratio, bad steps are taken back",
        check=NON_NEGATIVE,
    )  # fmt: skip
    gen_kl_bound: float | None = option(
        None, "KL bound of the generator, if different", aliases=("gen_clipping",), check=NON_NEGATIVE
    )
    ema: float = option(0.95, "natural gradients: weight of the old factors in the running average", check=FRACTION)
    update_every: int | None = option(
        None, "natural gradients: steps between statistics; default: 100, for exactNG 1", aliases=("T_cov",),
        check=POSITIVE,
    )  # fmt: skip
    invert_every: int | None = option(
        None, "natural gradients: steps between inverses; default: 100, for exactNG 1", aliases=("T_inv",),
        check=POSITIVE,
    )  # fmt: skip
    momentum: float = option(0.9, "momentum, for all but adam", check=FRACTION)
    weight_decay: float = option(0.0, "decoupled weight decay, for all but adam", check=NON_NEGATIVE)
    beta_1: float = option(0.5, "adam: weight of the old first moment", check=FRACTION)
    beta_2: float = option(0.999, "adam: weight of the old second moment", check=FRACTION)

    fid: Literal["classifier", "inception", "none"] = option(
        "classifier", "features of the FID: a classifier trained on the same data, or Inception (downloaded)"
    )
    fid_every: int = option(1, "epochs between FIDs; the last epoch always has one", check=POSITIVE)
    fid_samples: int = option(5_000, "number of fakes for a FID", check=POSITIVE)
