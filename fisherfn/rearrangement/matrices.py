r"""The rearranged block as maps between matrices, for any number of positions.

`FactoredMap` uses $W^\top V W = a^\top (g V g^\top) a$; `ExampleMatrixMap` forms the $W_{sn}$ first, which is cheaper
for many positions.

k group, s sample, n example, m example and sample, t and u positions, i input, o output.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import rows
from fisherfn.linalg import kron
from fisherfn.linalg.golub_kahan import LinearMap, Vector
from fisherfn.linalg.kron import Factor, Forms, Pair
from fisherfn.per_example import example_matrices, matrix_windows
from fisherfn.taps import AnyTap, Tap, added

KEPT = 1 << 26
"""Largest size of per-example gradients that are kept during the iterations, in numbers: 256 MiB in float32."""


def matrix_map(tap: AnyTap, form: Forms, guess: Factor) -> MatrixMap:
    """Return the cheaper map; `guess` is where its iterations start."""
    _, _, _, t, o, i = tap.sizes
    factored = tap.one_hot or t * (o * o + i * i) + t * t * (o + i) < o * i * (o + i)
    return (FactoredMap if factored else ExampleMatrixMap)(tap, form, guess)


@dataclass(frozen=True)
class MatrixBlock:
    """A block whose vectors are the matrices themselves, or their diagonals."""

    Z: LinearMap

    def pair(self, u: Vector, v: Vector) -> Pair:
        """Return the two as they are; `recompressed` distributes scale and sign."""
        return Pair(u, v)

    def vectors(self, pair: Pair) -> tuple[Vector, Vector]:
        """Return the A and G of K-FAC as they are."""
        return pair.A, pair.G


@dataclass(frozen=True)
class MatrixMap(LinearMap):
    """Z as a mean over pieces of the tap; a subclass says what a piece is and gives both products of one.

    Attributes:
        form: which sides are diagonal.
        guess: a V; the first start vector is close to it.
    """

    tap: AnyTap
    form: Forms
    guess: Factor

    @abstractmethod
    def pieces(self, tap: AnyTap) -> Iterable[Any]:
        """Yield the pieces of a tap, computed now."""

    @abstractmethod
    def size(self) -> int:
        """Return the size of all pieces, in numbers."""

    @abstractmethod
    def left_piece(self, piece: Any, V: Factor) -> Factor:
        """Return `Σ Wᵀ V W` over one piece."""

    @abstractmethod
    def right_piece(self, piece: Any, U: Factor) -> Factor:
        """Return `Σ W U Wᵀ` over one piece."""

    @property
    def rounding(self) -> float:
        """Return a tolerance for sums in the precision of the factors."""
        return 64 * torch.finfo(self.guess.dtype).eps

    def left(self, dual_V: Factor) -> Factor:
        """Return `Z V`."""
        return self._mean(self.left_piece, dual_V, self.form.A)

    def right(self, dual_U: Factor) -> Factor:
        """Return `Zᵀ U`."""
        return self._mean(self.right_piece, dual_U, self.form.G)

    def start(self, which: int) -> Factor:
        """Return the guess plus a small part of every direction; the second start vector is only generic."""
        guess, o = self.guess, self.guess.shape[-1]
        ramp = torch.arange(1, o + 1, dtype=guess.dtype, device=guess.device)
        if kron.is_diagonal(guess):
            generic = 1 + 0.25 * torch.cos((1 + which) * ramp * ramp)
        else:
            eye = torch.eye(o, dtype=guess.dtype, device=guess.device)
            generic = eye + 0.25 / o**0.5 * torch.cos((1 + which) * ramp[:, None] * ramp)
        generic = generic / generic.square().sum().sqrt()
        norm = kron.dot(guess, guess).sqrt()
        return kron.times(guess, torch.where((norm > 0) & (which == 0), 1 / norm, 0.0)) + 0.1 * generic

    def _mean(self, product: Callable[[Any, Factor], Factor], X: Factor, diagonal: bool) -> Factor:
        def moment(part: AnyTap) -> Factor:
            pieces = self.pieces(part) if self._kept is None else self._kept
            return added(product(piece, X) for piece in pieces) / part.sizes.n  # type: ignore[no-any-return]

        mean: Tensor = self.tap.mean(moment)
        return mean if diagonal else (mean + mean.mT) / 2

    @cached_property
    def _kept(self) -> list[Any] | None:
        """Return all pieces if they are small enough to be kept during the iterations."""
        mine = self.tap.local
        return list(self.pieces(mine)) if mine.at_once and self.size() <= KEPT else None


class FactoredMap(MatrixMap):
    """Z by `aᵀ (g V gᵀ) a`: fewer multiplications for few positions, and possible for one-hot rows."""

    def pieces(self, tap: AnyTap) -> Iterable[Tap]:
        """Yield windows with `a` as a tensor, or one-hot."""
        return (part.precise().plain() for part in tap.windows())

    def size(self) -> int:
        """Return the size of all rows."""
        k, s, n, t, o, i = self.tap.local.sizes
        return k * n * t * (i + s * o)

    def left_piece(self, piece: Tap, V: Factor) -> Factor:
        """Return `Σ aᵀ (g V gᵀ) a`."""
        gV = piece.g * V[:, None, None, None] if self.form.G else rows.times_each(piece.g, V)
        M = torch.einsum("ksnto,ksnuo->kntu", gV, piece.g)
        if piece.one_hot:
            weights = (M * rows.alike(piece.a)).sum(-1, keepdim=True)  # type: ignore[arg-type]
            return rows.outer(weights, piece.a).squeeze(1)
        a: Tensor = piece.a  # type: ignore[assignment]
        Ma = M @ a
        return (a * Ma).sum((1, 2)) if self.form.A else a.flatten(1, 2).mT @ Ma.flatten(1, 2)

    def right_piece(self, piece: Tap, U: Factor) -> Factor:
        """Return `Σ gᵀ (a U aᵀ) g`."""
        a: Any = piece.a
        if piece.one_hot:
            M = rows.times(a, U.unsqueeze(-1)) * rows.alike(a)
        else:
            M = (a * U[:, None, None] if self.form.A else a @ U[:, None]) @ a.mT
        g = piece.g
        Mg = M.unsqueeze(1) @ g
        return (g * Mg).sum((1, 2, 3)) if self.form.G else g.flatten(1, 3).mT @ Mg.flatten(1, 3)


class ExampleMatrixMap(MatrixMap):
    """Z by the per-example gradients W themselves."""

    def pieces(self, tap: AnyTap) -> Iterable[Float[Tensor, "k o m i"]]:
        """Yield W of some examples, in the layout in which both maps are plain products."""
        for part in matrix_windows(tap):
            yield example_matrices(part.precise()).flatten(0, 1).permute(1, 2, 0, 3).contiguous()

    def size(self) -> int:
        """Return the size of all W."""
        k, s, n, _, o, i = self.tap.local.sizes
        return k * s * n * o * i

    def left_piece(self, piece: Float[Tensor, "k o m i"], V: Factor) -> Factor:
        """Return `Σ Wᵀ V W`."""
        VW = kron.left(V, piece.flatten(2)).reshape(piece.shape)
        return (piece * VW).sum((1, 2)) if self.form.A else piece.flatten(1, 2).mT @ VW.flatten(1, 2)

    def right_piece(self, piece: Float[Tensor, "k o m i"], U: Factor) -> Factor:
        """Return `Σ W U Wᵀ`."""
        WU = kron.right(piece.flatten(1, 2), U).reshape(piece.shape)
        return (WU * piece).sum((2, 3)) if self.form.G else WU.flatten(2) @ piece.flatten(2).mT
