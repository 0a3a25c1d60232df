"""SVHN: house numbers as 32×32 colour images of their digits, `train_32x32.mat` and `test_32x32.mat`.

`X` is uint8 [32, 32, 3, N] (row, column, colour, image) and `y` [N, 1] the digit, where 10 stands for 0.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import fisherfn as ff
from common.data.base import Data, DataError, Split
from common.data.files import candidates, command, find, missing, read_mat

FOLDERS = ("svhn", "SVHN")
TRAIN, TEST = "train_32x32.mat", "test_32x32.mat"
SIZE = 32


def load(data_path: str | None, seed: int) -> Data:
    """Images [N, 3, 32, 32] in [0, 1] with labels 0 to 9, in the published order; the extra set is not used."""
    del seed  # nothing is random: the split is the published one
    tried = candidates(data_path, FOLDERS)
    present = find(tried, [TRAIN, TEST])
    if present is None:
        remedy = f"put them there, or {command('SVHN', 'train_cnn', tried[-1])}"
        raise missing("SVHN", f"{TRAIN} and {TEST}", tried, remedy)
    train, test = (_read(present.parent, file) for file in (TRAIN, TEST))
    return Data("SVHN", Split(*train), Split(*test), "cuda_convnet", ff.Gaussian(), ff.Categorical())


def _read(folder: Path, file: str) -> tuple[Tensor, Tensor]:
    path = find([folder], [file])
    if path is None:
        raise missing("SVHN", file, [folder], f"put it next to the other, or {command('SVHN', 'train_cnn', folder)}")
    pixels = torch.from_numpy(read_mat(path, (SIZE, SIZE, 3, None), ["X"]))
    labels = torch.from_numpy(read_mat(path, (pixels.shape[-1], 1), ["y"])).flatten().long()
    if pixels.dtype != torch.uint8:
        raise DataError(f"{path}: 'X' should contain bytes, found {pixels.dtype}; is this the published file?")
    if labels.min() < 1 or labels.max() > 10:
        raise DataError(
            f"{path}: labels go from {int(labels.min())} to {int(labels.max())} where 1 to 10 are expected (10 is the "
            "digit 0); fetch the file again."
        )
    # reorder while they are bytes: the file has images along the last axis, batches use the first
    return pixels.permute(3, 2, 0, 1).contiguous().float() / 255, labels % 10
