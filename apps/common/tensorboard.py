"""Metrics of a run for TensorBoard: scalars by training step, in `tensorboard/` of the result folder.

metrics.jsonl is the source: a resumed run rewrites its event file from there, so no step appears twice.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fisherfn.errors import MissingPackageError

FOLDER = "tensorboard"


class Board:
    """The event file of one run, created with its first numbers."""

    def __init__(self, folder: Path, Writer: Any) -> None:
        self._folder, self._Writer, self._written = folder, Writer, 0
        self._writer: Any = None

    def write(self, metrics: Sequence[Mapping[str, float]]) -> None:
        """Write all epochs so far that were not written yet."""
        if self._writer is None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._writer = self._Writer(self._folder)
        for epoch in metrics[self._written :]:
            for name, value in epoch.items():
                if name != "step" and math.isfinite(value):
                    self._writer.add_scalar(name, value, int(epoch["step"]))
        self._written = len(metrics)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


class NoBoard:
    """A replacement for runs without TensorBoard, which discards the numbers."""

    def write(self, metrics: Sequence[Mapping[str, float]]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def opened(wanted: bool, result: Path) -> Board | NoBoard:
    """Open the board of a result folder.

    Raises:
        MissingPackageError: the package is not installed.
    """
    if not wanted:
        return NoBoard()
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingPackageError(
            "--tensorboard needs the package tensorboard: pip install tensorboard (or fisherfn[tensorboard])"
        ) from error
    return Board(result / FOLDER, SummaryWriter)
