"""Find files under `data_path`, and read MATLAB files. Nothing is unpickled."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from common.data.base import DataError

DEFAULT = "data"  # where `data_path=None` looks, relative to the current folder
Shape: TypeAlias = tuple[int | None, ...]  # None: any length
NUMERIC = {"double", "single", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}


READER = """
import json, sys
import numpy
from scipy import io

path, out = sys.argv[1:]
print(json.dumps(io.whosmat(path)), flush=True)
key = sys.stdin.readline().rstrip("\\n")
numpy.save(out, io.loadmat(path, variable_names=[key])[key], allow_pickle=False)
"""
"""Program that prints a MATLAB file's table of contents, reads a name, and saves the array with this name."""


def candidates(data_path: str | None, own: Iterable[str]) -> list[Path]:
    """Return the folders to search, in order: those of the data set under `data_path`, then `data_path`."""
    root = Path(DEFAULT if data_path is None else data_path).expanduser()
    return [*(root / folder for folder in own), root]


def find(folders: Iterable[Path], names: Sequence[str]) -> Path | None:
    """Return the first file with one of these `names`, or None; folder order has priority over name order."""
    return next((path for folder in folders for name in names if (path := folder / name).is_file()), None)


def missing(data: str, file: str, folders: Iterable[Path], remedy: str) -> DataError:
    """Return the message for a missing file: its name, the searched folders, and how to get it."""
    return DataError(f"{data}: found no {file} in {', '.join(map(str, folders))}; {remedy}.")


def command(data: str, trainer: str, folder: Path) -> str:
    """Return the command that fetches the published files of a data set into a folder that was searched."""
    return f"fetch them with `python apps/{trainer}.py --data {data} --data_path {folder} --download`"


def read_mat(path: Path, shape: Shape, keys: Sequence[str]) -> np.ndarray:
    """Read the array of this `shape` in a MATLAB 5 file: one of `keys`, else the only one with this shape.

    The table of contents is read first, so that no array of a wrong size is loaded. A separate process reads the file,
    because some malformed files crash scipy's reader.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "values.npy"
        with subprocess.Popen(
            [sys.executable, "-c", READER, str(path), str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        ) as reader:  # fmt: skip
            try:
                assert reader.stdin is not None and reader.stdout is not None
                line = reader.stdout.readline()
                contents = json.loads(line) if line.endswith("\n") else None  # else it ended in the middle of it
                key = "" if contents is None else _pick(path, {n: (tuple(s), k) for n, s, k in contents}, shape, keys)
                _, errors = reader.communicate(key + "\n")
            finally:
                reader.kill()
        if contents is None or reader.returncode != 0:
            cause = errors.strip().splitlines()[-1] if errors.strip() else f"the reader ended with {reader.returncode}"
            raise DataError(f"{path}: cannot be read as a MATLAB 5 file ({cause}); fetch it again.")
        values: np.ndarray = np.load(out, allow_pickle=False)
    if not _fits(values.shape, shape) or values.dtype.kind not in "fiu" or not np.isfinite(values).all():
        raise DataError(f"{path}: {key!r} should contain finite real numbers {_shown(shape)}; fetch the file again.")
    return values


def _fits(found: tuple[int, ...], shape: Shape) -> bool:
    return len(found) == len(shape) and all(want in (None, have) for have, want in zip(found, shape, strict=True))


def _shown(shape: Shape) -> str:
    return f"[{', '.join('N' if length is None else str(length) for length in shape)}]"


def _pick(path: Path, contents: dict[str, tuple], shape: Shape, keys: Sequence[str]) -> str:
    named = [key for key in keys if key in contents]
    alike = [key for key, (found, _) in contents.items() if _fits(found, shape)]
    key = named[0] if named else alike[0] if len(alike) == 1 else None
    if key is None or not _fits(contents[key][0], shape) or contents[key][1] not in NUMERIC:
        found = ", ".join(f"{name} {list(size)} {kind}" for name, (size, kind) in contents.items()) or "nothing"
        wanted = f"a real array {' or '.join(map(repr, keys))} {_shown(shape)}"
        raise DataError(f"{path}: expected {wanted}, found {found}; is this the published file?")
    return key
