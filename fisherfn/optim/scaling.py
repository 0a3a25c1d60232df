"""Gradients of a scaled loss: unscaled once per step, and the same overflow on all ranks."""

from __future__ import annotations

from typing import Any

import torch

from fisherfn.errors import StructureError
from fisherfn.optim.ranks import anywhere


class Scaling:
    """A gradient scaler, or none."""

    def __init__(self, scaler: torch.amp.GradScaler | None) -> None:
        if scaler is not None and not hasattr(scaler, "unscale_"):
            raise StructureError(f"scaler must be a torch.amp.GradScaler or None, got {scaler!r}.")
        self._scaler = scaler
        self._last: Any = None

    @property
    def factor(self) -> float:
        """Return the factor of a loss that the scaler scales now."""
        return 1.0 if self._scaler is None else float(self._scaler.get_scale())

    def overflowed(self, optimizer: torch.optim.Optimizer | None) -> bool:
        """Unscale the gradients of an optimizer, unless the caller has done so; return True if one overflowed.

        In several processes, an overflow on one rank counts on all, because their scalers must skip the same steps.

        Raises:
            StructureError: the loss was not scaled, or the scaler was not updated after the last step.
        """
        if self._scaler is None or optimizer is None or not self._scaler.is_enabled():
            return False
        while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = inner  # a wrapper: the scaler knows the inner optimizer
        try:
            self._scaler.unscale_(optimizer)
        except (RuntimeError, AssertionError) as error:
            if "already been called" not in str(error):
                raise StructureError(
                    f"{error} Take this step between backward() of the scaled loss and scaler.step()."
                ) from error
        flags = self._scaler._found_inf_per_device(optimizer)  # the scaler skips the step, and lowers its scale, by it
        if flags and flags is self._last:
            raise StructureError(
                "the scaler was not updated since the last step, so the new gradients cannot be unscaled: call "
                "scaler.update() after each step."
            )
        self._last = flags
        found = anywhere(any(bool(flag) for flag in flags.values()))
        for flag in flags.values():
            flag.fill_(float(found))
        return found
