"""Atomic replacement of files, and removal of folders: a reader finds the old state or the new one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from fisherfn.errors import FisherfnError


class WriteError(FisherfnError, OSError):
    """A file that cannot be written, for example because of a full disk or missing permission."""


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    replace(path, lambda file: file.write(text.encode()))


def replace(path: Path, write: Callable[[IO[bytes]], Any], before: Callable[[], None] = lambda: None) -> None:
    """Write a temporary file next to `path`; move it there when it is on the disk and after calling `before`."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        before()
        beside.replace(path)
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}; existing files are unchanged") from error
    finally:
        beside.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Write the entries of the folder to disk; only then is a renamed file safe."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def keep(path: Path, older: Path) -> None:
    """Give the file a second name that replaces an older one; neither is missing at any moment."""
    if path.exists():
        beside = older.with_name(f".{older.name}.{os.getpid()}")
        beside.unlink(missing_ok=True)
        os.link(path, beside)
        beside.replace(older)


def remove_folder(folder: Path, *, last: str) -> None:
    """Remove a folder, and the file that marks it as a whole one last: the mark stays while there is other content."""
    empty_folder(folder, last=last)
    folder.rmdir()


def empty_folder(folder: Path, *, last: str) -> None:
    """Remove all that is in a folder, as `remove_folder`; the folder itself, and a lock on it, stay."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != last:
            entry.unlink()
    (folder / last).unlink(missing_ok=True)
