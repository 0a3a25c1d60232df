"""The rows `a` of a tap: dense, one-hot or in phases.

A dense `a` is a tensor `[k n t i]`. `OneHot` rows are columns of the identity, kept as indices: the input of an
embedding would otherwise be as wide as the vocabulary. `Phases` are the rows of convolutions. In a strided transposed
convolution, an output position only meets the kernel entries of its own phase, and the zeros in between are neither
stored nor multiplied. An ordinary convolution has a single phase, with columns in the order of memory.

Every function here takes any of the three, and returns the result for the dense rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fisherfn import products, tree


@dataclass(frozen=True)
class OneHot:
    """Row t of example n is 1 in column `index[k, n, t]`; an index equal to `width` is an empty row."""

    index: Tensor | Any  # Int[Tensor, "k n t"], or the result of a map over a tree
    width: int
    dtype: torch.dtype

    def dense(self) -> Float[Tensor, "k n t i"]:
        """Return the rows as a tensor, for inspection."""
        columns = torch.arange(self.width, device=self.index.device)
        return (self.index.unsqueeze(-1) == columns).to(self.dtype)


class Phase(NamedTuple):
    """Rows at some positions (`()`: at all of them) that are zero outside some columns."""

    a: Float[Tensor, "k n p j"]
    positions: Int[Tensor, " p"] | tuple[()]
    columns: Int[Tensor, " j"]


@dataclass(frozen=True)
class Phases:
    """Rows in phases: every position is in exactly one."""

    parts: tuple[Phase, ...]
    width: int


Rows: TypeAlias = Tensor | OneHot | Phases

tree.register(OneHot, lambda a: ([a.index], (a.width, a.dtype)), lambda leaves, facts: OneHot(leaves[0], *facts))
tree.register(Phases, lambda a: ([a.parts], a.width), lambda leaves, width: Phases(leaves[0], width))


def sizes(a: Rows) -> tuple[int, int, int, int]:
    """Return (k, n, t, i) of the dense rows."""
    if isinstance(a, Tensor):
        k, n, t, i = a.shape
        return k, n, t, i
    if isinstance(a, OneHot):
        k, n, t = a.index.shape
        return k, n, t, a.width
    k, n, _, _ = a.parts[0].a.shape
    return k, n, sum(part.a.shape[2] for part in a.parts), a.width


def stored(a: Rows) -> int:
    """Return the number of stored numbers."""
    return sum(leaf.numel() for leaf in tree.leaves(a))


def dense(a: Rows) -> Float[Tensor, "k n t i"]:
    """Return the rows as a tensor."""
    if isinstance(a, Tensor):
        return a
    if isinstance(a, OneHot):
        return a.dense()
    k, n, t, i = sizes(a)
    out = a.parts[0].a.new_zeros(k, n, t, i)
    for part in a.parts:
        out = out.index_add(3, part.columns, _spread(part.a, part.positions, t))
    return out


def cast(a: Rows, dtype: torch.dtype) -> Rows:
    """Return the rows in another precision."""
    if isinstance(a, Tensor):
        return a.to(dtype)
    if isinstance(a, OneHot):
        return OneHot(a.index, a.width, dtype)
    return Phases(tuple(part._replace(a=part.a.to(dtype)) for part in a.parts), a.width)


def split_examples(a: Rows, repeats: int) -> Rows:
    """Convert rows of `n · repeats` examples to n examples with `repeats` times the positions."""
    if repeats == 1:
        return a
    if isinstance(a, OneHot):
        return OneHot(a.index.unflatten(1, (-1, repeats)).flatten(2), a.width, a.dtype)
    whole = dense(a)
    return whole.reshape(whole.shape[0], -1, repeats * whole.shape[2], whole.shape[3])


def with_column(a: Rows, value: float) -> Rows:
    """Append a constant column: the input of a bias."""
    if isinstance(a, Phases):
        parts = tuple(
            Phase(_appended(p.a, value), p.positions, torch.cat([p.columns, p.columns.new_tensor([a.width])]))
            for p in a.parts
        )
        return Phases(parts, a.width + 1)
    return _appended(dense(a), value)


def cat(parts: Sequence[Rows]) -> Rows:
    """Join several uses of a layer along the positions."""
    if len(parts) == 1:
        return parts[0]
    one_hot = [part for part in parts if isinstance(part, OneHot)]
    if len(one_hot) == len(parts):
        return OneHot(torch.cat([part.index for part in one_hot], 2), one_hot[0].width, one_hot[0].dtype)
    return torch.cat([dense(part) for part in parts], 2)


def times(a: Rows, M: Float[Tensor, "k i j"]) -> Float[Tensor, "k n t j"]:
    """Return `a M`, row by row."""
    k, n, t, _ = sizes(a)
    if isinstance(a, Tensor):  # flat: a broadcast product would read M once per example
        return products.matmul(a.flatten(1, 2), M).reshape(k, n, t, M.shape[-1])
    if isinstance(a, OneHot):
        padded = torch.cat([M, M.new_zeros(k, 1, M.shape[-1])], 1)
        index = a.index.reshape(k, n * t, 1).expand(-1, -1, M.shape[-1])
        return padded.gather(1, index).reshape(k, n, t, M.shape[-1])
    out = M.new_zeros(k, n, t, M.shape[-1])
    for part in a.parts:
        product = part.a.flatten(1, 2) @ M.index_select(1, part.columns)
        out = out + _spread(product.reshape(*part.a.shape[:3], M.shape[-1]), part.positions, t)
    return out


def times_each(g: Float[Tensor, "k s n t o"], M: Float[Tensor, "k o p"]) -> Float[Tensor, "k s n t p"]:
    """Return `g M`, row by row, as one product per group: a broadcast one would read M once per example."""
    return products.matmul(g.flatten(1, 3), M).reshape(*g.shape[:-1], M.shape[-1])


def outer(g: Float[Tensor, "k n t o"], a: Rows, factor: float = 1.0) -> Float[Tensor, "k o i"]:
    """Return `factor · Σ_nt g aᵀ`."""
    if isinstance(a, Tensor):
        return products.product(g.flatten(1, 2).mT, a.flatten(1, 2), factor)
    return factor * _outer_of_structure(g, a)


def _outer_of_structure(g: Float[Tensor, "k n t o"], a: OneHot | Phases) -> Float[Tensor, "k o i"]:
    k, n, t, i = sizes(a)
    o = g.shape[-1]
    if isinstance(a, OneHot):
        index = a.index.reshape(k, n * t, 1).expand(-1, -1, o)
        sums = g.new_zeros(k, i + 1, o).scatter_add(1, index, g.reshape(k, n * t, o))
        return sums[:, :i].mT
    out = g.new_zeros(k, o, i)
    for part in a.parts:
        g_part = g if isinstance(part.positions, tuple) else g.index_select(2, part.positions)
        out = out.index_add(2, part.columns, g_part.flatten(1, 2).mT @ part.a.flatten(1, 2))
    return out


def outer_each(g: Float[Tensor, "k s n t o"], a: Rows) -> Float[Tensor, "k s n o i"]:
    """Return `Σ_t g aᵀ` of every sample and example."""
    if not isinstance(a, Phases):
        return torch.einsum("ksnto,knti->ksnoi", g, dense(a))
    first, *others = a.parts
    if not others and isinstance(first.positions, tuple) and len(first.columns) == a.width:  # columns in another order
        return torch.einsum("ksnto,knti->ksnoi", g, first.a).index_select(4, first.columns.argsort())
    k, s, n, _, o = g.shape
    out = g.new_zeros(k, s, n, o, a.width)
    for part in a.parts:
        g_part = g if isinstance(part.positions, tuple) else g.index_select(3, part.positions)
        out = out.index_add(4, part.columns, torch.einsum("ksnto,knti->ksnoi", g_part, part.a))
    return out


def second_moment(a: Rows) -> Float[Tensor, "k i i"]:
    """Return `Σ_nt a aᵀ`; for one-hot rows only its diagonal is nonzero (see `diagonal_moment`)."""
    if isinstance(a, Tensor):
        return products.square(a.flatten(1, 2))
    if isinstance(a, OneHot):
        return torch.diag_embed(diagonal_moment(a))
    k, _, _, i = sizes(a)
    out = a.parts[0].a.new_zeros(k, i, i)
    for part in a.parts:
        flat = part.a.flatten(1, 2)
        rows = flat.new_zeros(k, part.columns.shape[0], i).index_add(2, part.columns, products.square(flat))
        out = out.index_add(1, part.columns, rows)
    return out


def diagonal_moment(a: Rows) -> Float[Tensor, "k i"]:
    """Return the diagonal of `Σ_nt a aᵀ`."""
    if isinstance(a, Tensor):
        return a.square().sum((1, 2))
    k, n, t, i = sizes(a)
    if isinstance(a, OneHot):
        ones = torch.ones_like(a.index, dtype=a.dtype).reshape(k, n * t)
        return ones.new_zeros(k, i + 1).scatter_add(1, a.index.reshape(k, n * t), ones)[:, :i]
    out = a.parts[0].a.new_zeros(k, i)
    for part in a.parts:
        out = out.index_add(1, part.columns, part.a.square().sum((1, 2)))
    return out


def moment(a: Rows, diagonal: bool) -> Float[Tensor, "k i *i"]:
    """Return `Σ_nt a aᵀ`, or its diagonal."""
    return diagonal_moment(a) if diagonal else second_moment(a)


def total(a: Rows) -> Float[Tensor, "k n i"]:
    """Return `Σ_t a` of every example."""
    if isinstance(a, Tensor):
        return a.sum(2)
    k, n, _, i = sizes(a)
    if isinstance(a, OneHot):
        ones = torch.ones_like(a.index, dtype=a.dtype)
        return ones.new_zeros(k, n, i + 1).scatter_add(2, a.index, ones)[..., :i]
    out = a.parts[0].a.new_zeros(k, n, i)
    for part in a.parts:
        out = out.index_add(2, part.columns, part.a.sum(2))
    return out


def squared(a: Rows) -> Rows:
    """Square the rows entry by entry."""
    if isinstance(a, Tensor):
        return a.square()
    if isinstance(a, OneHot):
        return a
    return Phases(tuple(part._replace(a=part.a.square()) for part in a.parts), a.width)


def alike(a: OneHot) -> Bool[Tensor, "k n t u"]:
    """Return a mask of equal rows within an example; an empty row equals no other."""
    return (a.index.unsqueeze(-1) == a.index.unsqueeze(-2)) & (a.index < a.width).unsqueeze(-1)


def total_moment(a: Rows, diagonal: bool) -> Float[Tensor, "k i *i"]:
    """Return `Σ_n (Σ_t a)(Σ_t a)ᵀ`, or its diagonal; for one-hot rows only the diagonal."""
    return total_diagonal(a) if isinstance(a, OneHot) else moment(total(a).unsqueeze(2), diagonal)


def total_diagonal(a: OneHot) -> Float[Tensor, "k i"]:
    """Return the diagonal of `Σ_n (Σ_t a)(Σ_t a)ᵀ`: a row counts once per equal row of its example."""
    k, n, t, i = sizes(a)
    count = alike(a).sum(-1).to(a.dtype).reshape(k, n * t)
    return count.new_zeros(k, i + 1).scatter_add(1, a.index.reshape(k, n * t), count)[:, :i]


def gram(a: Rows, b: Rows | None = None) -> Float[Tensor, "k m p"]:
    """Return `a bᵀ` of all rows, examples outermost; by default b = a."""
    b = a if b is None else b
    if isinstance(a, OneHot) and isinstance(b, OneHot):
        index = a.index.flatten(1).unsqueeze(-1)
        return ((index == b.index.flatten(1).unsqueeze(-2)) & (index < a.width)).to(a.dtype)
    return dense(a).flatten(1, 2) @ dense(b).flatten(1, 2).mT


def copied(a: Rows) -> Rows:
    """Return the rows in memory of their own, one-hot ones as indices."""
    return OneHot(a.index.clone(), a.width, a.dtype) if isinstance(a, OneHot) else dense(a).clone()


def window(a: Rows, examples: slice) -> Rows:
    """Return some of the examples."""
    if isinstance(a, Tensor):
        return a[:, examples]
    if isinstance(a, OneHot):
        return OneHot(a.index[:, examples], a.width, a.dtype)
    return Phases(tuple(part._replace(a=part.a[:, examples]) for part in a.parts), a.width)


def _spread(part: Float[Tensor, "k n p j"], positions: Tensor | tuple[()], t: int) -> Float[Tensor, "k n t j"]:
    if isinstance(positions, tuple):
        return part
    return part.new_zeros(*part.shape[:2], t, part.shape[-1]).index_copy(2, positions, part)


def _appended(a: Float[Tensor, "k n t i"], value: float) -> Float[Tensor, "k n t j"]:
    return torch.cat([a, a.new_full((*a.shape[:-1], 1), value)], -1)
