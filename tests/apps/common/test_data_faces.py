"""FACES: who goes where, which way up, how turned and scaled; standardised as published."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import io
from torch import Tensor

from common.data import DataError, faces, load
from tests.apps.common.data_files import real


def photographs(value: Tensor) -> np.ndarray:
    """Olivetti's matrix [4096, 400] from `value` [400, 64, 64]: MATLAB keeps images column by column."""
    return value.transpose(1, 2).reshape(400, 4096).T.numpy().astype(np.uint8)


def save(path: Path, **values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    io.savemat(path, values, do_compression=True)
    return path


RAMP = torch.arange(64.0)[:, None].expand(64, 64)  # value = row


def test_thirty_people_train_and_ten_test(tmp_path: Path) -> None:
    person = (torch.arange(400) // 10 * 6).float()
    path = save(tmp_path / faces.PHOTOS, faces=photographs(person[:, None, None].expand(400, 64, 64)))
    train, test = (part * 255 / 6 for part in faces.drawn(path, seed=0))
    # patches of a photograph of one grey value have that grey value
    assert torch.allclose(train, train[:, :, :1, :1].expand_as(train), atol=1e-3)
    assert train[:, 0, 0, 0].round().long().bincount(minlength=40).tolist() == [690] * 30 + [0] * 10
    assert test[:, 0, 0, 0].round().long().bincount(minlength=40).tolist() == [0] * 30 + [690] * 10
    # shuffled: neighbours differ
    assert (train[1:, 0, 0, 0] - train[:-1, 0, 0, 0]).abs().gt(0.5).float().mean() > 0.9


def gradients(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean slope along columns (y, downwards) and along rows (x)."""
    return patches.diff(dim=2).mean((1, 2, 3)), patches.diff(dim=3).mean((1, 2, 3))


def test_patches_are_upright_turned_and_scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / faces.PHOTOS, faces=photographs(RAMP.expand(400, 64, 64)))
    train, _ = faces.drawn(path, seed=0)
    assert train.shape == (20_700, 1, 25, 25)
    down, right = (slope * 255 for slope in gradients(train))
    # away from 45°, where the corners may leave the photograph, the slope is 64 / 25 rows a patch pixel over the scale
    angle, scale = torch.atan2(right, down).rad2deg(), 64 / 25 / torch.hypot(down, right)
    assert -90.5 < angle.min() < -89 and 89 < angle.max() < 90.5
    assert abs(angle.mean()) < 2 and abs(angle.std() - 180 / math.sqrt(12)) < 2  # uniform
    assert 1.39 < scale.min() < 1.41 and 1.79 < scale.max() < 1.81
    # the centre of the patch is the photograph's
    assert torch.allclose(train[:, 0, 12, 12] * 255, torch.tensor(31.5), atol=0.01)
    monkeypatch.setattr(faces, "ANGLE", 0.0)
    down, right = (slope * 255 for slope in gradients(faces.drawn(path, seed=0)[0]))
    assert (down > 1.4).all() and (right.abs() < 1e-4).all()


def test_the_seed_decides() -> None:
    photos = torch.rand(4, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    one, again, other = (faces.patches(photos, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_both_parts_are_standardised_by_the_training_part() -> None:
    generator = torch.Generator().manual_seed(0)
    raw = [torch.randn(count, 1, 3, 3, generator=generator) * 4 + torch.arange(9.0).view(3, 3) for count in (500, 200)]
    train, test = faces.standardised(*raw)
    assert train.mean(0).abs().max() < 1e-5
    assert train.square().mean() == pytest.approx(1, abs=1e-5)
    # one affine map for both: undoing it by two training images gives the raw test images back
    scale = ((raw[0][0] - raw[0][1]) / (train[0] - train[1])).mean()
    assert torch.allclose(test * scale + raw[0].mean(0), raw[1], atol=1e-3)


def test_the_published_set_is_preferred_and_cut_as_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TRAIN", 10), ("TEST", 4), ("TOTAL", 16)):
        monkeypatch.setattr(faces, name, value)
    images = np.random.default_rng(0).normal(size=(16, 25, 25)).astype(np.float32)
    columns = images.transpose(0, 2, 1).reshape(16, 625).T
    save(tmp_path / "olivetti" / faces.PHOTOS, faces=photographs(RAMP.expand(400, 64, 64)))
    path = save(tmp_path / faces.PUBLISHED, newfaces_single=columns)
    train, test = faces.published(path)
    np.testing.assert_array_equal(train[:, 0].numpy(), images[:10])
    np.testing.assert_array_equal(test[:, 0].numpy(), images[12:])
    assert load("FACES", data_path=str(tmp_path)).train.inputs.shape == (10, 1, 25, 25)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"faces": np.zeros((4096, 40), np.uint8)}, r"'faces' \[4096, 400\], found faces \[4096, 40\]"),
        ({"people": np.zeros((2, 2))}, r"found people \[2, 2\]"),
        ({"faces": np.full((4096, 400), np.inf, np.float32)}, "finite"),
        ({"faces": np.full((4096, 400), 1j, np.complex64)}, "real"),
    ],
    ids=["shape", "key", "infinite", "complex"],
)
def test_a_wrong_file_is_refused(tmp_path: Path, values: dict, message: str) -> None:
    path = save(tmp_path / faces.PHOTOS, **values)
    with pytest.raises(DataError, match=message) as caught:
        load("FACES", data_path=str(tmp_path))
    assert str(path) in str(caught.value)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load("FACES", data_path=str(tmp_path))
    message = str(caught.value)
    assert all(word in message for word in (faces.PUBLISHED, faces.PHOTOS, str(tmp_path / "olivetti"), "download"))
    assert ". " not in message and "\n" not in message


def test_the_real_faces() -> None:
    folder = real("olivetti/olivettifaces.mat")
    state = torch.get_rng_state()
    data = load("FACES", data_path=str(folder))
    assert torch.equal(torch.get_rng_state(), state)
    train, test = data.train.inputs, data.test.inputs
    assert train.shape == (20_700, 1, 25, 25) and test.shape == (6_900, 1, 25, 25)
    assert data.train.labels is None and data.prediction is None and data.model == "AE_FACES"
    assert train.mean(0).abs().max() < 1e-4 and train.square().mean() == pytest.approx(1, abs=1e-3)
    # thirty principal components leave 135 of 625 (= 0.22) on the published patches (Hinton & Salakhutdinov, Fig. 2)
    energies = torch.linalg.svdvals(train[:2000].flatten(1)).square()
    assert 0.14 < float(energies[30:].sum() / energies.sum()) < 0.28
