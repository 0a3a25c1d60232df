r"""The examples of several batches as one tap: each part has its own number of examples, scale and positions.

A loss that is a sum of terms, each a mean over its own batch, has the Fisher $\sum_i w_i F_i$. With N examples in all,
$N_i$ of them in term i, this is the Fisher of one tap whose output-gradients are those of the terms times
$\sqrt{w_i N / N_i}$.

k group, s sample, n example, t position, i input, o output.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fisherfn import rows
from fisherfn.taps import AnyTap, Sizes, Tap
from fisherfn.types import Shape


@dataclass(frozen=True)
class JoinedTap(AnyTap):
    """Taps of one block joined along the examples, each with a factor on its output-gradients.

    Attributes:
        parts: at least one tap; groups, outputs and inputs are equal in all of them.
        factors: one number per part.
        samples: number of samples, at least that of each part; missing ones are zero.
    """

    parts: tuple[AnyTap, ...]
    factors: tuple[float, ...]
    samples: int

    @property
    def sizes(self) -> Sizes:
        """Return the length of each axis: examples add up, positions are as many as in any part."""
        each = [part.sizes for part in self.parts]
        return each[0]._replace(s=self.samples, n=sum(x.n for x in each), t=max(x.t for x in each))

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of `g`."""
        return self.parts[0].dtype

    @property
    def one_hot(self) -> bool:
        """Return True if all rows are columns of the identity."""
        return all(part.one_hot for part in self.parts)

    def whole(self) -> Tap:
        """Return the tap of all examples; missing positions and samples are zero."""
        t = self.sizes.t
        taps = [_with_positions(part, t) for part in self._scaled(part.whole() for part in self.parts)]
        inputs = [tap.a for tap in taps]
        if all(isinstance(a, rows.OneHot) for a in inputs):
            index = torch.cat([a.index for a in inputs], 1)  # type: ignore[union-attr, misc]
            a: rows.Rows = replace(inputs[0], index=index)  # type: ignore[type-var]
        else:
            a = torch.cat([rows.dense(a) for a in inputs], 1)
        return Tap(a, torch.cat([tap.g for tap in taps], 2))

    def of_parts(self, chosen: slice) -> JoinedTap:
        """Return the joined tap of some of the parts."""
        return replace(self, parts=self.parts[chosen], factors=self.factors[chosen])

    def window(self, examples: slice) -> JoinedTap:
        """Return the joined tap of some of the examples."""
        start, stop, _ = examples.indices(self.sizes.n)
        inside, at = [], 0
        for part, factor in zip(self.parts, self.factors, strict=True):
            n = part.sizes.n
            first, last = max(start - at, 0), min(stop - at, n)
            if first < last:
                inside.append((part.window(slice(first, last)), factor))
            at += n
        parts, factors = zip(*inside, strict=True) if inside else ((self.parts[0].window(slice(0, 0)),), (1.0,))
        return JoinedTap(tuple(parts), tuple(factors), self.samples)

    def windows(self) -> Iterator[Tap]:
        """Yield the windows of each part, with its own number of positions."""
        for part, factor in zip(self.parts, self.factors, strict=True):
            for window in part.windows():
                yield _scaled(window, factor, self.samples)

    def to(self, dtype: torch.dtype) -> JoinedTap:
        """Return the tap in another precision."""
        return replace(self, parts=tuple(part.to(dtype) for part in self.parts))

    def outputs(self) -> Float[Tensor, "k s n t o"]:
        """Return only `g`."""
        return self.whole().g

    def output_rows(self, summed: bool = False) -> int:
        """Return the number of `g` per sample: those of each part, without positions of zeros and silent examples."""
        return max(1, sum(part.output_rows(summed) for part in self.parts))

    def _scaled(self, taps: Iterator[Tap]) -> list[Tap]:
        return [_scaled(tap, factor, self.samples) for tap, factor in zip(taps, self.factors, strict=True)]


class SilentTap(Tap):
    """The tap of examples that do not depend on the block: zeros, which do not count in a mean over `g`."""

    __slots__ = ()

    def output_rows(self, summed: bool = False) -> int:
        """Return 0."""
        del summed
        return 0

    def window(self, examples: slice) -> SilentTap:
        """Return the tap of some of the examples."""
        return SilentTap(*super().window(examples))

    def to(self, dtype: torch.dtype) -> SilentTap:
        """Return the tap in another precision."""
        return SilentTap(*super().to(dtype))


def silent_tap(shape: Shape, examples: int, like: Tensor) -> SilentTap:
    """Build the tap of examples that do not depend on a block of this shape."""
    k, o, i, one_hot = shape
    g = like.new_zeros(()).expand(k, 1, examples, 1, o)
    if one_hot:
        index = torch.full((k, examples, 1), i, dtype=torch.int64, device=like.device)
        return SilentTap(rows.OneHot(index, i, like.dtype), g)
    return SilentTap(like.new_zeros(()).expand(k, examples, 1, i), g)


def _scaled(tap: Tap, factor: float, samples: int) -> Tap:
    """Return the tap with scaled output-gradients, and samples of zeros up to this number."""
    missing = samples - tap.g.shape[1]
    g = tap.g * factor
    return Tap(tap.a, F.pad(g, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else g)


def _with_positions(tap: Tap, t: int) -> Tap:
    """Return the tap with positions of zeros up to this number."""
    missing = t - tap.g.shape[3]
    if not missing:
        return tap
    g = F.pad(tap.g, (0, 0, 0, missing))
    if isinstance(tap.a, rows.OneHot):
        return Tap(replace(tap.a, index=F.pad(tap.a.index, (0, missing), value=tap.a.width)), g)
    return Tap(F.pad(rows.dense(tap.a), (0, 0, 0, missing)), g)
