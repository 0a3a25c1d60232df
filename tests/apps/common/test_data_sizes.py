"""Images brought to a net's size: nothing is lost, nothing is moved."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits

import fisherfn as ff
from common.data import Data, DataError, Split, enlarged, load


def data(*shape: int, resampled: bool = False) -> Data:
    images = torch.rand(5, *shape, generator=torch.Generator().manual_seed(0))
    split = Split(images, torch.arange(5))
    return Data("X", split, split, "MLP", ff.Bernoulli(), ff.Categorical(), resampled=resampled)


def test_a_border_of_zeros() -> None:
    small = data(1, 28, 28)
    large = enlarged(small, 32)
    for part, before in ((large.train, small.train), (large.test, small.test)):
        assert part.inputs.shape == (5, 1, 32, 32) and torch.equal(part.labels, before.labels)
        assert torch.equal(part.inputs[:, :, 2:30, 2:30], before.inputs)
        assert part.inputs.sum() == pytest.approx(before.inputs.sum())
    assert large._replace(train=small.train, test=small.test) == small


def test_an_odd_border_has_its_rest_right_and_below() -> None:
    small = data(2, 3, 6)
    large = enlarged(small, 6).train.inputs
    assert torch.equal(large[:, :, 1:4], small.train.inputs)
    assert (large[:, :, [0, 4, 5]] == 0).all()


def test_the_right_size_stays_as_it_is() -> None:
    right = data(3, 32, 32, resampled=True)
    assert enlarged(right, 32) is right


def test_resized_data_are_interpolated() -> None:
    # linear interpolation keeps what is linear, in units of the image's width, away from the border's half pixel
    def ramp(size: int) -> torch.Tensor:
        return ((torch.arange(size) + 0.5) / size).expand(1, 1, size, size)

    split = Split(ramp(28).expand(3, 2, 28, 28), None)
    large = enlarged(data(2, 28, 28, resampled=True)._replace(train=split), 32).train.inputs
    assert large.shape == (3, 2, 32, 32)
    torch.testing.assert_close(large[..., 1:-1], ramp(32)[..., 1:-1].expand(3, 2, 32, 30))


def test_digits_are_resampled() -> None:
    digits = enlarged(load("DIGITS"), 32)
    images, labels = (torch.cat(pair) for pair in zip(digits.train, digits.test, strict=True))
    # means over the 4×4 pixels that an old one has become find the original, but for a few of many alike
    old = torch.from_numpy(load_digits().data).float() / 16
    nearest = torch.cdist(torch.nn.functional.avg_pool2d(images, 4).flatten(1), old).argmin(1)
    assert nearest.unique().numel() > 1780
    assert (torch.from_numpy(load_digits().target)[nearest] == labels).float().mean() > 0.999


@pytest.mark.parametrize("shape", [(1, 33, 32), (3, 20, 40)])
def test_larger_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=f"X: images of {shape[1]}×{shape[2]} for a net that takes 32×32"):
        enlarged(data(*shape), 32)
