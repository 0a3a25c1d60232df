"""IDX files: what is written is read, wherever it lies; what is broken is named, in bounded memory."""

from __future__ import annotations

import gzip
import logging
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from common.data import DataError, idx, load
from tests.apps.common.data_files import digits, idx_bytes, real, write, write_part

TEN = digits(10)
# the ten classes of MNIST's test set, as its publishers count them
T10K_LABELS = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
T10K_FILES = "mnist/t10k-images-idx3-ubyte.gz", "mnist/t10k-labels-idx1-ubyte.gz"


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("folder", ["", "mnist", "MNIST", "MNIST/raw"])
def test_written_files_are_read_back(tmp_path: Path, folder: str, suffix: str) -> None:
    images, labels = write_part(tmp_path / folder, "train", 20, suffix)
    write_part(tmp_path / folder, "t10k", 10, suffix)
    data = load("MNIST", data_path=str(tmp_path))
    assert data.train.inputs.shape == (20, 1, 4, 3) and data.test.inputs.shape == (10, 1, 4, 3)
    assert data.train.inputs.dtype == torch.float32 and data.train.labels.dtype == torch.int64
    np.testing.assert_allclose(data.train.inputs[:, 0].numpy() * 255, images, atol=1e-4)
    assert data.train.labels.tolist() == labels.tolist()


def test_the_dotted_names_are_read_too(tmp_path: Path) -> None:
    for part in ("train", "t10k"):
        write(tmp_path / f"{part}-images.idx3-ubyte", idx_bytes(TEN[0]))
        write(tmp_path / f"{part}-labels.idx1-ubyte", idx_bytes(TEN[1]))
    assert len(load("MNIST", data_path=str(tmp_path)).train.inputs) == 10


def test_without_training_files_the_others_are_split_and_it_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_part(tmp_path, "t10k", 1000)
    with caplog.at_level(logging.WARNING):
        data = load("MNIST", data_path=str(tmp_path), seed=1)
    assert "900 for training and 100 for testing" in caplog.text
    again, other = (load("MNIST", data_path=str(tmp_path), seed=seed) for seed in (1, 2))
    assert torch.equal(data.train.inputs, again.train.inputs)
    assert not torch.equal(data.train.inputs, other.train.inputs)
    # disjoint and complete: the first two pixels count the images, and each kept its label
    both = (torch.cat(pair) for pair in zip(data.train, data.test, strict=True))
    pixels, found = ((tensor * scale).round().long() for tensor, scale in zip(both, (255, 1), strict=True))
    number = pixels[:, 0, 0, 0] * 256 + pixels[:, 0, 0, 1]
    assert sorted(number.tolist()) == list(range(1000))
    assert torch.equal(found, number % 10)


def test_restricted_keeps_the_first_five_thousand(tmp_path: Path) -> None:
    images, _ = write_part(tmp_path, "train", 5010, size=(1, 2))
    write_part(tmp_path, "t10k", 10, size=(1, 2))
    data = load("MNIST_RESTRICTED", data_path=str(tmp_path))
    np.testing.assert_allclose(data.train.inputs[:, 0].numpy() * 255, images[:5000], atol=1e-4)
    assert len(data.train.labels) == 5000 and len(data.test.inputs) == 10
    assert data.model == "ToyNet"


def test_fashion_never_reads_digits_by_mistake(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_part(tmp_path / "mnist", "t10k", 10)
    with pytest.raises(DataError, match="F_MNIST: found no"):
        load("F_MNIST", data_path=str(tmp_path))
    write_part(tmp_path / "FashionMNIST/raw", "t10k", 20)
    assert len(load("F_MNIST", data_path=str(tmp_path)).train.inputs) == 18
    assert "same names" not in caplog.text
    # flat, the two cannot be told apart: it says so
    load("F_MNIST", data_path=str(tmp_path / "mnist"))
    assert "those of MNIST have the same names" in caplog.text


def header(*lengths: int, magic: int | None = None) -> bytes:
    return struct.pack(f">I{len(lengths)}I", 0x0800 + len(lengths) if magic is None else magic, *lengths)


GOOD = idx_bytes(TEN[0])
HUGE = header(2**32 - 1, 2**32 - 1, 2**32 - 1) + bytes(100)
MALFORMED: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        lambda path: path.write_bytes(GOOD[:-1]),
        "10 × 4 × 3 = 120 bytes, which a file of 135 cannot contain",
    ),
    "cut in the header": (lambda path: path.write_bytes(GOOD[:9]), "truncated, 5 of 12 bytes"),
    "empty": (lambda path: path.write_bytes(b""), "truncated, 0 of 4 bytes"),
    "too long": (lambda path: path.write_bytes(GOOD + b"x"), "longer than its header says"),
    "wrong magic": (lambda path: path.write_bytes(b"\x89PNG" + GOOD[4:]), "magic number 89504e47"),
    "wrong type": (lambda path: path.write_bytes(header(10, 4, 3, magic=0x0D03) + bytes(480)), "magic number 00000d03"),
    "labels for images": (lambda path: path.write_bytes(idx_bytes(TEN[1])), "1 dimensions .* swapped"),
    "four dimensions": (lambda path: path.write_bytes(idx_bytes(TEN[0][None])), "4 dimensions in its header where 3"),
    "absurd lengths": (lambda path: path.write_bytes(HUGE), "cannot contain"),
    "no images": (lambda path: path.write_bytes(header(0, 28, 28)), "contains no data"),
    "a label too many": (lambda path: path.write_bytes(idx_bytes(digits(9)[0])), "10 labels for 9 images"),
}
MALFORMED_GZIP: dict[str, tuple[bytes, str]] = {
    "not gzipped": (GOOD, "broken gzip file"),
    "gzip cut short": (gzip.compress(GOOD)[:-9], "broken gzip file"),
    "gzip with a wrong checksum": (gzip.compress(GOOD)[:-8] + bytes(8), "broken gzip file"),
    "gzip damaged inside": (gzip.compress(GOOD)[:10] + b"\x07" * 40, "broken gzip file"),
    "truncated inside": (gzip.compress(GOOD[:-1]), "truncated, 119 of 120 bytes"),
    "too long inside": (gzip.compress(GOOD + b"x"), "longer than its header says"),
    "absurd lengths": (gzip.compress(HUGE), "cannot contain"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_named_with_its_fault(tmp_path: Path, case: str) -> None:
    write_part(tmp_path, "t10k", 10)
    damage, message = MALFORMED[case]
    damage(tmp_path / "t10k-images-idx3-ubyte")
    with pytest.raises(DataError, match=message) as caught:
        load("MNIST", data_path=str(tmp_path))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("case", MALFORMED_GZIP)
def test_a_malformed_gzip_file_is_named_with_its_fault(tmp_path: Path, case: str) -> None:
    content, message = MALFORMED_GZIP[case]
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        idx.read(path, 3)
    assert str(path) in str(caught.value)


def test_labels_out_of_range(tmp_path: Path) -> None:
    write_part(tmp_path, "t10k", 10)
    write(tmp_path / "t10k-labels-idx1-ubyte", idx_bytes(np.arange(1, 11)))
    with pytest.raises(DataError, match="label 10 where classes go from 0 to 9"):
        load("MNIST", data_path=str(tmp_path))


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "images", GOOD)

    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(DataError, match="cannot be read .Permission denied."):
        idx.read(path, 3)


@pytest.mark.parametrize(
    ("promised", "held"),
    [((10, 28, 28), 64_000_000), ((9_000, 28, 28), 1_000), ((2**31, 2**31, 4), 64_000_000)],
    ids=["a bomb behind a small header", "little behind a large header", "an absurd header"],
)
def test_memory_is_bounded_by_header_and_content(tmp_path: Path, promised: tuple[int, ...], held: int) -> None:
    body = np.zeros(held, np.uint8).tobytes() if held > 10_000 else np.random.default_rng(0).bytes(held)
    path = write(tmp_path / "images.gz", header(*promised) + body)
    # pad the second case, so that a file of that length could hold what it promises
    path.write_bytes(path.read_bytes() + gzip.compress(b"") * (400 if held == 1_000 else 0))
    tracemalloc.start()
    with pytest.raises(DataError, match="longer than|truncated|cannot contain"):
        idx.read(path, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_500_000


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load("MNIST", data_path=str(tmp_path))
    message = str(caught.value)
    assert "train-images-idx3-ubyte" in message and "download" in message
    assert all(str(tmp_path / folder) in message for folder in ("mnist", "MNIST", "MNIST/raw", ""))
    assert message.count("\n") == 0 and message.endswith(".") and ". " not in message


@pytest.mark.parametrize("absent", ["train-images", "train-labels", "t10k-images", "t10k-labels"])
def test_a_companion_missing_is_no_reason_to_guess(tmp_path: Path, absent: str) -> None:
    for part in ("train", "t10k"):
        write_part(tmp_path, part, 10)
    (file,) = tmp_path.glob(f"{absent}*")
    file.unlink()
    with pytest.raises(DataError, match=f"found no {absent}"):
        load("MNIST", data_path=str(tmp_path))


def test_the_real_digits() -> None:
    folder = real(*T10K_FILES)
    data = load("MNIST", data_path=str(folder))
    assert data.train.inputs.shape == (9000, 1, 28, 28) and data.test.inputs.shape == (1000, 1, 28, 28)
    labels = torch.cat([data.train.labels, data.test.labels])
    assert labels.bincount().tolist() == T10K_LABELS
    mean = torch.cat([data.train.inputs, data.test.inputs]).mean()
    assert abs(mean - 0.1325) < 0.005  # published
    assert data.train.inputs.min() == 0 and data.train.inputs.max() == 1


@pytest.mark.parametrize(("name", "model", "count"), [("D_MNIST", "MLP", 9000), ("MNIST_RESTRICTED", "ToyNet", 5000)])
def test_the_other_names_of_mnist(name: str, model: str, count: int) -> None:
    folder = real(*T10K_FILES)
    whole, data = load("MNIST", data_path=str(folder)), load(name, data_path=str(folder))
    assert (data.name, data.model) == (name, model)
    assert torch.equal(data.train.inputs, whole.train.inputs[:count])
    assert torch.equal(data.test.inputs, whole.test.inputs)
