"""CIFAR's binary files: what is written is read, from folders and from the archive; what is broken is named."""

from __future__ import annotations

import io
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from common.data import Data, DataError, cifar, load
from tests.apps.common.data_files import real, write

TEN, HUNDRED = cifar.TEN, cifar.HUNDRED


def images(count: int, seed: int = 0) -> np.ndarray:
    """[count, 3, 32, 32] bytes."""
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)


def records(pixels: np.ndarray, *labels: np.ndarray) -> bytes:
    """The format as published: label bytes, then red, green and blue, each row by row."""
    content = b""
    for image, *bytes_ in zip(pixels, *labels, strict=True):
        content += bytes(int(label) for label in bytes_)
        for plane in image:
            for row in plane:
                content += row.tobytes()
    return content


def write_ten(folder: Path, parts: int = 5, each: int = 3) -> dict[str, bytes]:
    """A small CIFAR-10: training parts of other seeds, labels in turn."""
    files = {f"data_batch_{k}.bin": records(images(each, k), np.arange(each) + k) for k in range(1, parts + 1)}
    files["test_batch.bin"] = records(images(4, 9), np.array([9, 0, 5, 5]))
    for name, content in files.items():
        write(folder / name, content)
    return files


def write_hundred(folder: Path) -> None:
    coarse, fine = np.array([19, 0]), np.array([99, 7])
    write(folder / "train.bin", records(images(2, 1), coarse, fine))
    write(folder / "test.bin", records(images(2, 2), coarse, fine[::-1]))


def archive(path: Path, members: dict[str, bytes], mode: str = "w:gz") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as file:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return path


def is_the_small_ten(data: Data, parts: int = 5) -> None:
    pixels = np.concatenate([images(3, k) for k in range(1, parts + 1)])
    assert data.train.inputs.dtype == torch.float32 and data.train.labels.dtype == torch.int64
    np.testing.assert_allclose(data.train.inputs.numpy() * 255, pixels, atol=1e-4)
    np.testing.assert_allclose(data.test.inputs.numpy() * 255, images(4, 9), atol=1e-4)
    assert data.train.labels.tolist() == [k + i for k in range(1, parts + 1) for i in range(3)]
    assert data.test.labels.tolist() == [9, 0, 5, 5]


@pytest.mark.parametrize("folder", ["", "cifar-10-batches-bin", "cifar10", "CIFAR10"])
def test_written_files_are_read_back(tmp_path: Path, folder: str) -> None:
    write_ten(tmp_path / folder)
    data = load("CIFAR10", data_path=str(tmp_path))
    is_the_small_ten(data)
    assert (data.name, data.model) == ("CIFAR10", "cuda_convnet")


def test_existing_parts_are_loaded_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_ten(tmp_path, parts=2)
    with caplog.at_level(logging.WARNING):
        is_the_small_ten(load("CIFAR10", data_path=str(tmp_path)), parts=2)
    assert "2 of the 5 training files found, 6 images" in caplog.text
    caplog.clear()
    write_ten(tmp_path)
    load("CIFAR10", data_path=str(tmp_path))
    assert not caplog.text


@pytest.mark.parametrize("folder", ["", "cifar-10-batches-bin"])
def test_the_archive_is_read_where_it_is(tmp_path: Path, folder: str) -> None:
    files = write_ten(tmp_path / "elsewhere")
    members = {f"cifar-10-batches-bin/{name}": content for name, content in files.items()}
    # what must not matter: other members, a way out of the folder, a folder and a link of a wanted name
    members |= {"../data_batch_1.bin": b"out", "/test_batch.bin": b"out", "cifar-10-batches-bin/readme.html": b"x"}
    path = archive(tmp_path / "data" / folder / "cifar-10-binary.tar.gz", members)
    is_the_small_ten(load("CIFAR10", data_path=str(tmp_path / "data")))
    assert [file for file in (tmp_path / "data").rglob("*") if file.is_file()] == [path]


def test_a_link_in_the_archive_is_not_followed(tmp_path: Path) -> None:
    secret = write(tmp_path / "secret", records(images(2), np.arange(2)))
    path = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        for name in ("data_batch_1.bin", "test_batch.bin"):
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.type, entry.linkname = tarfile.SYMTYPE, str(secret)
            file.addfile(entry)
    with pytest.raises(DataError, match="found no test_batch.bin in .*tar.gz"):
        load("CIFAR10", data_path=str(tmp_path))


def test_cifar100_uses_the_fine_labels(tmp_path: Path) -> None:
    write_hundred(tmp_path / "cifar-100-binary")
    data = load("CIFAR100", data_path=str(tmp_path))
    assert data.train.labels.tolist() == [99, 7] and data.test.labels.tolist() == [7, 99]
    np.testing.assert_allclose(data.train.inputs.numpy() * 255, images(2, 1), atol=1e-4)


def test_restricted_keeps_the_first_of_the_training_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ten(tmp_path)
    assert cifar.restricted.keywords["first"] == 5_000
    monkeypatch.setitem(cifar.restricted.keywords, "first", 7)
    whole, data = (load(name, data_path=str(tmp_path)) for name in ("CIFAR10", "CIFAR10_RESTRICTED"))
    assert (data.name, data.model) == ("CIFAR10_RESTRICTED", "toyCNN")
    assert torch.equal(data.train.inputs, whole.train.inputs[:7])
    assert torch.equal(data.train.labels, whole.train.labels[:7]) and torch.equal(data.test.inputs, whole.test.inputs)


GOOD = records(images(3), np.arange(3))
BROKEN = {
    "truncated": (GOOD[:-1], "9,218 bytes are no whole number of records of 3073"),
    "empty": (b"", "0 bytes are no whole number"),
    "a label too large": (records(images(3), np.array([0, 10, 1])), "label 10 where classes go from 0 to 9"),
    "the pickled version": (b"\x80\x02}q\x01(U\x0bbatch_label", "not the binary version"),
}


@pytest.mark.parametrize("file", ["data_batch_2.bin", "test_batch.bin"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named_with_its_fault(tmp_path: Path, case: str, file: str) -> None:
    write_ten(tmp_path)
    content, message = BROKEN[case]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load("CIFAR10", data_path=str(tmp_path))
    assert str(tmp_path / file) in str(caught.value)


def test_a_coarse_label_too_large(tmp_path: Path) -> None:
    write_hundred(tmp_path)
    write(tmp_path / "train.bin", records(images(2), np.array([20, 0]), np.array([1, 2])))
    with pytest.raises(DataError, match="label 20 where classes go from 0 to 19"):
        load("CIFAR100", data_path=str(tmp_path))


def damaged(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damaged, "broken archive"),
        (lambda content: b"no archive", "broken archive"),
        (lambda content: content[:-8] + bytes(8), "broken archive"),
    ],
    ids=["cut short", "something else", "a wrong checksum"],
)
def test_a_broken_archive_is_named(tmp_path: Path, change, message: str) -> None:
    members = {f"cifar-10-batches-bin/{name}": content for name, content in write_ten(tmp_path / "x").items()}
    path = archive(tmp_path / "cifar-10-binary.tar.gz", members)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=message) as caught:
        load("CIFAR10", data_path=str(tmp_path))
    assert str(path) in str(caught.value)


def test_a_member_larger_than_any_published_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = {f"cifar-10-batches-bin/{name}": content for name, content in write_ten(tmp_path / "x").items()}
    archive(tmp_path / "cifar-10-binary.tar.gz", members)
    monkeypatch.setattr(cifar, "LARGEST", 2)
    with pytest.raises(DataError, match="data_batch_1.bin is 9,219 bytes, more than was published"):
        load("CIFAR10", data_path=str(tmp_path))


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load("CIFAR100", data_path=str(tmp_path))
    message = str(caught.value)
    words = ("train.bin", "cifar-100-binary.tar.gz", "download", str(tmp_path / "cifar-100-binary"), str(tmp_path))
    assert all(word in message for word in words)
    assert ". " not in message and "\n" not in message


@pytest.mark.parametrize("absent", ["data_batch_1.bin", "test_batch.bin"])
def test_a_part_missing_is_no_reason_to_guess(tmp_path: Path, absent: str) -> None:
    write_ten(tmp_path, parts=1)
    (tmp_path / absent).unlink()
    with pytest.raises(DataError, match=f"found no {absent}"):
        load("CIFAR10", data_path=str(tmp_path))


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ten(tmp_path)

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match="cannot be read .Permission denied."):
        load("CIFAR10", data_path=str(tmp_path))


def test_the_real_images() -> None:
    folder = real("cifar10/data_batch_1.bin", "cifar10/test_batch.bin")
    data = load("CIFAR10", data_path=str(folder))
    assert len(data.train.inputs) % 5000 == 0 and data.train.inputs.shape[1:] == (3, 32, 32)
    assert data.train.labels.unique().tolist() == list(range(10))
    # channel means and deviations that are quoted everywhere for the whole training set
    channels = data.train.inputs.transpose(0, 1).flatten(1)
    torch.testing.assert_close(channels.mean(1), torch.tensor([0.491, 0.482, 0.447]), atol=0.02, rtol=0)
    torch.testing.assert_close(channels.std(1), torch.tensor([0.247, 0.243, 0.262]), atol=0.02, rtol=0)
    # ships and planes (8, 0) have blue pictures, frogs and deer (6, 4) have not: colours and labels belong together
    blue = data.train.inputs[:, 2].mean((1, 2)) - data.train.inputs[:, 0].mean((1, 2))
    by_class = torch.stack([blue[data.train.labels == label].mean() for label in range(10)])
    assert set(by_class.topk(2).indices.tolist()) == {0, 8} and by_class[[4, 6]].max() < 0
