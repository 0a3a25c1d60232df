"""Files that the data tests write, byte by byte, and the real ones that they try where they are present."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

REAL = Path(__file__).resolve().parents[4] / "shared" / "data"


def real(*names: str) -> Path:
    """The folder of real data, skipping the test where one of these files is not in it."""
    absent = [name for name in names if not (REAL / name).is_file()]
    if absent:
        pytest.skip(f"real data not present: {', '.join(absent)} under {REAL}")
    return REAL


def idx_bytes(array: np.ndarray) -> bytes:
    """The IDX format as published: two zeros, type 8, the number of dimensions, their lengths, the bytes."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write(path: Path, content: bytes) -> Path:
    """Write `content`, gzipped where the name says so, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def digits(count: int, size: tuple[int, int] = (4, 3)) -> tuple[np.ndarray, np.ndarray]:
    """Images that all differ (their first two pixels count), and labels 0 to 9 in turn."""
    images = np.random.default_rng(0).integers(0, 256, (count, *size))
    images[:, 0, 0], images[:, 0, 1] = np.divmod(np.arange(count), 256)
    return images, np.arange(count) % 10


def write_part(folder: Path, part: str, count: int, suffix: str = "", **size: tuple[int, int]) -> tuple:
    """Images and labels of "train" or "t10k" in `folder`; returns the arrays."""
    images, labels = digits(count, **size)
    write(folder / f"{part}-images-idx3-ubyte{suffix}", idx_bytes(images))
    write(folder / f"{part}-labels-idx1-ubyte{suffix}", idx_bytes(labels))
    return images, labels
