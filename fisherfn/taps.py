"""Taps: the statistics of a layer in the one form that every method reads.

`Tap` holds (a, g); `LazyTap` computes them on demand for a slice of examples. An unfolded convolution is many times the
size of its input, and few computations need all of it at once. Both have the same interface.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import rows
from fisherfn.types import PyTree

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


class Tap(NamedTuple):
    r"""The statistics of a layer: inputs a and output-gradients g.

    Example n's gradient for sample s is $W_{sn} = \sum_t g_{snt} a_{nt}^\top$, and the sampled Fisher block is
    $F = \frac1N \sum_n \sum_s \mathrm{vec}(W_{sn}) \mathrm{vec}(W_{sn})^\top$: the scale of `g` is chosen for this
    (docs/conventions.md). `a` may have a structure (`fisherfn.rows`); `rows.dense(a)` is always `[k n t i]`.
    """

    a: Float[Tensor, "k n t i"] | rows.OneHot | rows.Phases
    g: Float[Tensor, "k s n t o"]

    @property
    def sizes(self) -> Sizes:
        """Return the length of each axis."""
        k, s, n, t, o = self.g.shape
        return Sizes(k, s, n, t, o, rows.sizes(self.a)[3])

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

    def second_moment(self) -> None:
        """Return `Σ_nt a aᵀ` if there is a faster way than from the rows: here None."""

    def to(self, dtype: torch.dtype) -> Tap:
        """Return the tap in another precision."""
        return Tap(rows.cast(self.a, dtype), self.g.to(dtype))


@dataclass(frozen=True)
class LazyTap:
    """A tap that is computed on demand, for some examples at a time.

    Attributes:
        sizes: the length of each axis.
        stored: size of the rows of one example, in numbers.
        make: slice of examples -> their tap.
        columns: slice of examples -> only their `g`.
        moment: slice of examples -> `Σ_nt a aᵀ` if there is a faster way than from the rows, else None.
    """

    sizes: Sizes
    stored: int
    make: Callable[[slice], Tap]
    columns: Callable[[slice], Float[Tensor, "k s n t o"]]
    moment: Callable[[slice], Float[Tensor, "k i i"] | None] = lambda examples: None

    def whole(self) -> Tap:
        """Return the tap of all examples."""
        return self.make(slice(None))

    def window(self, examples: slice) -> LazyTap:
        """Return the lazy tap of some of the examples."""
        chosen = range(self.sizes.n)[examples]

        def within(of: Callable[[slice], Any]) -> Callable[[slice], Any]:
            def part(inner: slice) -> Any:
                examples = chosen[inner]
                return of(slice(examples.start, examples.stop))

            return part

        parts = within(self.make), within(self.columns), within(self.moment)
        return LazyTap(self.sizes._replace(n=len(chosen)), self.stored, *parts)

    def windows(self) -> Iterator[Tap]:
        """Yield parts that together are the whole, each small enough for fast memory."""
        size = max(1, WINDOW // max(1, self.stored))
        if size >= self.sizes.n:
            yield from [self.whole()] if self.sizes.n else []
            return
        for start in range(0, self.sizes.n, size):
            yield self.make(slice(start, min(start + size, self.sizes.n)))

    def to(self, dtype: torch.dtype) -> LazyTap:
        """Return the lazy tap in another precision."""
        return LazyTap(
            self.sizes,
            self.stored,
            lambda examples: self.make(examples).to(dtype),
            lambda examples: self.columns(examples).to(dtype),
        )

    def outputs(self) -> Float[Tensor, "k s n t o"]:
        """Return only `g`, without computing any row."""
        return self.columns(slice(None))

    def second_moment(self) -> Float[Tensor, "k i i"] | None:
        """Return `Σ_nt a aᵀ`, at least in single precision, if there is a faster way than from the rows; else None."""
        return self.moment(slice(None))


AnyTap: TypeAlias = Tap | LazyTap


def example_matrices(tap: AnyTap) -> Float[Tensor, "s n k o i"]:
    """Return `W_sn = Σ_t g aᵀ` of every sample and example: `S·N` times the size of the layer."""
    parts = [rows.outer_each(part.g, part.a).permute(1, 2, 0, 3, 4) for part in tap.windows()]
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def matrix_windows(tap: AnyTap) -> Iterator[AnyTap]:
    """Yield windows whose `example_matrices` are small enough for fast memory."""
    k, s, n, _, o, i = tap.sizes
    step = max(1, WINDOW // (s * k * o * i))
    for start in range(0, n, step):
        yield tap.window(slice(start, min(start + step, n)))


def squares(tap: AnyTap) -> Float[Tensor, "k o i"]:
    """Return `Σ_sn W_sn²`, entry by entry."""
    if tap.sizes.t == 1:  # a product of two entries: no W is formed
        parts = [rows.outer(part.g.square().sum(1), rows.squared(part.a)) for part in tap.windows()]
    elif isinstance(tap.window(slice(0, 1)).whole().a, rows.OneHot):
        parts = [_one_hot_squares(part) for part in tap.windows()]
    else:
        parts = [example_matrices(part).square().sum((0, 1)) for part in matrix_windows(tap)]
    return torch.stack(parts).sum(0)


def _one_hot_squares(tap: Tap) -> Float[Tensor, "k o i"]:
    """Return the squares for one-hot rows: a column's gradient is the sum of `g` over the positions with its index."""
    assert isinstance(tap.a, rows.OneHot)
    alike = rows.alike(tap.a).to(tap.g.dtype)
    sums = torch.einsum("kntu,ksnuo->ksnto", alike, tap.g)
    return rows.outer((tap.g * sums).sum(1), tap.a)


Moment: TypeAlias = Callable[[AnyTap], PyTree]
"""A mean over examples, computed from a tap, so that unequal parts average by their number of examples."""

Mean: TypeAlias = Callable[[Moment, AnyTap], PyTree]
"""Function that takes a moment: directly, over chunks of examples, or over the ranks of a cluster."""
