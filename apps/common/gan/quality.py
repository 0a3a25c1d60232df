"""The quality of fakes: the Fréchet inception distance, computed by torchmetrics on thousands of them.

Without downloaded weights the features are the inputs of the last layer of a small classifier, which train_cnn trains
on the same data. Such numbers compare runs on the same data and are not comparable with published FIDs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from common.checkpoints import load_checkpoint
from common.config import ConfigError
from common.data import Data
from common.data.sizes import grown
from common.gan.config import GanConfig
from common.models import resolve
from common.results import CHECKPOINT, read_metrics
from common.train_config import CnnConfig
from common.trainer import run

CLASSIFIER = "cuda_convnet"
EPOCHS = 10
BATCH = 500


class Features(nn.Module):
    """The inputs of a classifier's last layer: images [N, C, H, W] in [0, 1] -> [N, d]."""

    def __init__(self, body: nn.Module, size: int | None, resampled: bool, num_features: int) -> None:
        super().__init__()
        self.body, self.size, self.resampled, self.num_features = body, size, resampled, num_features

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of images, resized to the classifier's size like its training images."""
        if self.size:
            images = grown(images, self.size, resampled=self.resampled)
        out: Tensor = self.body(images)
        return out


class Quality:
    """The distance of fakes from the training images, in the features of one net."""

    def __init__(self, features: nn.Module | int, real: Tensor) -> None:
        """Prepare the statistics of `real` in [0, 1]; an integer selects Inception's layer of that width.

        Raises:
            ConfigError: Inception's weights, or the package that reads them, are missing.
        """
        from torchmetrics.image.fid import FrechetInceptionDistance  # takes a second to import, and is needed only here

        try:
            metric = FrechetInceptionDistance(feature=features, reset_real_features=False, normalize=True)
        except (ModuleNotFoundError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"fid inception needs torch-fidelity and a download: {reason} Try --fid classifier"
            ) from None
        self._metric = metric.to(real.device)
        self._add(real, real=True)

    def fid(self, fakes: Tensor) -> float:
        """Return the distance of fakes [N, C, H, W] in [0, 1]."""
        self._metric.reset()
        self._add(fakes, real=False)
        return float(self._metric.compute())

    @torch.no_grad()
    def _add(self, images: Tensor, real: bool) -> None:
        for part in images.split(BATCH):
            three = part if self._metric.used_custom_model or part.shape[1] == 3 else part.expand(-1, 3, -1, -1)
            self._metric.update(three, real=real)


def make_quality(config: GanConfig, data: Data, say: Callable[[str], None]) -> Quality | None:
    """Return the measure that `--fid` names, for fakes of this data; `say` prints a description."""
    if config.fid == "none":
        return None
    real = data.train.inputs.to(config.device)
    if config.fid == "inception":
        return Quality(2048, real)
    features, accuracy = classifier_features(config, data)
    say(f"FID from the features of a {CLASSIFIER} trained here on {data.name}, test accuracy {accuracy:.3f}")
    return Quality(features.to(config.device), real)


def classifier_features(config: GanConfig, data: Data) -> tuple[Features, float]:
    """Return the classifier without its last layer, trained now or by an earlier run, and its test accuracy."""
    spec = resolve(CLASSIFIER)
    if data.train.labels is None:
        raise ConfigError(f"{data.name} has no labels for a classifier to learn: give --fid inception or none")
    folder = Path(config.result_dir) / CnnConfig.app / f"features-{data.name}".replace(":", "-")
    wanted = CnnConfig(
        data=config.data, data_path=config.data_path, model=CLASSIFIER, optim="adam", lr=1e-3, num_epochs=EPOCHS,
        result_dir=config.result_dir, result_name=folder.name, device=config.device, quiet=True,
    )  # fmt: skip
    if not (folder / CHECKPOINT).is_file():
        run(wanted)
    elif len(read_metrics(folder)) <= EPOCHS:
        run(dataclasses.replace(wanted, resume=True))
    tensors, _ = load_checkpoint(folder / CHECKPOINT)
    net = spec.build(data)
    net.load_state_dict({p.partition("/")[2]: t for p, t in tensors.items() if not p.startswith("state")})
    assert isinstance(net, nn.Sequential) and isinstance(net[-1], nn.Linear)
    features = Features(net[:-1].eval(), spec.size, data.resampled, net[-1].in_features)
    return features, read_metrics(folder)[-1]["test_accuracy"]
