"""DIGITS: the 1,797 handwritten digits that come with scikit-learn, which need no file."""

from __future__ import annotations

import torch
from torch.nn import functional as F

import fisherfn as ff
from common.data.base import Data, Split

SIZE = 28  # resampled from 8, so that the MNIST nets fit
TRAIN = 1_500  # and 297 for testing


def load(data_path: str | None, seed: int) -> Data:
    """1,500 training and 297 test images, [N, 1, 28, 28] in [0, 1], shuffled by `seed`, with their labels.

    `data_path` is not used: the images are in the scikit-learn package.
    """
    del data_path
    from sklearn.datasets import load_digits  # takes a second to import, and is needed only here

    bunch = load_digits()
    small = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16  # grey values are 0 to 16
    images = F.interpolate(small, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = (Split(images[index], labels[index]) for index in order.tensor_split([TRAIN]))
    return Data("DIGITS", train, test, "AE_MNIST", ff.Bernoulli(), ff.Categorical(), resampled=True)
