"""The result of every data source, and its checks."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

import fisherfn as ff
from fisherfn.errors import FisherfnError


class DataError(FisherfnError, ValueError):
    """Missing or invalid data; the message states what, where, why and the fix."""


class Split(NamedTuple):
    """The examples of one part, in a fixed order."""

    inputs: Tensor  # [N, C, H, W] float32 in [0, 1]; only FACES is standardised (see faces.py)
    labels: Tensor | None  # [N] int64, or None without labels


class Data(NamedTuple):
    """A data set with its likelihoods and its default model."""

    name: str
    train: Split
    test: Split
    model: str  # the default model, a name in common.models.MODELS
    reconstruction: ff.Likelihood  # for the outputs of an autoencoder
    prediction: ff.Likelihood | None  # for the labels, if there are any
    resampled: bool = False  # enlarge images by resampling, otherwise by padding with zeros


class Loader(Protocol):
    """A data source. The same arguments give the same tensors; the global generator is not used."""

    def __call__(self, data_path: str | None, seed: int) -> Data:
        """Load the data under `data_path` (None: `./data`), with randomness from `seed`."""
        ...


def checked(data: Data, name: str) -> Data:
    """Return `data` if it is valid, else raise `DataError`; user loaders are checked like the library's."""
    if not isinstance(data, Data):
        raise DataError(f"{name}: the loader returned {type(data).__name__}; it should return common.data.Data.")
    for part in ("train", "test"):
        _check_split(getattr(data, part), f"{name}, {part} part")
    shapes = tuple(data.train.inputs.shape[1:]), tuple(data.test.inputs.shape[1:])
    if shapes[0] != shapes[1]:
        raise DataError(f"{name}: train images are {shapes[0]} and test images {shapes[1]}; make them equal.")
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
