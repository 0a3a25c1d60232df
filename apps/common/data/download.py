"""Download published files and verify their published checksums. Nothing is overwritten."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from common.data import cifar, faces, idx, svhn
from common.data.base import DataError
from common.data.files import candidates, find


class File(NamedTuple):
    """A published file."""

    name: str
    url: str
    checksum: str  # "md5:…" or "sha256:…"
    stand_ins: tuple[str, ...]  # not fetched if any of these is present


class Source(NamedTuple):
    """The files of a data set and their folders, the preferred one first."""

    folders: tuple[str, ...]
    files: tuple[File, ...]


def _idx(folders: tuple[str, ...], host: str, checksums: Mapping[str, str]) -> Source:
    def file(part: str, md5: str) -> File:
        name = idx.variants(part)[2]  # "train-images-idx3-ubyte.gz"
        return File(name, host + name, f"md5:{md5}", tuple(idx.variants(part)))

    return Source(folders, tuple(file(part, md5) for part, md5 in checksums.items()))


MNIST = _idx(
    idx.MNIST_FOLDERS,
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    {
        "train-images": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels": "ec29112dd5afa0611ce80d1b7f02629c",
    },
)
FASHION = _idx(
    idx.FASHION_FOLDERS,
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    {
        "train-images": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels": "bb300cfdad3c16e7a12a480ee83cd310",
    },
)
# the URL and checksum that scikit-learn publishes for its own copy
OLIVETTI = File(
    faces.PHOTOS,
    "https://ndownloader.figshare.com/files/5976027",
    "sha256:b612fb967f2dc77c9c62d3e1266e0c73d5fca46a4b8906c18e454d41af987794",
    (faces.PUBLISHED, faces.PHOTOS),
)


def _cifar(version: cifar.Version, md5: str) -> Source:
    # the checksums are those of the publisher's page
    url = f"https://www.cs.toronto.edu/~kriz/{version.archive}"
    return Source(version.folders, (File(version.archive, url, f"md5:{md5}", (version.archive, *version.train)),))


CIFAR10 = _cifar(cifar.TEN, "c32a1d4ab5d03f1284b67883e8d87530")
CIFAR100 = _cifar(cifar.HUNDRED, "03b5dce01913d631647c71ecec9e9cb8")
# the checksums that torchvision publishes
SVHN = Source(
    svhn.FOLDERS,
    tuple(
        File(name, f"http://ufldl.stanford.edu/housenumbers/{name}", f"md5:{md5}", (name,))
        for name, md5 in (
            (svhn.TRAIN, "e26dedcc434d2e4c54c9b2d4a06d8373"),
            (svhn.TEST, "eb5a983be6a315427106f1b164d9cef3"),
        )
    ),
)

SOURCES: dict[str, Source] = {
    "CURVES": Source((), ()),  # generated, and DIGITS is part of scikit-learn: nothing to fetch
    "DIGITS": Source((), ()),
    "MNIST": MNIST,
    "FACES": Source(faces.FOLDERS, (OLIVETTI,)),
    "F_MNIST": FASHION,
    "D_MNIST": MNIST,
    "MNIST_RESTRICTED": MNIST,
    "CIFAR10": CIFAR10,
    "CIFAR100": CIFAR100,
    "CIFAR10_RESTRICTED": CIFAR10,
    "SVHN": SVHN,
}


def fetch(name: str, data_path: str | None) -> None:
    """Fetch the missing files of `name`, next to those that are present, else into its own folder."""
    if name not in SOURCES:
        raise DataError(f"{name}: knows no files to download; only {', '.join(SOURCES)} do.")
    source = SOURCES[name]
    tried = candidates(data_path, source.folders)
    present = find(tried, [alike for file in source.files for alike in file.stand_ins])
    folder = present.parent if present else tried[0]
    for file in source.files:
        if find([folder], file.stand_ins) is None:
            _retrieve(file, folder)


def _retrieve(file: File, folder: Path) -> None:
    import pooch  # optional: only needed for downloads

    try:
        pooch.retrieve(file.url, known_hash=file.checksum, fname=file.name, path=folder)
    except (OSError, ValueError) as cause:  # requests' errors are OSErrors, a wrong checksum is a ValueError
        remedy = f"try again, or put the file there yourself ({file.checksum})"
        raise DataError(f"{file.name}: not fetched from {file.url} into {folder} ({cause}); {remedy}.") from cause
