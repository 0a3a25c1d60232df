"""SVHN: rows, columns, colours and images are where they belong, and ten is zero."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import io

from common.data import DataError, load, svhn


def part(count: int, seed: int) -> dict[str, np.ndarray]:
    """Write a file as published: X [32, 32, 3, N] of bytes and y [N, 1] from 1 to 10."""
    rng = np.random.default_rng(seed)
    return {"X": rng.integers(0, 256, (32, 32, 3, count), dtype=np.uint8), "y": np.arange(count)[:, None] % 10 + 1}


def save(folder: Path, train: dict[str, np.ndarray], test: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file, values in ((svhn.TRAIN, train), (svhn.TEST, test)):
        types = {"y": values["y"].astype(np.uint8)} if values["y"].max() < 256 else {}
        io.savemat(folder / file, values | types, do_compression=True)


@pytest.mark.parametrize("folder", ["", "svhn", "SVHN"])
def test_written_files_are_read_back(tmp_path: Path, folder: str) -> None:
    train, test = part(12, 0), part(5, 1)
    save(tmp_path / folder, train, test)
    data = load("SVHN", data_path=str(tmp_path))
    assert data.train.inputs.shape == (12, 3, 32, 32) and data.test.inputs.shape == (5, 3, 32, 32)
    for image, row, column, colour in ((0, 1, 2, 0), (11, 30, 4, 2), (5, 0, 31, 1)):
        pixel = float(data.train.inputs[image, colour, row, column])
        assert pixel == pytest.approx(train["X"][row, column, colour, image] / 255, abs=1e-6)
    assert data.train.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    assert data.train.inputs.dtype == torch.float32 and data.train.labels.dtype == torch.int64
    assert data.train.inputs.max() <= 1 and data.train.inputs.is_contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"X": np.zeros((32, 32, 3), np.uint8)}, r"'X' \[32, 32, 3, N\], found X \[32, 32, 3\]"),
        ({"X": np.zeros((5, 3, 32, 32), np.uint8)}, r"found X \[5, 3, 32, 32\]"),
        ({"X": np.zeros((32, 32, 3, 5))}, "'X' should contain bytes"),
        ({"y": np.ones((4, 1))}, r"'y' \[5, 1\]"),
        ({"y": np.zeros((5, 1))}, "labels go from 0 to 0 where 1 to 10"),
        ({"y": np.full((5, 1), 11)}, "labels go from 11 to 11 where 1 to 10"),
    ],
    ids=["three dimensions", "another order", "other numbers", "fewer labels", "zero", "eleven"],
)
def test_a_wrong_file_is_refused(tmp_path: Path, change: dict[str, np.ndarray], message: str) -> None:
    save(tmp_path, part(5, 0), part(5, 1) | change)
    with pytest.raises(DataError, match=message) as caught:
        load("SVHN", data_path=str(tmp_path))
    assert str(tmp_path / svhn.TEST) in str(caught.value)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    save(tmp_path, part(5, 0), part(5, 1))
    path = tmp_path / svhn.TRAIN
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="MATLAB 5 file"):
        load("SVHN", data_path=str(tmp_path))


@pytest.mark.parametrize("absent", [svhn.TRAIN, svhn.TEST])
def test_a_missing_file_is_one_sentence(tmp_path: Path, absent: str) -> None:
    save(tmp_path, part(5, 0), part(5, 1))
    (tmp_path / absent).unlink()
    with pytest.raises(DataError, match=f"SVHN: found no {absent} in .*download") as caught:
        load("SVHN", data_path=str(tmp_path))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=f"{svhn.TRAIN} and {svhn.TEST} in .*svhn.*SVHN"):
        load("SVHN", data_path=str(tmp_path / "nowhere"))
