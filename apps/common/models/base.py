"""What a model is: how it is built for some data, what it is trained for and which inputs it takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import nn

from common.data import Data
from fisherfn.errors import FisherfnError

Task = Literal["reconstruct", "predict"]
Inputs = Literal["flat", "images"]
CLASSES = 10  # where the data has no labels


class ModelError(FisherfnError, ValueError):
    """A model, task or initialisation that does not exist or does not fit."""


class Model(NamedTuple):
    """How a net is built for some data, what it is trained for, and what it takes."""

    build: Callable[[Data], nn.Module]
    task: Task
    inputs: Inputs = "flat"  # [N, C·H·W], or images as they are, [N, C, H, W]
    size: int | None = None  # pixels a side, to which smaller images are brought; None: images of any size


def pixels(data: Data) -> int:
    """C·H·W of an image."""
    return math.prod(data.train.inputs.shape[1:])


def channels(data: Data) -> int:
    """C of an image."""
    return data.train.inputs.shape[1]


def classes(data: Data) -> int:
    """The number of classes, at least two: one more than the largest label of either part."""
    if data.train.labels is None or data.test.labels is None:
        return CLASSES
    return max(int(data.train.labels.max()), int(data.test.labels.max()), 1) + 1
