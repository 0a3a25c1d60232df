"""The type of a model: its builder, its task and its inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import nn

from common.data import Data
from fisherfn.errors import FisherfnError

Task = Literal["reconstruct", "predict"]
Inputs = Literal["flat", "images"]
CLASSES = 10  # if the data has no labels


class ModelError(FisherfnError, ValueError):
    """A model, task or initialisation that is unknown or does not fit."""


class Model(NamedTuple):
    """A model: the builder of its net for some data, its task, and its inputs."""

    build: Callable[[Data], nn.Module]
    task: Task
    inputs: Inputs = "flat"  # [N, C·H·W], or images as they are, [N, C, H, W]
    size: int | None = None  # side of the images in pixels, to which smaller ones are enlarged; None: any size


def pixels(data: Data) -> int:
    """Return C·H·W of an image."""
    return math.prod(data.train.inputs.shape[1:])


def channels(data: Data) -> int:
    """Return C of an image."""
    return data.train.inputs.shape[1]


def classes(data: Data) -> int:
    """Return the number of classes, at least two: one more than the largest label of either part."""
    if data.train.labels is None or data.test.labels is None:
        return CLASSES
    return max(int(data.train.labels.max()), int(data.test.labels.max()), 1) + 1
