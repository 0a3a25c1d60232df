"""CIFAR-10 and CIFAR-100 in their published *binary* version; the pickled one could execute code and is not read.

A file is a sequence of records: the label (CIFAR-100: coarse, then fine) in one byte each, then 32×32 pixels of red, of
green and of blue, row by row. The published `.tar.gz` works too: its members are read in place and not
extracted.
"""

from __future__ import annotations

import gzip
import logging
import tarfile
import zlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import fisherfn as ff
from common.data.base import Data, DataError, Split
from common.data.files import candidates, command, find, missing

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
LARGEST = 50_000  # records in the longest published file
PIECE = 1 << 20
AGAIN = "fetch it again"

log = logging.getLogger(__name__)


class Version(NamedTuple):
    """The published form of CIFAR-10 or CIFAR-100."""

    folders: tuple[str, ...]  # the first is the one in the archive
    archive: str
    train: tuple[str, ...]
    test: str
    labels: tuple[int, ...]  # classes of each label byte; the last one is what is learned


TEN = Version(
    ("cifar-10-batches-bin", "cifar10", "CIFAR10", "cifar-10"),
    "cifar-10-binary.tar.gz",
    tuple(f"data_batch_{part}.bin" for part in range(1, 6)),
    "test_batch.bin",
    (10,),
)
HUNDRED = Version(
    ("cifar-100-binary", "cifar100", "CIFAR100", "cifar-100"),
    "cifar-100-binary.tar.gz",
    ("train.bin",),
    "test.bin",
    (20, 100),
)


def load(
    data_path: str | None, seed: int, *, name: str, version: Version, model: str, first: int | None = None
) -> Data:
    """Images [N, 3, 32, 32] in [0, 1] with their (fine) labels, in the published order.

    The files are in one of the version's folders under `data_path`, directly in it, or in its archive there. Of the
    five training files of CIFAR-10 those that are found are used. `first` keeps that many training images.
    """
    del seed  # nothing is random: the split is the published one
    contents = _contents(candidates(data_path, version.folders), name, version)
    parts = [_read(*contents[file], version) for file in version.train if file in contents]
    images, labels = (torch.cat(pieces)[:first] for pieces in zip(*parts, strict=True))
    if len(parts) < len(version.train):
        log.warning(
            "%s: %d of the %d training files found, %d images", name, len(parts), len(version.train), len(images)
        )
    test = _read(*contents[version.test], version)
    return Data(name, Split(images, labels), Split(*test), model, ff.Gaussian(), ff.Categorical())


cifar10 = partial(load, name="CIFAR10", version=TEN, model="cuda_convnet")
cifar100 = partial(load, name="CIFAR100", version=HUNDRED, model="cuda_convnet")
restricted = partial(load, name="CIFAR10_RESTRICTED", version=TEN, model="toyCNN", first=5_000)


def _contents(tried: list[Path], name: str, version: Version) -> dict[str, tuple[str, bytearray]]:
    """Return location and bytes by file name: the files of one folder, else those of the archive."""
    names = [*version.train, version.test]
    path = find(tried, names) or find(tried, [version.archive])
    if path is None:
        files = f"{names[0]} (or its companions) and no {version.archive}"
        raise missing(name, files, tried, f"put the binary version there, or {command(name, 'train_cnn', tried[-1])}")
    if path.name == version.archive:
        contents = _unpacked(path, version)
    else:
        contents = {
            file: (str(path.parent / file), _bytes(path.parent / file)) for file in names if find([path.parent], [file])
        }
    for wanted in ((version.test,), version.train):
        if not any(file in contents for file in wanted):
            raise missing(name, wanted[0], [path if path.name == version.archive else path.parent], "put it there")
    return contents


def _bytes(path: Path) -> bytearray:
    try:
        return bytearray(path.read_bytes())
    except OSError as cause:
        raise DataError(f"{path}: cannot be read ({cause.strerror}); check the file and its permissions.") from cause


def _unpacked(path: Path, version: Version) -> dict[str, tuple[str, bytearray]]:
    """The wanted members of the archive, by exact name; nothing is extracted; links and other members are ignored."""
    wanted = {f"{version.folders[0]}/{file}": file for file in (*version.train, version.test)}
    contents: dict[str, tuple[str, bytearray]] = {}
    try:
        with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                file = wanted.get(member.name)
                if file is None or not member.isfile():
                    continue
                if member.size > LARGEST * _record(version):
                    raise DataError(
                        f"{path}: {member.name} is {member.size:,} bytes, more than was published; {AGAIN}."
                    )
                opened = archive.extractfile(member)
                contents[file] = (f"{path}, {file}", bytearray(opened.read() if opened else b""))
            while stream.read(PIECE):  # read to the end, where gzip verifies its checksum
                pass
    except (tarfile.TarError, OSError, EOFError, zlib.error) as cause:
        raise DataError(f"{path}: broken archive ({cause}); {AGAIN}.") from cause
    return contents


def _record(version: Version) -> int:
    return len(version.labels) + PIXELS


def _read(where: str, content: bytearray, version: Version) -> tuple[Tensor, Tensor]:
    """Decode images in [0, 1] and labels from the bytes of one file."""
    record = _record(version)
    if not content or len(content) % record:
        raise DataError(
            f"{where}: {len(content):,} bytes are no whole number of records of {record}: truncated, or not the binary "
            f"version; {AGAIN}."
        )
    records = torch.frombuffer(content, dtype=torch.uint8).reshape(-1, record)
    for column, count in enumerate(version.labels):
        if (largest := int(records[:, column].max())) >= count:
            raise DataError(
                f"{where}: label {largest} where classes go from 0 to {count - 1}; is this the right version? {AGAIN}."
            )
    skipped = len(version.labels)
    return records[:, skipped:].reshape(-1, *SHAPE).float() / 255, records[:, skipped - 1].long()
