"""The configurations of training runs, one class per trainer; config.py reads them from command line and YAML files.

`TrainConfig` is that of train_mlp and the base of the others, which change its defaults and choices. A class also
states the name of its trainer, the kind of inputs of its nets, and the default net for some data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import fisherfn as ff
from common.config import FRACTION, NON_NEGATIVE, POSITIVE, option
from common.data import Data
from common.models import AUTOENCODERS, CNNS, MLPS, SCHEMES
from common.models.base import Inputs
from common.names import is_own
from common.run_config import RunConfig

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
    "kl_optimal": "KL-optimal",
    "twolevel_kfac": "two-level K-FAC",
    "exactNG": "exact NG",
}
"""Names in tables and pictures."""


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """The settings of a run: data, model, optimizer, length and result folder.

    Learning rates, damping and KL bound are in the units of docs/conventions.md: the mean over examples of the NLL.
    """

    app: ClassVar[str] = "train_mlp"
    inputs: ClassVar[Inputs] = "flat"
    sections: ClassVar[dict[str, str]] = {
        "data": "data and model",
        "init_params": "data and model",
        "batch_size": "optimization",
        "damping": "curvature",
        "seed": "the run",
        "compile": "the run",
    }

    data: str = option("CURVES", "data set", aliases=("dataset",), choices=MLP_DATA, own=True)
    model: str | None = option(None, "model; default: the one for the data", choices=MLPS, own=True)
    init_params: str = option("xavier_uniform", "initialisation of the parameters", choices=SCHEMES)
    optim: str = option("kfac", "optimizer", aliases=("optimizer",), choices=OPTIMIZERS)

    batch_size: int = option(256, "batch size", check=POSITIVE)
    num_epochs: int = option(20, "number of epochs", aliases=("epochs", "n_epochs"), check=NON_NEGATIVE)
    lr: float | Literal["auto"] | None = option(
        None, "learning rate; default: auto, from the quadratic model of each batch; for sgd and adam the tuned value",
        aliases=("learning_rate",), check=POSITIVE,
    )  # fmt: skip
    momentum: float | Literal["auto"] | None = option(
        None, "momentum; default: auto, from the quadratic model of each batch; for sgd 0.9",
        check=FRACTION,
    )  # fmt: skip
    nesterov: bool = option(False, "Nesterov momentum, for sgd")
    weight_decay: float = option(0.0, "decoupled weight decay", check=NON_NEGATIVE)
    beta_1: float = option(0.9, "adam: weight of the old first moment", check=FRACTION)
    beta_2: float = option(0.999, "adam: weight of the old second moment", check=FRACTION)

    damping: float | Literal["auto"] | None = option(
        None, "damping of the Fisher; default: auto, from the reduction ratio; a number is the initial value",
        check=NON_NEGATIVE,
    )  # fmt: skip
    kl_bound: float | None = option(
        None, "KL bound, 0 for no bound; default: no bound for autoencoders, 0.001 for classifiers",
        aliases=("clipping", "kl_clip"), check=NON_NEGATIVE,
    )  # fmt: skip
    ema: float = option(0.95, "weight of the old factors in the running average", check=FRACTION)
    damping_form: Literal["factored", "eigen"] | None = option(
        None, "form of the damping; default: factored (exactNG always uses λI)"
    )
    structure: Literal["full", "block"] | None = option(
        None, "exactNG: couple all layers, or one block per layer; default: full"
    )
    coarse_space: Literal["nicolaides", "residual", "tselepidis", "spectral", "tpselepedis"] | None = option(
        None, "twolevel_kfac: space that couples the layers; default: nicolaides (tpselepedis means tselepidis)"
    )
    krylov: Literal[0, 1] | None = option(None, "twolevel_kfac: 1 adds the images of the rows under K-FAC; default: 0")
    coarse_form: Literal["multiplicative", "balanced", "additive"] | None = option(
        None, "twolevel_kfac: combination of both levels; default: balanced, which momentum and KL clip need"
    )
    cg_steps: int | None = option(
        None, "exactNG with type2: conjugate-gradient steps through the model, for many outputs; default: factorise",
        check=POSITIVE,
    )  # fmt: skip
    fisher: Literal["mc", "type2", "empirical"] = option(
        "mc", "labels of the Fisher: sampled, exact expectation, or those of the data"
    )
    fisher_samples: int = option(1, "sampled labels per example, for mc", check=POSITIVE)
    fisher_batch_size: int | None = option(
        None, "examples for the statistics; default: the whole batch; needs lr, damping and kl_bound", check=POSITIVE
    )
    update_every: int | None = option(
        None, "steps between statistics; default: from 2 up to 10, for exactNG 1", aliases=("T_cov",), check=POSITIVE
    )
    invert_every: int | None = option(
        None, "steps between inverses; default: from 4 up to 20, for exactNG 1", aliases=("T_inv",), check=POSITIVE
    )

    compile: bool = option(False, "compile steps of whole batches: minutes at first, then faster; needs a C++ compiler")
    num_workers: int = option(0, "processes that load data; none on a GPU", check=NON_NEGATIVE)

    @staticmethod
    def model_for(data: Data) -> str:
        """Return the name of the default model for the data."""
        return data.model


@dataclass(frozen=True)
class CnnConfig(TrainConfig):
    """The settings of train_cnn: inputs are images, brought to 32×32."""

    app: ClassVar[str] = "train_cnn"
    inputs: ClassVar[Inputs] = "images"

    data: str = option("DIGITS", "data set", aliases=("dataset",), choices=CNN_DATA, own=True)
    model: str | None = option(
        None, "model; default: cuda_convnet, for CIFAR10_RESTRICTED toyCNN", choices=CNNS, own=True
    )
    # keeps the scale of activations through ReLUs; residual nets train with any scheme, because of batch norm
    init_params: str = option("kaiming_normal", "initialisation of the parameters", choices=SCHEMES)
    batch_size: int = option(128, "batch size", check=POSITIVE)

    @staticmethod
    def model_for(data: Data) -> str:
        """Return the user's own model, or a small convolutional net."""
        return data.model if is_own(data.model) or data.model in CNNS else "cuda_convnet"


@dataclass(frozen=True)
class AutoencoderConfig(TrainConfig):
    """The settings of train_autoencoder: inputs are images of the published size.

    Losses are per output. With Bernoulli outputs (DIGITS, MNIST, F_MNIST) that is the binary cross-entropy in nats;
    with Gaussian ones (CIFAR10, SVHN) half the squared error, so that the mean squared error is twice the number.
    """

    app: ClassVar[str] = "train_autoencoder"
    inputs: ClassVar[Inputs] = "images"

    data: str = option("DIGITS", "data set", aliases=("dataset",), choices=AUTOENCODER_DATA, own=True)
    model: str | None = option(
        None, "model; default: the published one for the number of colours", choices=AUTOENCODERS, own=True
    )
    init_params: str = option("default", "initialisation of the parameters; default: torch's own", choices=SCHEMES)

    @staticmethod
    def model_for(data: Data) -> str:
        """Return the user's own model, or the published net for the number of colours."""
        if is_own(data.model):
            return data.model
        return "conv_AE_CIFAR10" if data.train.inputs.shape[1] == 3 else "conv_AE_MNIST"


APPS: dict[str, type[TrainConfig]] = {Config.app: Config for Config in (TrainConfig, CnnConfig, AutoencoderConfig)}
"""Trainers by name."""
