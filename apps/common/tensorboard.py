"""A run's metrics as TensorBoard sees them: scalars by training step, in `tensorboard/` of the result folder.

What metrics.jsonl says is the truth: a resumed run writes its event file anew from there, so no step is in it twice.
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
    """The event file of one run, made with its first numbers."""

    def __init__(self, folder: Path, Writer: Any) -> None:
        self._folder, self._Writer, self._written = folder, Writer, 0
        self._writer: Any = None

    def write(self, metrics: Sequence[Mapping[str, float]]) -> None:
        """All epochs so far; those that were written already are not written again."""
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
        """End the file."""
        if self._writer is not None:
            self._writer.close()


class NoBoard:
    """What takes the numbers of a run without TensorBoard."""

    def write(self, metrics: Sequence[Mapping[str, float]]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def opened(wanted: bool, result: Path) -> Board | NoBoard:
    """The board of a result folder.

    Raises:
        MissingPackageError: it is wanted, and the package is not installed.
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
