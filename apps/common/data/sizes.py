"""Bring images to the size that a net needs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from common.data.base import Data, DataError, Split


def enlarged(data: Data, size: int) -> Data:
    """Return the data with images of `size`×`size`: padded with zeros, or resampled if they were resampled before.

    Raises:
        DataError: the images are larger.
    """
    shape = tuple(data.train.inputs.shape[2:])
    if shape == (size, size):
        return data
    if max(shape) > size:
        raise DataError(
            f"{data.name}: images of {shape[0]}×{shape[1]} for a net that takes {size}×{size}; make them smaller, or "
            "give a model of your own."
        )
    train, test = (
        Split(grown(split.inputs, size, resampled=data.resampled), split.labels) for split in (data.train, data.test)
    )
    return data._replace(train=train, test=test)


def grown(images: Tensor, size: int, *, resampled: bool) -> Tensor:
    """Return images [N, C, H, W] with `size`×`size` pixels, resampled or padded with zeros."""
    return _resampled(images, size) if resampled else _padded(images, size)


def _padded(images: Tensor, size: int) -> Tensor:
    """Pad with zeros on all sides; an odd one goes to the right and below."""
    height, width = size - images.shape[2], size - images.shape[3]
    return F.pad(images, (width // 2, width - width // 2, height // 2, height - height // 2))


def _resampled(images: Tensor, size: int) -> Tensor:
    return torch.cat(
        [F.interpolate(part, size=(size, size), mode="bilinear", align_corners=False) for part in images.split(1_000)]
    )
