"""The options of a curvature, which the optimizer and the preconditioner share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from fisherfn.adapt import Cadence
from fisherfn.base import Method
from fisherfn.compiled import compile
from fisherfn.errors import HyperparameterError, expect_number, unknown
from fisherfn.methods import named
from fisherfn.natgrad import NaturalGradient, natural_gradient
from fisherfn.stats import FISHERS
from fisherfn.types import Model, PyTree, Tree

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Options:
    """The options of a curvature, checked; `fisherfn.optim.NaturalGradient` documents them.

    The public classes name them one by one in their signatures, where editors and `help` show them with their defaults.

    Raises:
        HyperparameterError: a number outside its range.
        UnknownNameError: no method or Fisher has this name.
    """

    likelihood: Any
    method: Method | str
    damping: float | str
    ema: float
    update_every: int | None
    invert_every: int | None
    fisher: str
    samples: int
    chunk_size: int | None
    generator: torch.Generator | int
    scaler: torch.amp.GradScaler | None
    uncovered: str = "fallback"
    compile: bool | dict[str, Any] = False

    def __post_init__(self) -> None:
        """Check the options, as far as possible without the net."""
        named(self.method)  # raises
        if self.fisher not in FISHERS:
            raise unknown("fisher", self.fisher, FISHERS)
        if self.uncovered not in ("fallback", "gradient"):
            raise unknown("uncovered", self.uncovered, ("fallback", "gradient"))
        if not isinstance(self.compile, (bool, dict)):
            raise HyperparameterError(f"compile is True, False or options of torch.compile, got {self.compile!r}.")
        if isinstance(self.damping, str) and self.damping != "auto":
            raise HyperparameterError(f'damping is a number or "auto", got {self.damping!r}.')
        if not isinstance(self.damping, str):
            expect_number("damping", self.damping, lambda v: v >= 0, "must be >= 0")
        expect_number("ema", self.ema, lambda v: 0 <= v < 1, "must lie in [0, 1)")
        for name in ("update_every", "invert_every"):
            every = getattr(self, name)
            if every is not None:
                expect_number(name, every, lambda v: v >= 1, "must be a whole number of steps >= 1", whole=True)
        if isinstance(self.generator, bool) or not isinstance(self.generator, (int, torch.Generator)):
            raise HyperparameterError(f"generator is a seed or a torch.Generator, got {self.generator!r}.")

    def build(self, model: Model, params: Tree, x: PyTree, context: Tree) -> NaturalGradient:
        """Build the natural gradient of a model."""
        return natural_gradient(
            model, params, x, likelihood=self.likelihood, method=self.method, fisher=self.fisher, samples=self.samples,
            context=context, unused="ignore", uncovered=self.uncovered,
        )  # fmt: skip

    def cadence(self, default: Cadence) -> Cadence:
        """Return the given intervals, and those of `default` for the others."""
        update, invert = self.update_every, self.invert_every
        return Cadence(
            default.update if update is None else (update, update),
            default.invert if invert is None else (invert, invert),
        )

    def compiled(self, step: F) -> F:
        """Return a step, compiled if so chosen."""
        if not self.compile:
            return step
        return compile(step, **(self.compile if isinstance(self.compile, dict) else {}))  # type: ignore[return-value]

    def random(self) -> torch.Generator:
        """Return the given generator, or a new one with the given seed."""
        if isinstance(self.generator, torch.Generator):
            return self.generator
        return torch.Generator().manual_seed(self.generator)
