"""Checkpoints: tensors by path and some metadata in one file, which can be read safely."""

from __future__ import annotations

import io
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import atomic
from fisherfn.errors import FisherfnError

VERSION = 2
"""Version of the format; increased when an older reader would misread a newer file."""

log = logging.getLogger(__name__)


class CheckpointError(FisherfnError, ValueError):
    """A checkpoint that is missing, damaged, or has another format."""


class DamagedError(CheckpointError):
    """A damaged checkpoint."""


def save_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], kept: Sequence[Path] = ()
) -> None:
    """Write tensors by path and JSON metadata atomically as one file; older files are kept as `kept`."""
    # a clone, because a view would be saved with its whole storage
    own = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    content = {"version": VERSION, "meta": json.dumps(dict(meta)), "tensors": own}

    def keep() -> None:
        for newer, older in reversed(list(itertools.pairwise((path, *kept)))):
            atomic.keep(newer, older)

    # through memory: on a full disk, torch's writer fails with an unclear error
    whole = io.BytesIO()
    torch.save(content, whole)
    atomic.replace(path, lambda file: file.write(whole.getbuffer()), before=keep)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of `save_checkpoint`, with tensors on the CPU. Nothing in the file is executed.

    Raises:
        CheckpointError: the file is missing, truncated, not a checkpoint, or of another version.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}") from None
    except Exception as error:  # malformed bytes can raise almost any exception
        raise _damaged(path) from error
    if not isinstance(content, dict) or content.get("version") != VERSION:
        found = content.get("version") if isinstance(content, dict) else None
        raise CheckpointError(f"{path} has format version {found}, this program reads version {VERSION}")
    try:
        tensors, meta = content["tensors"], json.loads(content["meta"])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise _damaged(path)
    return tensors, meta


def _damaged(path: Path) -> DamagedError:
    return DamagedError(f"{path} is damaged or no checkpoint; start again with --overwrite")


def first_sound(paths: Sequence[Path]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the first valid checkpoint; a warning names those that were skipped.

    Raises:
        CheckpointError: none is valid, or one has another version.
    """
    for path, before in itertools.pairwise(paths):
        try:
            return load_checkpoint(path)
        except DamagedError:
            if not before.exists():
                raise
            log.warning("%s is damaged: going on from the one before, %s", path, before.name)
    return load_checkpoint(paths[-1])
