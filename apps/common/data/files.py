"""Finding files under `data_path`, and reading MATLAB ones. Nothing here unpickles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from common.data.base import DataError

DEFAULT = "data"  # where `data_path=None` looks, relative to the current folder
NUMERIC = {"double", "single", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}


def candidates(data_path: str | None, own: Iterable[str]) -> list[Path]:
    """The folders to look in, in order: the data set's own ones under `data_path`, then `data_path` itself."""
    root = Path(DEFAULT if data_path is None else data_path).expanduser()
    return [*(root / folder for folder in own), root]


def find(folders: Iterable[Path], names: Sequence[str]) -> Path | None:
    """The first file of one of these `names`, or None; an earlier folder wins over an earlier name."""
    return next((path for folder in folders for name in names if (path := folder / name).is_file()), None)


def missing(data: str, file: str, folders: Iterable[Path], remedy: str) -> DataError:
    """The one sentence for a file that is not there: which, where it was looked for, how to get it."""
    return DataError(f"{data}: found no {file} in {', '.join(map(str, folders))}; {remedy}.")


def read_mat(path: Path, shape: tuple[int, int], keys: Sequence[str]) -> np.ndarray:
    """The matrix of this `shape` in a MATLAB 5 file: under one of `keys`, else the only one of that shape.

    The file's table of contents is read first, so that nothing of a wrong size is ever loaded.
    """
    from scipy import io  # a second's import, needed here only

    try:
        contents = {name: (found, kind) for name, found, kind in io.whosmat(str(path))}
        key = _pick(path, contents, shape, keys)
        values = io.loadmat(str(path), variable_names=[key])[key]
    except DataError:
        raise
    except Exception as cause:  # malformed bytes surface as almost any type in scipy, zlib errors included
        raise DataError(f"{path}: cannot be read as a MATLAB 5 file ({cause}); fetch it again.") from cause
    if values.shape != shape or values.dtype.kind not in "fiu" or not np.isfinite(values).all():
        raise DataError(f"{path}: {key!r} should hold finite real numbers {list(shape)}; fetch the file again.")
    return values


def _pick(path: Path, contents: dict[str, tuple], shape: tuple[int, int], keys: Sequence[str]) -> str:
    named = [key for key in keys if key in contents]
    alike = [key for key, (found, _) in contents.items() if found == shape]
    key = named[0] if named else alike[0] if len(alike) == 1 else None
    if key is None or contents[key][0] != shape or contents[key][1] not in NUMERIC:
        found = ", ".join(f"{name} {list(size)} {kind}" for name, (size, kind) in contents.items()) or "nothing"
        wanted = f"a real matrix {' or '.join(map(repr, keys))} {list(shape)}"
        raise DataError(f"{path}: expected {wanted}, found {found}; is this the published file?")
    return key
