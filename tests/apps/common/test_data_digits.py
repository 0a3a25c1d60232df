"""DIGITS: scikit-learn's images, whole and once each, resampled."""

from __future__ import annotations

import torch

from common.data import load

# instances per class, as the UCI repository states them for the part that scikit-learn ships
LABELS = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_shapes_and_counts() -> None:
    data = load("DIGITS")
    assert data.train.inputs.shape == (1500, 1, 28, 28) and data.test.inputs.shape == (297, 1, 28, 28)
    assert torch.cat([data.train.labels, data.test.labels]).bincount().tolist() == LABELS
    assert data.train.inputs.min() == 0 and data.train.inputs.max() == 1
    assert data.model == "AE_MNIST"


def test_every_image_once_with_its_label_and_resampled() -> None:
    from sklearn.datasets import load_digits

    data, bunch = load("DIGITS"), load_digits()
    found = torch.cat([data.train.inputs, data.test.inputs]).squeeze(1)
    labels = torch.cat([data.train.labels, data.test.labels])
    # an old pixel is 28 / 8 = 3.5 new ones wide, so the k-th one's centre is at 3.5 (k + ½) − ½
    position = 3.5 * torch.arange(8) + 1.25
    low = position.floor().long()
    mix = (position - low)[:, None]
    rows = found[:, low] * (1 - mix) + found[:, low + 1] * mix
    back = rows[:, :, low] * (1 - mix[:, 0]) + rows[:, :, low + 1] * mix[:, 0]
    # linear interpolation back to the old centres blurs a little, but each image stays the nearest to its original
    old = torch.from_numpy(bunch.images).float().flatten(1) / 16
    nearest = torch.cdist(back.flatten(1), old).argmin(1)
    assert sorted(nearest.tolist()) == list(range(1797))
    assert labels.tolist() == bunch.target[nearest.numpy()].tolist()


def test_the_seed_decides_the_split() -> None:
    one, again, other = (load("DIGITS", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.train.inputs, again.train.inputs) and torch.equal(one.test.labels, again.test.labels)
    assert not torch.equal(one.train.inputs, other.train.inputs)
