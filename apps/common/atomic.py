"""Files that are replaced in one step: whoever reads finds the old file or the new one, never half of one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from fisherfn.errors import FisherfnError


class WriteError(FisherfnError, OSError):
    """A file that cannot be written: a full disk, a folder without permission."""


def replace_text(path: Path, text: str) -> None:
    """Write a text file, in one step."""
    replace(path, lambda file: file.write(text.encode()))


def replace(path: Path, write: Callable[[IO[bytes]], Any], before: Callable[[], None] = lambda: None) -> None:
    """Write a file beside `path` and move it there once it is on the disk and `before` has been called."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        before()
        beside.replace(path)
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}; what was there is as it was") from error
    finally:
        beside.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Put the folder's entries on the disk: a renamed file is safe only then."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def keep(path: Path, older: Path) -> None:
    """A second name for the file, in the place of an older one; at no moment is either missing."""
    if path.exists():
        beside = older.with_name(f".{older.name}.{os.getpid()}")
        beside.unlink(missing_ok=True)
        os.link(path, beside)
        beside.replace(older)
