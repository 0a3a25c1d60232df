"""The configurations of training runs, one class a trainer; config.py reads them from the command line and YAML files.

`TrainConfig` is train_mlp's and the base of the others, which change its defaults and choices. Beside its options a
class says what its trainer is: the name it goes by, what its nets are fed, and the net that suits some data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import fisherfn as ff
from common.config import FRACTION, NON_NEGATIVE, POSITIVE, ConfigError, option, validate
from common.data import Data
from common.models import AUTOENCODERS, CNNS, MLPS, SCHEMES
from common.models.base import Inputs
from common.names import is_own

MLP_DATA = ("CURVES", "DIGITS", "MNIST", "FACES", "F_MNIST", "D_MNIST", "MNIST_RESTRICTED")
CNN_DATA = ("DIGITS", "MNIST", "F_MNIST", "CIFAR10", "CIFAR100", "SVHN", "CIFAR10_RESTRICTED")
AUTOENCODER_DATA = ("DIGITS", "MNIST", "F_MNIST", "CIFAR10", "SVHN")

OPTIMIZERS = ("sgd", "adam", *ff.METHODS)
"""Names of `--optim`: the first-order baselines and every method of the library."""

LABELS = {
    "sgd": "SGD",
    "adam": "Adam",
    "kfac": "K-FAC",
    "ekfac": "E-KFAC",
    "kpsvd": "KPSVD",
    "deflation": "Deflation",
    "kfac_cor": "K-FAC corrected",
    "lanczos": "Lanczos",
    "twolevel_kfac": "two-level K-FAC",
    "exactNG": "exact NG",
}
"""What tables and pictures call them."""


@dataclass(frozen=True)
class TrainConfig:
    """What a run is: its data, model and optimizer, how long it runs, and where its result goes.

    Rates, damping and clip are in the units of docs/conventions.md: of the mean over examples of the NLL.
    """

    app: ClassVar[str] = "train_mlp"
    inputs: ClassVar[Inputs] = "flat"
    sections: ClassVar[dict[str, str]] = {
        "data": "data and model",
        "batch_size": "optimization",
        "damping": "curvature",
        "seed": "the run",
    }

    data: str = option("CURVES", "data set", aliases=("dataset",), choices=MLP_DATA, own=True)
    data_path: str | None = option(None, "folder with the files of the data set; null: ./data", aliases=("data_root",))
    download: bool = option(False, "fetch published files that are missing")
    model: str | None = option(None, "net; null: the one that suits the data", choices=MLPS, own=True)
    init_params: str = option("xavier_uniform", "how parameters are drawn", choices=SCHEMES)
    optim: str = option("kfac", "optimizer", aliases=("optimizer",), choices=OPTIMIZERS)

    batch_size: int = option(256, "examples a step", check=POSITIVE)
    num_epochs: int = option(20, "passes through the data", aliases=("epochs", "n_epochs"), check=NON_NEGATIVE)
    lr: float | Literal["auto"] | None = option(
        None, "learning rate; auto, the default: from the quadratic model of each batch, or as tuned for sgd and adam",
        aliases=("learning_rate",), check=POSITIVE,
    )  # fmt: skip
    momentum: float | Literal["auto"] | None = option(
        None, "weight of the previous update; auto, the default: from the quadratic model of each batch, for sgd 0.9",
        check=FRACTION,
    )  # fmt: skip
    nesterov: bool = option(False, "Nesterov's look-ahead, for sgd")
    weight_decay: float = option(0.0, "decoupled from the gradient, in rates", check=NON_NEGATIVE)
    beta_1: float = option(0.9, "adam: weight of the old first moment", check=FRACTION)
    beta_2: float = option(0.999, "adam: weight of the old second moment", check=FRACTION)

    damping: float | Literal["auto"] | None = option(
        None, "added to the Fisher; auto, the default: from the reduction ratio; a number is where it starts",
        check=NON_NEGATIVE,
    )  # fmt: skip
    clipping: float | None = option(
        None, "KL bound, 0 for none; null: none for autoencoders, 0.001 for classifiers", aliases=("kl_clip",),
        check=NON_NEGATIVE,
    )  # fmt: skip
    ema: float = option(0.95, "weight of the old factors in the running average", check=FRACTION)
    damping_form: Literal["factored", "eigen"] | None = option(
        None, "how damping enters Kronecker factors; null: factored (exactNG has λI alone)"
    )
    structure: Literal["full", "block"] | None = option(
        None, "exactNG: all layers coupled, or one block a layer; null: full"
    )
    coarse_space: Literal["nicolaides", "residual", "tselepidis", "spectral", "tpselepedis"] | None = option(
        None, "twolevel_kfac: space that couples the layers; null: nicolaides (tpselepedis is tselepidis)"
    )
    krylov: Literal[0, 1] | None = option(None, "twolevel_kfac: 1 adds the rows' images under K-FAC; null: 0")
    coarse_form: Literal["multiplicative", "balanced", "additive"] | None = option(
        None, "twolevel_kfac: how both levels combine; null: balanced, the one that momentum and KL clip can rely on"
    )
    cg_steps: int | None = option(
        None, "exactNG with type2: conjugate-gradient steps through the model, where outputs are many; null: factorise",
        check=POSITIVE,
    )  # fmt: skip
    fisher: Literal["mc", "type2", "empirical"] = option("mc", "labels sampled, in exact expectation, or the data's")
    fisher_samples: int = option(1, "draws an example, for mc", check=POSITIVE)
    fisher_batch_size: int | None = option(None, "examples for the statistics; null: the whole batch", check=POSITIVE)
    update_every: int | None = option(
        None, "steps between statistics; null: from 2 up to 10, for exactNG 1", aliases=("T_cov",), check=POSITIVE
    )
    invert_every: int | None = option(
        None, "steps between inverses; null: from 4 up to 20, for exactNG 1", aliases=("T_inv",), check=POSITIVE
    )

    seed: int = option(0, "of everything that is random", check=NON_NEGATIVE)
    device: str = option("cpu", "where to compute: cpu, cuda, cuda:1, …")
    compile: bool = option(False, "steps as compiled graphs: minutes at the start, then faster; needs a C++ compiler")
    num_workers: int = option(0, "processes that load data; none where the device is a GPU", check=NON_NEGATIVE)
    result_dir: str = option("results", "folder of all results")
    result_name: str | None = option(None, "the result's own folder; null: from data, model, optimizer and seed")
    overwrite: bool = option(False, "replace an existing result of that name")
    resume: bool = option(False, "go on from an existing result's checkpoint")
    save_every: int | None = option(
        None, "steps between checkpoints, beside those of every epoch; null: none", check=POSITIVE
    )
    tensorboard: bool = option(False, "event files for TensorBoard, in the result's folder")
    quiet: bool = option(False, "no progress bar and no line an epoch")
    verbose: bool = option(False, "print all settings, and which parameter is in which block, before training")

    def __post_init__(self) -> None:
        validate(self)
        if self.quiet and self.verbose:
            raise ConfigError("quiet and verbose exclude each other: give one of them")
        if self.overwrite and self.resume:
            raise ConfigError("overwrite and resume exclude each other: give one of them")

    @staticmethod
    def model_for(data: Data) -> str:
        """The name of the net that suits the data."""
        return data.model


@dataclass(frozen=True)
class CnnConfig(TrainConfig):
    """A run of train_cnn: images stay images, brought to 32×32."""

    app: ClassVar[str] = "train_cnn"
    inputs: ClassVar[Inputs] = "images"

    data: str = option("DIGITS", "data set", aliases=("dataset",), choices=CNN_DATA, own=True)
    model: str | None = option(None, "net; null: cuda_convnet, for CIFAR10_RESTRICTED toyCNN", choices=CNNS, own=True)
    # keeps the signal's scale through ReLUs; in residual nets batch norm does, and any scheme trains
    init_params: str = option("kaiming_normal", "how parameters are drawn", choices=SCHEMES)
    batch_size: int = option(128, "examples a step", check=POSITIVE)

    @staticmethod
    def model_for(data: Data) -> str:
        """One's own, or a small convolutional net."""
        return data.model if is_own(data.model) or data.model in CNNS else "cuda_convnet"


@dataclass(frozen=True)
class AutoencoderConfig(TrainConfig):
    """A run of train_autoencoder: images stay images, of the published size.

    Losses are per output. With Bernoulli outputs (DIGITS, MNIST, F_MNIST) that is the binary cross-entropy in nats;
    with Gaussian ones (CIFAR10, SVHN) half the squared error, so that the mean squared error is twice the number.
    """

    app: ClassVar[str] = "train_autoencoder"
    inputs: ClassVar[Inputs] = "images"

    data: str = option("DIGITS", "data set", aliases=("dataset",), choices=AUTOENCODER_DATA, own=True)
    model: str | None = option(
        None, "net; null: the one published for that many colours", choices=AUTOENCODERS, own=True
    )
    init_params: str = option("default", "how parameters are drawn; default: torch's way", choices=SCHEMES)

    @staticmethod
    def model_for(data: Data) -> str:
        """One's own, or the published net for that many colours."""
        if is_own(data.model):
            return data.model
        return "conv_AE_CIFAR10" if data.train.inputs.shape[1] == 3 else "conv_AE_MNIST"


APPS: dict[str, type[TrainConfig]] = {Config.app: Config for Config in (TrainConfig, CnnConfig, AutoencoderConfig)}
"""Trainers by name."""
