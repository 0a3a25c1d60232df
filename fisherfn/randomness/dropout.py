r"""Dropout whose noise is an argument: $x \odot m / (1 - p)$, with the mask $m$ computed from a seed for each example.

One seed per example, sampled with the caller's generator, is all the noise of a step: entry j of example n in the c-th
dropout of the net is retained if a hash of (seed n, c, j), uniform in [0, 1), is at least p. So an example has the same
masks in a chunk, on another rank and in a vmapped member, and a resumed run samples the same noise as one without a
break.

Numbers that a model samples itself (`bernoulli_`, `rand`, `randn` and similar calls, as in stochastic depth) are
computed from the same seeds. The examples may be on any axis; `Sizes` finds it by runs with two and three examples.

A tensor that all examples share (a table of positions, a weight) has one mask for the batch: one mask per example would
change the shape of the following calls. The mask must not depend on the chunk, so it needs noise that is equal for all
examples. Every seed of a step therefore has the same upper 32 bits, from which the shared masks are computed.

The hash is the 32-bit permuted congruential generator of O'Neill 2014, whose arithmetic fits 64-bit integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Size, Tensor
from torch.nn import functional as F

from fisherfn.calls import bind, holds
from fisherfn.decompositions import Elementary
from fisherfn.errors import NoiseError, ShapeError, StructureError
from fisherfn.randomness import random_numbers
from fisherfn.randomness.draws import Draw
from fisherfn.randomness.generators import sampling

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

_SHARED = 0x5F3759DF
"""Constant that makes the noise of shared masks independent of that of the first example."""
_READS = {Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.item, Tensor.tolist}


def dropout_seeds(examples: int, generator: torch.Generator) -> Int[Tensor, " n"]:
    """Return one seed per example, for all dropout noise of a step, to be passed as `context["dropout"]`.

    The upper halves of the seeds are equal, for masks that all examples share. Make the seeds of a step in one call,
    and slice them. They are on the device of the generator; a net on another device moves them.

    Raises:
        ShapeError: a negative number of examples.
        NoiseError: no generator, or a call inside `torch.vmap`.

    >>> dropout_seeds(2, torch.Generator().manual_seed(0)).shape
    torch.Size([2])
    """
    if examples < 0:
        raise ShapeError(f"there is one seed per example, got {examples} examples.")
    if not isinstance(generator, torch.Generator):
        raise NoiseError(f"seeds need a torch.Generator, got {type(generator).__name__}; the global one is never used.")
    with sampling("make the seeds before the call, and pass those of each member as an argument"):
        own = torch.randint(2**32, (examples,), generator=generator, device=generator.device)
    return own + ((_hash(own[:1] ^ _SHARED) >> 1 | 1) << 32)


def draws_globally(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return True if a call takes numbers from the global generator."""
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
    """Replace the dropouts of a run by dropouts whose masks are computed from the seeds of the examples.

    Args:
        seeds: one seed per example.
        draws: the calls for random numbers of a run, in order; if empty, all have the examples on the first axis.
    """

    def __init__(self, seeds: Int[Tensor, " n"], draws: Sequence[Draw] = ()) -> None:
        super().__init__()
        self._seeds, self._draws = seeds, draws
        self._calls = 0
        self._single: dict[int, Tensor] = {}
        """Single random numbers and the results computed from them, by identity."""

    def elementary(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a dropout or another random call with noise from the seeds, and any other call unchanged."""
        if func in _DROPOUTS and _active(args, kwargs):
            given = _given(args, kwargs)
            dropped = self._dropped(func, given)
            return given["input"].copy_(dropped) if given.get("inplace") else dropped
        if random_numbers.is_known(func) and kwargs.get("generator") is None:
            numbers = random_numbers.drawn(func, args, kwargs, self._uniform)
            self._note(numbers)
            return numbers
        if not self._single or not any(id(each) in self._single for each in args):
            return func(*args, **kwargs)
        if func in _READS:
            raise NoiseError(
                "the model branches on a random number, as layer drop does, or reads its value: a step would take "
                "another path than the build. Switch that off (layerdrop = 0 in the configuration), or mask with "
                "the number, h * (torch.rand(len(h), 1) > p)."
            )
        output = func(*args, **kwargs)
        self._note(output)
        return output

    def _note(self, found: Any) -> None:
        if isinstance(found, Tensor) and found.numel() == 1:
            self._single[id(found)] = found

    def _dropped(self, func: Callable[..., Any], given: dict[str, Any]) -> Tensor:
        x: Tensor = given["input"]
        p: float = given.get("p", 0.5)
        keep = self._mask(x, p, x.shape[1:2] if func in _CHANNELS else x.shape[1:])
        if func not in (F.alpha_dropout, F.feature_alpha_dropout):
            return torch.where(keep, x / (1 - p), 0.0) if p < 1 else torch.zeros_like(x)
        # Klambauer et al. 2017: dropped units are set to SELU's lower limit, mean and variance are restored
        limit = -1.7580993408473766
        scale = 1 / math.sqrt((1 - p) * (1 + p * limit**2)) if p < 1 else 0.0
        return scale * (torch.where(keep, x, limit) - p * limit)

    def _mask(self, x: Tensor, p: float, shape: torch.Size) -> Tensor:
        """Return True for the entries (or channels) that are retained, `[M, *shape]` broadcast to `x`."""
        keep = self._uniform(torch.Size((x.shape[0], *shape)), x.device, "a dropout") >= p
        return keep.reshape(*keep.shape, *(1,) * (x.ndim - keep.ndim))

    def _uniform(self, shape: Size, device: torch.device, who: str) -> Tensor:
        """Return numbers in [0, 1) from the seeds, in float64; `who` is the name of the call, for the error."""
        axis = self._axis(shape, who)
        self._calls += 1
        if axis is None:
            return self._numbers(self._shared(), torch.arange(shape.numel(), device=device)).reshape(shape)
        before, after = shape[:axis].numel(), shape[axis:].numel() // self._seeds.shape[0]
        # a single example's entries have the same numbers wherever its axis is
        entries = torch.arange(before * after, device=device).reshape(before, 1, after)
        return self._numbers(self._seeds, entries).reshape(shape)

    def _numbers(self, seeds: Int[Tensor, " n"], entries: Int[Tensor, "..."]) -> Tensor:
        key = _hash(_hash(seeds.to(entries.device)) + self._calls)
        uniform: Tensor = _hash(_hash(entries) ^ key.unsqueeze(-1)).double() / 2**32
        return uniform

    def _axis(self, shape: Size, who: str) -> int | None:
        """Return the axis of the examples in the numbers of the next call; None if all examples share them."""
        axis, examples = 0 if not self._draws else self._next(shape, who).axis, self._seeds.shape[0]
        if axis is not None and (axis < 0 or not shape or shape[axis] % examples):
            seen = f"{shape[axis]} rows" if shape and axis >= 0 else "no axis of examples"
            raise ShapeError(
                f"{who} sees {seen} for {examples} seeds: its input must have an axis of the examples, "
                "and context['dropout'] one seed for each of them (ff.dropout_seeds(N, generator))."
            )
        return axis

    def _next(self, shape: Size, who: str) -> Draw:
        """Return the next recorded call for random numbers, which must match this one."""
        if self._calls >= len(self._draws) or not self._draws[self._calls].fits(shape, self._seeds.shape[0]):
            raise self._another_path(f"{who} draws {list(shape)} numbers")
        return self._draws[self._calls]

    def finish(self) -> None:
        """Raise unless the run sampled as often as the recorded run with a few examples."""
        if self._draws and self._calls != len(self._draws):
            raise self._another_path(f"the model draws {self._calls} times")

    def _another_path(self, found: str) -> StructureError:
        return StructureError(
            f"{found}, unlike a run on copies of one example ({len(self._draws)} calls): the model's path depends on "
            "the values of its input, so the axis of the examples in a mask is unknown. Sample that noise outside, "
            "with one entry per example, and pass it as an input."
        )

    def _shared(self) -> Int[Tensor, " 1"]:
        """Return the seed of numbers that all examples share: the upper half of each example's seed."""
        shared = self._seeds >> 32
        if not holds((shared == shared[:1]).all() & (shared[:1] > 0).all()):
            raise NoiseError(
                "the net drops entries that all examples share, and the seeds do not agree on them: make the seeds of "
                "a step by one call of ff.dropout_seeds(N, generator), and slice them for chunks and ranks."
            )
        return shared[:1]


class Sizes(SeededDropout):
    """Record the shapes of all random numbers of a run, whose values are 0.5."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(1, dtype=torch.int64))
        self.shapes: list[Size] = []

    def _uniform(self, shape: Size, device: torch.device, who: str) -> Tensor:
        self.shapes.append(shape)
        return torch.full(shape, 0.5, dtype=torch.float64, device=device)

    def _note(self, found: Any) -> None:
        """Record nothing, so that the run may branch; the run with seeds raises the error."""


def require_seeds(context: Any) -> Int[Tensor, " n"]:
    """Return the seeds of a context; raise an error that says how to make them if there are none."""
    if "dropout" not in context:
        raise NoiseError(
            "the net drops units in training mode, and its noise is an argument: pass "
            'context | {"dropout": ff.dropout_seeds(N, generator)} with one seed per example, new ones every step; '
            "or call net.eval() first."
        )
    seeds = context["dropout"]
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64 or seeds.ndim != 1:
        found = f"{seeds.dtype} {list(seeds.shape)}" if isinstance(seeds, Tensor) else type(seeds).__name__
        raise NoiseError(
            f'context["dropout"] must be int64 seeds [N], one per example, got {found}: '
            "make them with ff.dropout_seeds(N, generator)."
        )
    return seeds


def drops(net: torch.nn.Module) -> bool:
    """Return True if some module of a net in training mode drops units."""
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
    """Hash a 32-bit integer to another one; every output bit depends on every input bit."""
    state = ((value & 0xFFFFFFFF) * 747796405 + 2891336453) & 0xFFFFFFFF
    word = (((state >> ((state >> 28) + 4)) ^ state) * 277803737) & 0xFFFFFFFF
    return (word >> 22) ^ word
