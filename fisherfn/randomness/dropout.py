r"""Dropout whose noise is an argument: $x \odot m / (1 - p)$, with the mask $m$ computed from a seed for each example.

One seed per example, drawn by the caller's generator, is all the noise of a step: entry j of example n in the c-th
dropout of the net is kept where a hash of (seed n, c, j), uniform in [0, 1), is at least p. So an example keeps its
masks in a chunk, on another rank and in a vmapped member, and a resumed run draws what the straight one drew.

Numbers that a model draws by itself (`bernoulli_`, `rand`, `randn` and their like, as stochastic depth does) are made
from the same seeds. The examples may be on any axis; which one is found by `Sizes`, from runs of two and of three
examples.

Where no example enters (a table of positions, a weight), the batch has one mask: a mask per example would give the
following calls another shape. This mask needs noise that all examples know, or a chunk would drop other entries than
the whole batch. So every seed of a step has the same upper 32 bits, and the shared masks are made from these.

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
"""Keeps the noise of shared masks apart from that of the first example."""
_READS = {Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.item, Tensor.tolist}


def dropout_seeds(examples: int, generator: torch.Generator) -> Int[Tensor, " n"]:
    """One seed for each example: the noise of every dropout in a step, as `context["dropout"]`.

    Their upper halves are equal: noise of masks that all examples share. Make the seeds of a step in one call, and
    slice them. They are where the generator is; a net on another device takes them there.

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
    own = torch.randint(2**32, (examples,), generator=generator, device=generator.device)
    return own + ((_hash(own[:1] ^ _SHARED) >> 1 | 1) << 32)


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
        draws: the calls for random numbers of a run, in order; without, all have the examples on the first axis.
    """

    def __init__(self, seeds: Int[Tensor, " n"], draws: Sequence[Draw] = ()) -> None:
        super().__init__()
        self._seeds, self._draws = seeds, draws
        self._calls = 0
        self._single: dict[int, Tensor] = {}
        """Single random numbers and what was computed from them, by identity."""

    def elementary(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A dropout with its seeds; any other call as it is."""
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
                "the model branches on a random number, as layer drop does, or reads its value: the path of a step "
                "would not be that of the build. Switch that off (layerdrop = 0 in the configuration), or mask with "
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
        # Klambauer et al. 2017: dropped units go to SELU's lower limit, mean and variance are restored
        limit = -1.7580993408473766
        scale = 1 / math.sqrt((1 - p) * (1 + p * limit**2)) if p < 1 else 0.0
        return scale * (torch.where(keep, x, limit) - p * limit)

    def _mask(self, x: Tensor, p: float, shape: torch.Size) -> Tensor:
        """Return True for the entries (or channels) that are retained, `[M, *shape]` broadcast to `x`."""
        keep = self._uniform(torch.Size((x.shape[0], *shape)), x.device, "a dropout") >= p
        return keep.reshape(*keep.shape, *(1,) * (x.ndim - keep.ndim))

    def _uniform(self, shape: Size, device: torch.device, who: str) -> Tensor:
        """Numbers in [0, 1) from the seeds, in float64; `who` asks for them, for the error."""
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
        """The axis of the examples in the next call's numbers; None where they share these."""
        axis, examples = 0 if not self._draws else self._next(shape, who).axis, self._seeds.shape[0]
        if axis is not None and (axis < 0 or not shape or shape[axis] % examples):
            seen = f"{shape[axis]} rows" if shape and axis >= 0 else "no axis of examples"
            raise ShapeError(
                f"{who} sees {seen} for {examples} seeds: its input must have an axis of the examples, "
                "and context['dropout'] one seed for each of them (ff.dropout_seeds(N, generator))."
            )
        return axis

    def _next(self, shape: Size, who: str) -> Draw:
        """The next call of the runs of a few examples, which must be this one."""
        if self._calls >= len(self._draws) or not self._draws[self._calls].fits(shape, self._seeds.shape[0]):
            raise self._another_path(f"{who} draws {list(shape)} numbers")
        return self._draws[self._calls]

    def finish(self) -> None:
        """Raise unless the run drew as often as a run of a few examples."""
        if self._draws and self._calls != len(self._draws):
            raise self._another_path(f"the model draws {self._calls} times")

    def _another_path(self, found: str) -> StructureError:
        return StructureError(
            f"{found}, and copies of one example draw otherwise ({len(self._draws)} calls): the model's path depends "
            "on the values of its input, and where a mask has the examples is not known. Draw that noise outside, with "
            "an entry for each example, and pass it as an input."
        )

    def _shared(self) -> Int[Tensor, " 1"]:
        """The seed of numbers that all examples share: the upper half of each example's."""
        shared = self._seeds >> 32
        if not holds((shared == shared[:1]).all() & (shared[:1] > 0).all()):
            raise NoiseError(
                "the net drops entries that all examples share, and the seeds do not agree on them: make those of a "
                "step by one call of ff.dropout_seeds(N, generator), and slice them for chunks and ranks."
            )
        return shared[:1]


class Sizes(SeededDropout):
    """Notes the shapes of all numbers that a run asks for, and gives it halves."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(1, dtype=torch.int64))
        self.shapes: list[Size] = []

    def _uniform(self, shape: Size, device: torch.device, who: str) -> Tensor:
        self.shapes.append(shape)
        return torch.full(shape, 0.5, dtype=torch.float64, device=device)

    def _note(self, found: Any) -> None:
        """Let the run branch: the run with seeds says what is wrong."""


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
