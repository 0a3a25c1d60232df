"""The attributes that the optimizer and the preconditioner share."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from fisherfn.optim.curvature import Curvature
from fisherfn.state import State
from fisherfn.stats import Layout
from fisherfn.types import Info, PyTree


class WithCurvature:
    """A class with a curvature: its damping, coverage report and state, and the watch."""

    info: Info
    _curvature: Curvature

    @property
    def _all_ok(self) -> bool:
        """True if no check of the last step failed."""
        return bool(torch.stack(list(self.info.ok.values())).all())

    @property
    def damping(self) -> float:
        """The damping λ; a new value takes effect at the next refresh of the inverses."""
        return self._curvature.damping

    @damping.setter
    def damping(self, value: float) -> None:
        self._curvature.damping = value

    @property
    def layout(self) -> Layout:
        """The coverage report, which lists the block of each parameter; it exists after the first batch."""
        return self._curvature.ready().layout

    @property
    def curvature(self) -> State:
        """The pure state, for the functions of `ng`."""
        return self._curvature.state

    def watch(self, inputs: PyTree = None, *, reduction: str = "mean") -> AbstractContextManager[None]:
        """Collect statistics in your own pass: `with opt.watch(): loss = criterion(net(x), y)`.

        Call `loss.backward()` and `opt.step()` afterwards. The statistics are those of the empirical Fisher. Several
        passes before a step (accumulation) count as one batch.

        Args:
            inputs: example inputs, needed before the first batch if the constructor had none.
            reduction: the sum of the losses of all passes before the step is the "mean" over their examples, or the
                "sum" (the gradient is then that of the sum, N times that of the mean).
        """
        return self._curvature.watch(inputs, reduction)
