"""IDX files: MNIST and data sets in the same format.

An IDX file is big-endian: two zero bytes, a type (8: unsigned bytes), the number of dimensions, each dimension's
length as 32 bits, then the bytes. The header is not trusted: its lengths are compared with the size of the file before
anything is read.
"""

from __future__ import annotations

import gzip
import io
import logging
import math
import struct
import zlib
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

import fisherfn as ff
from common.data.base import Data, DataError, Split
from common.data.files import candidates, command, find, missing

MNIST_FOLDERS = ("mnist", "MNIST/raw", "MNIST")
FASHION_FOLDERS = ("fashion", "FashionMNIST/raw", "FashionMNIST", "fashion-mnist", "fashion_mnist")
CLASSES = 10
TRAINER = "train_mlp"  # it takes all these data sets
DEFLATE_LIMIT = 1_032  # zlib: deflate never shrinks more than this many times
PIECE = 1 << 20
AGAIN = "fetch it again"

Pair: TypeAlias = tuple[Tensor, Tensor]  # images [N, 1, H, W] and labels [N]

log = logging.getLogger(__name__)


def load(
    data_path: str | None, seed: int, *, name: str, model: str, folders: tuple[str, ...], first: int | None = None
) -> Data:
    """Images [N, 1, H, W] in [0, 1] with labels 0 to 9 from the four usual files, gzipped or not, `-idx` or `.idx`.

    They are in one of `folders` under `data_path`, or directly in it. If only the `t10k` files are found, nine tenths
    of them, chosen by `seed`, are used for training. `first` keeps that many training images.
    """
    tried = candidates(data_path, folders)
    folder = _home(tried, name)
    if folder == tried[-1] and folders is FASHION_FOLDERS:
        log.warning(
            "%s: files read directly from %s; those of MNIST have the same names: make sure that these are not MNIST",
            name,
            folder,
        )
    if find([folder], [*variants("train-images"), *variants("train-labels")]):
        train, test = read_part(folder, "train", name), read_part(folder, "t10k", name)
    else:
        train, test = _divide(*read_part(folder, "t10k", name), seed)
        counts = f"{len(train[0]):,} for training and {len(test[0]):,} for testing"
        log.warning("%s: no train-* files in %s; the t10k images are split, %s", name, folder, counts)
    images, labels = (part[:first] for part in train)
    return Data(name, Split(images, labels), Split(*test), model, ff.Bernoulli(), ff.Categorical())


mnist = partial(load, name="MNIST", model="AE_MNIST", folders=MNIST_FOLDERS)
fashion = partial(load, name="F_MNIST", model="DeepLinear", folders=FASHION_FOLDERS)
deep_mnist = partial(load, name="D_MNIST", model="MLP", folders=MNIST_FOLDERS)
restricted = partial(load, name="MNIST_RESTRICTED", model="ToyNet", folders=MNIST_FOLDERS, first=5_000)


def variants(part: str) -> list[str]:
    """Return the possible names of the file of `part`, such as "train-images"."""
    kind = "idx3" if part.endswith("images") else "idx1"
    return [f"{part}{separator}{kind}-ubyte{suffix}" for suffix in ("", ".gz") for separator in "-."]


def read_part(folder: Path, part: str, name: str) -> Pair:
    """Read the images and labels of "train" or "t10k" in `folder`."""
    paths = []
    for file in (f"{part}-images", f"{part}-labels"):
        path = find([folder], variants(file))
        if path is None:
            remedy = f"put it next to the others, or {command(name, TRAINER, folder)}"
            raise missing(name, f"{variants(file)[0]}[.gz]", [folder], remedy)
        paths.append(path)
    images, labels = read(paths[0], 3), read(paths[1], 1)
    if len(images) != len(labels):
        raise DataError(f"{paths[1]}: {len(labels)} labels for {len(images)} images in {paths[0].name}; {AGAIN}.")
    if labels.max() >= CLASSES:
        raise DataError(f"{paths[1]}: label {int(labels.max())} where classes go from 0 to {CLASSES - 1}; {AGAIN}.")
    return images.unsqueeze(1).float() / 255, labels.long()


def read(path: Path, dimensions: int) -> Tensor:
    """Read the bytes of an IDX file as a uint8 tensor with this number of dimensions."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            lengths = _header(file, path, dimensions)
            body = _exactly(file, math.prod(lengths), path)
            # reading past the end makes gzip verify its checksum
            if file.read(1):
                raise DataError(f"{path}: longer than its header says ({_shape(lengths)}); {AGAIN}.")
    except (EOFError, gzip.BadGzipFile, zlib.error) as cause:
        raise DataError(f"{path}: broken gzip file ({cause}); {AGAIN}.") from cause
    except OSError as cause:
        raise DataError(
            f"{path}: cannot be read ({cause.strerror or cause}); check the file and its permissions."
        ) from cause
    return torch.frombuffer(body, dtype=torch.uint8).reshape(lengths)


def _header(file: io.BufferedIOBase, path: Path, dimensions: int) -> tuple[int, ...]:
    zeros, kind, found = struct.unpack(">HBB", _exactly(file, 4, path))
    if (zeros, kind) != (0, 8):
        magic = f"{zeros:04x}{kind:02x}{found:02x}"
        raise DataError(
            f"{path}: magic number {magic}, not 0000080{dimensions}: not an IDX file of unsigned bytes; {AGAIN}."
        )
    if found != dimensions:
        swapped = "; are images and labels swapped?" if {found, dimensions} == {1, 3} else f"; {AGAIN}."
        raise DataError(f"{path}: {found} dimensions in its header where {dimensions} are expected{swapped}")
    lengths = struct.unpack(f">{dimensions}I", _exactly(file, 4 * dimensions, path))
    _believable(path, lengths)
    return lengths


def _believable(path: Path, lengths: tuple[int, ...]) -> None:
    # before any memory is asked for: can a file of this length hold that many bytes?
    promised, length = math.prod(lengths), path.stat().st_size
    if promised == 0:
        raise DataError(f"{path}: contains no data ({_shape(lengths)}); {AGAIN}.")
    header = 4 + 4 * len(lengths)
    gzipped = path.suffix == ".gz"
    if promised + header > (DEFLATE_LIMIT * length if gzipped else length):
        fault = f"the header states {_shape(lengths)} = {promised:,} bytes, which a file of {length:,} cannot contain"
        raise DataError(f"{path}: {fault}: truncated or damaged; {AGAIN}.")


def _exactly(file: io.BufferedIOBase, count: int, path: Path) -> bytearray:
    # piece by piece: memory is limited by the actual contents, and by the size in the header
    body = bytearray()
    while len(body) < count:
        piece = file.read(min(PIECE, count - len(body)))
        if not piece:
            raise DataError(f"{path}: truncated, {len(body):,} of {count:,} bytes; {AGAIN}.")
        body += piece
    return body


def _home(tried: list[Path], name: str) -> Path:
    # one folder for all four files, so that data sets with equal file names are not mixed
    names = [file for part in ("train", "t10k") for kind in ("images", "labels") for file in variants(f"{part}-{kind}")]
    path = find(tried, names)
    if path is None:
        files = "train-images-idx3-ubyte[.gz] (or its three companions)"
        raise missing(name, files, tried, f"put the four IDX files there, or {command(name, TRAINER, tried[-1])}")
    return path.parent


def _divide(images: Tensor, labels: Tensor, seed: int) -> tuple[Pair, Pair]:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = order.tensor_split([len(order) * 9 // 10])
    return (images[train], labels[train]), (images[test], labels[test])


def _shape(lengths: tuple[int, ...]) -> str:
    return " × ".join(map(str, lengths))
