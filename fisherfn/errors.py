"""Typed errors: each states what happened, where, the likely cause and the fix. See `check` for masks."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from fisherfn import masked
from fisherfn.types import Info


class FisherfnError(Exception):
    """Base of every error that this library raises on purpose."""


class ShapeError(FisherfnError, ValueError):
    """A tensor's shape or type does not fit what the build traced."""


class EmptyBatchError(ShapeError):
    """The batch has no examples, so its mean does not exist."""


class StructureError(FisherfnError, ValueError):
    """The names of a tree differ from those of the parameters, or calls were made in the wrong order."""


class UnusedParameterError(StructureError):
    """The model's outputs do not depend on a parameter."""


class HyperparameterError(FisherfnError, ValueError):
    """A hyperparameter is outside its range."""


class UnknownNameError(FisherfnError, ValueError):
    """A method, Fisher, block or option has an unknown name."""


class NoiseError(FisherfnError, ValueError):
    """Random numbers are needed and no generator was given: the global generator is never used."""


class CoverageError(FisherfnError, ValueError):
    """The per-example gradients of a parameter cannot be computed, not even by the fallback."""


class ModelError(FisherfnError, RuntimeError):
    """The model does something that torch's function transforms cannot follow."""


class TooLargeError(FisherfnError, ValueError):
    """A dense computation would exceed the size limit."""


class MissingPackageError(FisherfnError, ImportError):
    """A package that this call needs is not installed."""


class LikelihoodError(FisherfnError, TypeError):
    """The likelihood lacks a method that this Fisher needs, or couples the examples of different chunks."""


class TargetError(FisherfnError, ValueError):
    """Targets have the wrong type, or are outside the likelihood's range."""


class RankError(FisherfnError, RuntimeError):
    """The ranks of a data-parallel run disagree, or one of them does not answer. Every rank raises it."""


class NonFiniteError(FisherfnError, ArithmeticError):
    """Inputs, loss, statistics or step contain NaN or infinity."""


class NotPositiveDefiniteError(FisherfnError, ArithmeticError):
    """A factor could not be factorised at this damping."""


def expect(value: object, kind: type | tuple[type, ...], what: str, remedy: str) -> None:
    """Raise `StructureError` unless an argument has the expected type."""
    if not isinstance(value, kind):
        raise StructureError(f"{what} cannot be {type(value).__name__}: {remedy}.")


def expect_number(name: str, value: object, holds: Callable[[Any], bool], rule: str, *, whole: bool = False) -> None:
    """Raise `HyperparameterError` unless a value is one finite number that satisfies a rule.

    A tensor must have no dimensions. Its value is read where that is possible and does not wait for a GPU; under vmap
    and in a trace it is not, and `info.ok` reports an invalid one.
    """
    number = value
    if isinstance(value, Tensor):
        if value.ndim:
            raise HyperparameterError(
                f"{name} must be one number, got a tensor of shape {tuple(value.shape)}: use torch.vmap for several."
            )
        if not masked.readable(value):
            return
        number = value.item()
    kind = numbers.Integral if whole else numbers.Real
    if isinstance(number, bool) or not isinstance(number, kind) or not math.isfinite(number) or not holds(number):
        raise HyperparameterError(f"{name} {rule}, got {value!r}.")


def expect_count(name: str, value: object, least: int = 1) -> None:
    """Raise `HyperparameterError` unless a value is a whole number of at least `least`."""
    expect_number(name, value, lambda v: v >= least, f"must be a whole number >= {least}", whole=True)


def expect_positive(name: str, value: object) -> None:
    """Raise `HyperparameterError` unless a number is positive; see `expect_number`."""
    expect_number(name, value, lambda v: v > 0, "must be positive")


def unknown(what: str, name: object, known: Iterable[str]) -> UnknownNameError:
    """Return the error for an unknown `name`, with the closest of the `known` names."""
    names = list(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return UnknownNameError(f"unknown {what} {name!r}{hint} Known: {', '.join(names)}")


BATCH_CHECKS: dict[str, tuple[type[FisherfnError], str]] = {
    "inputs": (NonFiniteError, "the batch's inputs contain NaN or infinity; clean the data, or skip this batch"),
    "targets": (
        TargetError,
        "targets are outside the likelihood's range (class indices run from 0 to C-1 and their logit is not minus "
        "infinity, probabilities and weights are >= 0, Bernoulli targets from 0 to 1, all finite, and weights are not "
        "all 0); check labels, masks of the outputs, and their width. Bernoulli(logits=False) needs outputs from 0 to "
        "1: end with a sigmoid, or pass logits=True",
    ),
    "chunks": (
        LikelihoodError,
        "the loss of an example in its chunk differs from that in the whole batch: the likelihood couples the examples "
        "(a contrastive loss, or a mean inside nll), so chunks would give a different gradient. Leave out chunk_size",
    ),
    "loss": (
        NonFiniteError,
        "the loss is NaN or infinite although inputs and targets are valid: the context or the parameters contain NaN "
        "or infinity, perhaps because the parameters have diverged (lower the learning rate or the KL bound, or raise "
        "the damping, and continue from an earlier state), or the model or the likelihood overflows on this batch "
        "(exp, a division, the log of 0)",
    ),
    "gradient": (
        NonFiniteError,
        "the gradient is NaN or infinite although the loss is finite: a derivative overflows, or a root or norm is "
        "differentiated at zero; lower the learning rate, or avoid such values in the model",
    ),
}
BLOCK_CHECKS: dict[str, tuple[type[FisherfnError], str]] = {
    "statistics": (
        NonFiniteError,
        "the averaged curvature statistics are not finite: either activations or output-gradients overflow (check the "
        "scale of this layer's inputs, or run the model in float32), or ema or the weight of the update is outside its "
        "range",
    ),
    "factorisation": (
        NotPositiveDefiniteError,
        "the damped factors could not be inverted; raise the damping (it must be positive)",
    ),
    "step": (
        NonFiniteError,
        "the preconditioned gradient is not finite; raise the damping or lower the KL bound",
    ),
}


def check(info: Info) -> None:
    """Raise the typed error for a false mask in `info`; do nothing if all masks are true.

    The call reads tensor values, which synchronises with a GPU, so call it only as often as you need to know. For a
    vmapped `info` the message lists the members concerned. The state returned with a false mask is the input state.

    Raises:
        NonFiniteError: NaN or infinity in inputs, loss, statistics or step.
        TargetError: targets outside the likelihood's range.
        NotPositiveDefiniteError: a factorisation failed.
    """
    expect(info, Info, "info", "pass the last value that ng.step, ng.update or ng.invert returned")
    for name, (error, text) in BATCH_CHECKS.items():
        if name in info.checks and not _all(info.checks[name]):
            raise error(f"{text}{_members(info.checks[name])}. The state is unchanged.")
    for name, (error, text) in BLOCK_CHECKS.items():
        bad = {key: ok for key, ok in info.checks.get(name, {}).items() if not _all(ok)}
        if bad:
            blocks = ", ".join(f"{key!r}{_members(ok)}" for key, ok in bad.items())
            raise error(f"block {blocks}: {text}. The state is unchanged.")


def _all(mask: Any) -> bool:
    return bool(mask.all()) if isinstance(mask, Tensor) else bool(mask)


def _members(mask: Any) -> str:
    if not isinstance(mask, Tensor) or mask.ndim == 0:
        return ""
    bad = (~mask).nonzero().flatten().tolist()
    return f" (members {', '.join(map(str, bad[:8]))}{', …' if len(bad) > 8 else ''} of {mask.shape[0]})"
