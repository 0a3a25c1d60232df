"""What every source of data returns, and the checks that each has to pass."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

import fisherfn as ff
from fisherfn.errors import FisherfnError


class DataError(FisherfnError, ValueError):
    """Data that is not there, or not what it claims to be: what, where, why and what to do."""


class Split(NamedTuple):
    """The examples of one part, in a fixed order."""

    inputs: Tensor  # [N, C, H, W] float32 in [0, 1]; FACES alone is standardised (see faces.py)
    labels: Tensor | None  # [N] int64, None where there are none


class Data(NamedTuple):
    """A data set with the likelihoods and the model that suit it."""

    name: str
    train: Split
    test: Split
    model: str  # the default model, a name in common.models.MODELS
    reconstruction: ff.Likelihood  # of an autoencoder's outputs
    prediction: ff.Likelihood | None  # of the labels, where there are any
    resampled: bool = False  # how they come to a larger size: by resampling, else by a border of zeros


class Loader(Protocol):
    """A source of data. The same arguments give the same tensors, and the global generator is left alone."""

    def __call__(self, data_path: str | None, seed: int) -> Data:
        """The data under `data_path` (None: `./data`), what is random in it drawn from `seed`."""
        ...


def checked(data: Data, name: str) -> Data:
    """`data` itself if it keeps its promises, else a `DataError`: one's own loader is checked like ours."""
    if not isinstance(data, Data):
        raise DataError(f"{name}: the loader returned {type(data).__name__}; it should return common.data.Data.")
    for part in ("train", "test"):
        _check_split(getattr(data, part), f"{name}, {part} part")
    shapes = tuple(data.train.inputs.shape[1:]), tuple(data.test.inputs.shape[1:])
    if shapes[0] != shapes[1]:
        raise DataError(f"{name}: train images are {shapes[0]} and test images {shapes[1]}; make them alike.")
    if (data.train.labels is None) != (data.test.labels is None):
        raise DataError(f"{name}: only one of the train and test parts has labels; give both, or None twice.")
    return data


def _check_split(split: Split, where: str) -> None:
    inputs, labels = split
    if not isinstance(inputs, Tensor) or inputs.ndim != 4 or inputs.numel() == 0:
        raise DataError(f"{where}: inputs should be a non-empty tensor [N, C, H, W], got {_described(inputs)}.")
    if inputs.dtype != torch.float32 or not inputs.isfinite().all():
        raise DataError(
            f"{where}: inputs should be finite float32 numbers, got {inputs.dtype}; use .float(), clean NaN."
        )
    if labels is None:
        return
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != inputs.shape[:1]:
        found = _described(labels)
        raise DataError(f"{where}: labels should be int64 [{len(inputs)}], one for each image, got {found}.")
    if labels.min() < 0:
        raise DataError(f"{where}: labels are class indices from 0, got {int(labels.min())}.")


def _described(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
