"""Taps: the statistics of a layer in the one form that every method reads.

`Tap` holds (a, g); `LazyTap` computes them on demand for a slice of examples. An unfolded convolution is many times the
size of its input, and few computations need all of it at once. Both answer the same questions (`AnyTap`), so a method
never asks which kind it has, nor how the inputs are stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import rows, tree
from fisherfn.errors import EmptyBatchError
from fisherfn.types import PyTree, at_least_single

T = TypeVar("T", bound="AnyTap")

WINDOW = 1 << 24
"""Size of the rows of one window, in numbers: 64 MiB in single precision, large enough for fast matrix products."""


class Sizes(NamedTuple):
    """The axes of a tap: group, sample, example, shared position, output, input."""

    k: int
    s: int
    n: int
    t: int
    o: int
    i: int


class AnyTap:
    """The questions that every tap answers.

    Moments are sums over all examples. Every other average over examples goes through `mean`, so that a tap whose
    examples are spread over chunks (or machines) reduces in one place.
    """

    __slots__ = ()

    at_once = True
    """True if all examples may be multiplied with each other: one batch, held as a whole."""

    @property
    def sizes(self) -> Sizes:
        """Return the length of each axis; `sizes.n` counts all examples."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of `g`."""
        raise NotImplementedError

    @property
    def one_hot(self) -> bool:
        """Return True if the rows of `a` are columns of the identity, as below an embedding."""
        raise NotImplementedError

    def whole(self) -> Tap:
        """Return the tap of all examples."""
        raise NotImplementedError

    def window(self: T, examples: slice) -> T:
        """Return the tap of some of the examples."""
        raise NotImplementedError

    def windows(self) -> Iterator[Tap]:
        """Yield parts that together are the whole, each small enough for fast memory."""
        raise NotImplementedError

    def to(self: T, dtype: torch.dtype) -> T:
        """Return the tap in another precision."""
        raise NotImplementedError

    def outputs(self) -> Float[Tensor, "k s n t o"]:
        """Return only `g`, without computing any row."""
        raise NotImplementedError

    def quick_input_moment(self) -> Float[Tensor, "k i i"] | None:
        """Return `Σ_nt a aᵀ` if there is a faster way than from the rows: here None."""
        return None

    def precise(self: T) -> T:
        """Return the tap at least in float32."""
        return self.to(at_least_single(self.dtype))

    @property
    def local(self) -> AnyTap:
        """Return the tap of the examples that this process holds: here all."""
        return self

    def mean(self, moment: Callable[[AnyTap], PyTree]) -> PyTree:
        """Compute a mean over all examples; `moment` returns the mean over the examples of the tap that it is given."""
        return moment(self)

    def mean_of_all(self, taps: Mapping[str, Any], moments: Mapping[str, Callable[[AnyTap], PyTree]]) -> PyTree:
        """Return the mean of a moment for every block of this batch, in one message if processes share the examples."""
        return {key: taps[key].mean(moment) for key, moment in moments.items()}

    def each(self, compute: Callable[[AnyTap], Tensor]) -> Tensor:
        """Return `compute(tap)`, a tensor `[S, N, …]` with one entry per example, for all examples."""
        return compute(self)

    def input_moment(self, limit: int, summed: bool = False) -> Float[Tensor, "k i *i"]:
        """Return `Σ_nt a aᵀ`, at least in float32.

        Args:
            limit: width above which only the diagonal is computed. For one-hot rows it always is.
            summed: take the mean of `a` over positions first, `Σ_n ā āᵀ`; `output_moment` takes the sum of `g`. For
                one-hot rows this has more than its diagonal, which is then an approximation.
        """
        diagonal = self.one_hot or self.sizes.i > limit
        quick = None if summed or diagonal else self.quick_input_moment()
        if quick is not None:
            return quick
        dtype = at_least_single(self.dtype)
        parts = ((rows.cast(part.a, dtype), part.sizes.t) for part in self.windows())
        if summed:
            return added(rows.total_moment(a, diagonal) / t**2 for a, t in parts)  # type: ignore[no-any-return]
        return added(rows.moment(a, diagonal) for a, _ in parts)  # type: ignore[no-any-return]

    def output_rows(self, summed: bool = False) -> int:
        """Return the number of `g` per sample in `output_moment`: one per example and position, or per example."""
        return self.sizes.n if summed else self.sizes.n * self.sizes.t

    def output_moment(self, limit: int, summed: bool = False) -> Float[Tensor, "k o *o"]:
        """Return `Σ_snt g gᵀ`, at least in float32; `limit` and `summed` as for `input_moment`."""
        g = self.outputs().to(at_least_single(self.dtype))
        g = g.sum(3, keepdim=True) if summed else g
        return rows.moment(g.flatten(1, 2), self.sizes.o > limit)  # samples are additional rows

    def mean_gradient(self) -> Float[Tensor, "k o i"]:
        """Return `1/N Σ_n Σ_t g aᵀ` of a loss tap (one sample): the gradient of the mean loss, at least in float32."""
        dtype, factor = at_least_single(self.dtype), 1 / self.sizes.n
        return added(  # type: ignore[no-any-return]
            rows.outer(part.g.squeeze(1).to(dtype), rows.cast(part.a, dtype), factor) for part in self.windows()
        )


class _Fields(NamedTuple):
    a: Float[Tensor, "k n t i"] | rows.OneHot | rows.Phases
    g: Float[Tensor, "k s n t o"]


class Tap(_Fields, AnyTap):
    r"""The statistics of a layer: inputs a and output-gradients g.

    Example n's gradient for sample s is $W_{sn} = \sum_t g_{snt} a_{nt}^\top$, and the sampled Fisher block is
    $F = \frac1N \sum_n \sum_s \mathrm{vec}(W_{sn}) \mathrm{vec}(W_{sn})^\top$: the scale of `g` is chosen for this
    (docs/conventions.md). `a` may have a structure (`fisherfn.rows`); `rows.dense(a)` is always `[k n t i]`.
    """

    __slots__ = ()

    @property
    def sizes(self) -> Sizes:
        """Return the length of each axis."""
        k, s, n, t, o = self.g.shape
        return Sizes(k, s, n, t, o, rows.sizes(self.a)[3])

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of `g`."""
        return self.g.dtype

    @property
    def one_hot(self) -> bool:
        """Return True if the rows are stored as indices."""
        return isinstance(self.a, rows.OneHot)

    def whole(self) -> Tap:
        """Return the tap itself."""
        return self

    def window(self, examples: slice) -> Tap:
        """Return the tap of some of the examples."""
        return Tap(rows.window(self.a, examples), self.g[:, :, examples])

    def windows(self) -> Iterator[Tap]:
        """Yield parts that together are the whole: here one."""
        yield self

    def outputs(self) -> Float[Tensor, "k s n t o"]:
        """Return only `g`."""
        return self.g

    def to(self, dtype: torch.dtype) -> Tap:
        """Return the tap in another precision."""
        return Tap(rows.cast(self.a, dtype), self.g.to(dtype))

    def plain(self) -> Tap:
        """Return the tap with `a` as a tensor; one-hot rows stay indices."""
        return self if self.one_hot else Tap(rows.dense(self.a), self.g)

    def copied(self) -> Tap:
        """Return the plain tap in memory of its own: its rows may be the batch, which the caller may overwrite."""
        a, g = self.plain()
        return Tap(rows.copied(a), g.clone())


class LazyTap(AnyTap, ABC):
    """A tap that is computed on demand; a subclass computes the `part` of some examples."""

    @property
    @abstractmethod
    def stored(self) -> int:
        """Return the size of the rows of one example, in numbers."""

    @abstractmethod
    def part(self, examples: slice) -> Tap:
        """Return the tap of some examples, computed now."""

    def whole(self) -> Tap:
        """Return the tap of all examples."""
        return self.part(slice(0, self.sizes.n))

    def windows(self) -> Iterator[Tap]:
        """Yield parts that together are the whole, each small enough for fast memory."""
        n, size = self.sizes.n, max(1, WINDOW // max(1, self.stored))
        for start in range(0, n, size):
            yield self.part(slice(start, min(start + size, n)))


@dataclass(frozen=True)
class ChunkedTap(AnyTap):
    """A tap whose means are computed for a few examples at a time, which limits the memory of a moment."""

    tap: Any
    size: int
    at_once = False

    @property
    def sizes(self) -> Sizes:
        """Return the length of each axis."""
        return self.tap.sizes  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of `g`."""
        return self.tap.dtype  # type: ignore[no-any-return]

    @property
    def one_hot(self) -> bool:
        """Return True if the rows are stored as indices."""
        return self.tap.one_hot  # type: ignore[no-any-return]

    def whole(self) -> Tap:
        """Return the tap of all examples."""
        return self.tap.whole()  # type: ignore[no-any-return]

    def window(self, examples: slice) -> ChunkedTap:
        """Return the tap of some of the examples."""
        return replace(self, tap=self.tap.window(examples))

    def windows(self) -> Iterator[Tap]:
        """Yield parts that together are the whole: the windows of each chunk."""
        for part in self._chunks():
            yield from part.windows()

    def to(self, dtype: torch.dtype) -> ChunkedTap:
        """Return the tap in another precision."""
        return replace(self, tap=self.tap.to(dtype))

    def outputs(self) -> Float[Tensor, "k s n t o"]:
        """Return only `g`."""
        return self.tap.outputs()  # type: ignore[no-any-return]

    def output_rows(self, summed: bool = False) -> int:
        """Return that of the tap."""
        return self.tap.output_rows(summed)  # type: ignore[no-any-return]

    def mean(self, moment: Callable[[AnyTap], PyTree]) -> PyTree:
        """Compute the mean chunk by chunk; each counts by its number of examples."""
        return added(tree.scale(moment(part), part.sizes.n / self.sizes.n) for part in self._chunks())

    def _chunks(self) -> Iterator[AnyTap]:
        for start in range(0, self.sizes.n, self.size):
            yield self.tap.window(slice(start, start + self.size))


def added(parts: Iterable[PyTree]) -> PyTree:
    """Return the sum of the parts of a tap, one in memory at a time.

    Raises:
        EmptyBatchError: there is no part.
    """
    total: PyTree = None
    for part in parts:
        total = part if total is None else tree.add(total, part)
    if total is None:
        raise EmptyBatchError("the tap has no examples: its mean does not exist.")
    return total
