r"""Dropout whose noise is an argument: $x \odot m / (1 - p)$, with the mask $m$ computed from a seed for each example.

One seed per example, drawn by the caller's generator, is all the noise of a step: entry j of example n in the c-th
dropout of the net is kept where a hash of (seed n, c, j), uniform in [0, 1), is at least p. So an example keeps its
masks in a chunk, on another rank and in a vmapped member, and a resumed run draws what the straight one drew.

Numbers that a model draws by itself (`bernoulli_`, `rand`, `randn` and their like, as stochastic depth does) are made
from the same seeds. The examples may be on any axis; which one is found by `Sizes`, from runs of two and of three
examples.

The hash is the 32-bit permuted congruential generator of O'Neill 2014, whose arithmetic fits 64-bit integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from fisherfn.calls import bind
from fisherfn.decompositions import Elementary
from fisherfn.errors import NoiseError, ShapeError
from fisherfn.randomness import random_numbers

_ENTRIES, _CHANNELS = {F.dropout, F.alpha_dropout}, {F.dropout1d, F.dropout2d, F.dropout3d, F.feature_alpha_dropout}
_DROPOUTS = _ENTRIES | _CHANNELS
_ARGUMENTS = ("input", "p", "training", "inplace")
_BUILTIN = {torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout}
_RRELU = ("input", "lower", "upper", "training")
_RANDOM = {
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli", "poisson",
    "multinomial", "normal_", "uniform_", "bernoulli_", "exponential_", "random_", "cauchy_", "log_normal_",
    "geometric_", "binomial", "rrelu_with_noise", "gumbel_softmax",
}  # fmt: skip


def dropout_seeds(examples: int, generator: torch.Generator) -> Int[Tensor, " n"]:
    """One seed for each example: the noise of every dropout in a step, as `context["dropout"]`.

    They are where the generator is; a net on another device takes them there.

    Raises:
        ShapeError: a negative number of examples.
        NoiseError: no generator.

    >>> dropout_seeds(2, torch.Generator().manual_seed(0)).shape
    torch.Size([2])
    """
    if examples < 0:
        raise ShapeError(f"seeds are one for each example, got {examples} examples.")
    if not isinstance(generator, torch.Generator):
        raise NoiseError(
            f"seeds are drawn by a torch.Generator, got {type(generator).__name__}; the global one is never used."
        )
    return torch.randint(2**32, (examples,), generator=generator, device=generator.device)


def draws_globally(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call takes numbers from the global generator."""
    if function in _DROPOUTS:
        return _active(args, kwargs)
    if function in _BUILTIN:
        return bool(bind(("input", "p", "train"), args, kwargs).get("train", True))
    if function is F.rrelu:
        return bool(bind(_RRELU, args, kwargs).get("training", False))
    return getattr(function, "__name__", "") in _RANDOM and kwargs.get("generator") is None


def refuse(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise for a call that takes numbers from the global generator."""
    if draws_globally(function, args, kwargs):
        raise NoiseError(
            f"the model calls {function.__name__}, which draws from the global generator: a gradient would not be a "
            "function of its arguments. Call net.eval(), or make the model with ff.functional(net) and put "
            'context["dropout"] = ff.dropout_seeds(N, generator); other noise is an input like x, or a context.'
        )


class SeededDropout(Elementary):
    """Replaces the dropouts of a run by those that the seeds of its examples stand for.

    Args:
        seeds: one per example.
        axes: for each dropout of the run the axis of its examples, None where it has none; without, it is the first.
    """

    def __init__(self, seeds: Int[Tensor, " n"], axes: Sequence[int | None] = ()) -> None:
        super().__init__()
        self._seeds, self._axes = seeds, axes
        self._calls = 0

    def elementary(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A dropout with its seeds; any other call as it is."""
        if func in _DROPOUTS and _active(args, kwargs):
            given = _given(args, kwargs)
            dropped = self._dropped(func, given)
            return given["input"].copy_(dropped) if given.get("inplace") else dropped
        if random_numbers.is_known(func) and kwargs.get("generator") is None:
            return random_numbers.drawn(func, args, kwargs, self._uniform)
        return func(*args, **kwargs)

    def _dropped(self, func: Callable[..., Any], given: dict[str, Any]) -> Tensor:
        x: Tensor = given["input"]
        p: float = given.get("p", 0.5)
        keep = self._mask(x, p, x.shape[1:2] if func in _CHANNELS else x.shape[1:])
        if func not in (F.alpha_dropout, F.feature_alpha_dropout):
            return torch.where(keep, x / (1 - p), 0.0) if p < 1 else torch.zeros_like(x)
        # Klambauer et al. 2017: dropped units go to SELU's lower limit, mean and variance are restored
        limit = -1.7580993408473766
        scale = 1 / math.sqrt((1 - p) * (1 + p * limit**2)) if p < 1 else 0.0
        return scale * (torch.where(keep, x, limit) - p * limit)

    def _mask(self, x: Tensor, p: float, shape: torch.Size) -> Tensor:
        """Return True for the entries (or channels) that are retained, `[M, *shape]` broadcast to `x`."""
        keep = self._uniform(torch.Size((x.shape[0], *shape)), x.device, "a dropout") >= p
        return keep.reshape(*keep.shape, *(1,) * (x.ndim - keep.ndim))

    def _uniform(self, shape: torch.Size, device: torch.device, who: str) -> Tensor:
        """Numbers in [0, 1) from the seeds, in float64; `who` asks for them, for the error."""
        axis = self._axes[self._calls] if self._calls < len(self._axes) else 0
        examples = self._seeds.shape[0]
        if not shape or axis is None or shape[axis] % examples:
            seen = f"{shape[axis]} rows" if shape and axis is not None else "no axis of examples"
            raise ShapeError(
                f"{who} sees {seen} for {examples} seeds: its input must have an axis of the examples, "
                "and context['dropout'] one seed for each of them (ff.dropout_seeds(N, generator))."
            )
        self._calls += 1
        before, after = shape[:axis].numel(), shape[axis:].numel() // examples
        # a single example's entries have the same numbers wherever its axis is
        entries = torch.arange(before * after, device=device).reshape(before, 1, after)
        key = _hash(_hash(self._seeds.to(device)) + self._calls)
        uniform: Tensor = _hash(_hash(entries) ^ key.unsqueeze(-1)).double() / 2**32
        return uniform.reshape(shape)


class Sizes(SeededDropout):
    """Notes the shapes of all numbers that a run asks for, and gives it halves."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(1, dtype=torch.int64))
        self.shapes: list[torch.Size] = []

    def _uniform(self, shape: torch.Size, device: torch.device, who: str) -> Tensor:
        self.shapes.append(shape)
        return torch.full(shape, 0.5, dtype=torch.float64, device=device)


def axes_of_examples(two: Sequence[torch.Size], three: Sequence[torch.Size]) -> list[int | None]:
    """The axis of the examples in each of the shapes, from a run of two examples and one of three."""
    found: list[int | None] = []
    for shape, longer in zip(two, three, strict=True):
        axes = [axis for axis, (a, b) in enumerate(zip(shape, longer, strict=True)) if a != b]
        found.append(axes[0] if len(axes) == 1 and 3 * shape[axes[0]] == 2 * longer[axes[0]] else None)
    return found


def require_seeds(context: Any) -> Int[Tensor, " n"]:
    """The seeds of a context, or the error that says where they come from."""
    if "dropout" not in context:
        raise NoiseError(
            "the net drops units in training mode, and its noise is an argument: pass "
            'context | {"dropout": ff.dropout_seeds(N, generator)} with a seed for each example, new ones every step; '
            "or call net.eval() first."
        )
    seeds = context["dropout"]
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64 or seeds.ndim != 1:
        found = f"{seeds.dtype} {list(seeds.shape)}" if isinstance(seeds, Tensor) else type(seeds).__name__
        raise NoiseError(
            f'context["dropout"] must be int64 seeds [N], one an example, got {found}: '
            "make them with ff.dropout_seeds(N, generator)."
        )
    return seeds


def drops(net: torch.nn.Module) -> bool:
    """Whether some module of a net in training mode drops units."""
    return any(m.training and _rate(m) > 0 for m in net.modules())


def _rate(module: torch.nn.Module) -> float:
    rate = getattr(module, "p", 0.0) if isinstance(module, torch.nn.modules.dropout._DropoutNd) else 0.0
    if isinstance(module, torch.nn.MultiheadAttention):
        rate = module.dropout
    if isinstance(module, torch.nn.RNNBase) and module.num_layers > 1:
        rate = module.dropout
    return float(rate)


def _active(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    given = _given(args, kwargs)
    return bool(given.get("training", True)) and given.get("p", 0.5) > 0


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return bind(_ARGUMENTS, args, kwargs)


def _hash(value: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """A 32-bit integer to another, every bit depending on every bit."""
    state = ((value & 0xFFFFFFFF) * 747796405 + 2891336453) & 0xFFFFFFFF
    word = (((state >> ((state >> 28) + 4)) ^ state) * 277803737) & 0xFFFFFFFF
    return (word >> 22) ^ word
