"""Checkpoints: tensors by path and a few facts, as one file that no reader needs to trust."""

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
"""Of the format; raised when an older reader would misread a newer file."""

log = logging.getLogger(__name__)


class CheckpointError(FisherfnError, ValueError):
    """A checkpoint that is not there, not whole, or of another format."""


class DamagedError(CheckpointError):
    """A checkpoint that is not whole."""


def save_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], kept: Sequence[Path] = ()
) -> None:
    """Write tensors by path and JSON-able facts as one file, in one step; files before it are kept as `kept`."""
    # a clone, because a view would be saved with all of the storage it looks into
    own = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    content = {"version": VERSION, "meta": json.dumps(dict(meta)), "tensors": own}

    def keep() -> None:
        for newer, older in reversed(list(itertools.pairwise((path, *kept)))):
            atomic.keep(newer, older)

    # by way of memory: on a full disk torch's writer fails with an error that does not say so
    whole = io.BytesIO()
    torch.save(content, whole)
    atomic.replace(path, lambda file: file.write(whole.getbuffer()), before=keep)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_checkpoint` wrote, tensors on the CPU. Nothing in the file is executed.

    Raises:
        CheckpointError: the file is missing, cut short, something else, or of another version.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}") from None
    except Exception as error:  # malformed bytes surface as almost any type
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
    """The first of these checkpoints that is whole; a warning says what was passed over.

    Raises:
        CheckpointError: none of them is, or one is of another version.
    """
    for path, before in itertools.pairwise(paths):
        try:
            return load_checkpoint(path)
        except DamagedError:
            if not before.exists():
                raise
            log.warning("%s is damaged: going on from the one before, %s", path, before.name)
    return load_checkpoint(paths[-1])
