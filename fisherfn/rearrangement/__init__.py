r"""The rearranged Fisher block of a layer as a pair of maps (Van Loan & Pitsianis 1993), never formed.

For a block $F = \frac1N \sum_{sn} \mathrm{vec}(W_{sn}) \mathrm{vec}(W_{sn})^\top$ the rearrangement Z(F) turns the
distance to Kronecker products into the distance to matrices of rank one: $\|F - G \otimes A\| = \|Z - \mathrm{vec}(A)
\mathrm{vec}(G)^\top\|$. As maps between symmetric matrices,

$$Z\,V = \frac1N \sum_{sn} W_{sn}^\top V W_{sn}, \qquad Z^\top U = \frac1N \sum_{sn} W_{sn} U W_{sn}^\top .$$

There are three ways to compute these maps; the shapes select one:

- **by examples** (`examples.py`, one position): Z has rank N, and is given by two N×N Gram matrices;
- **factored** (`matrices.py`, few positions): $W^\top V W = a^\top (g V g^\top) a$;
- **by matrices** (`matrices.py`, many positions): the $W_{sn}$ are formed first.

If a factor is kept as a diagonal, Z is projected on diagonal matrices on that side, and the result is the best one of
this form. Every iterate is symmetrised: F is symmetric, so its singular pairs are symmetric or antisymmetric, and the
latter are no curvature (they occur with shared positions).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import TypeAlias

import torch
from torch import Tensor

from fisherfn.linalg import kron
from fisherfn.linalg.golub_kahan import LinearMap
from fisherfn.linalg.kron import Pair
from fisherfn.rearrangement.examples import ExampleBlock, ExampleMap, has_grams
from fisherfn.rearrangement.matrices import MatrixBlock, matrix_map
from fisherfn.taps import AnyTap

__all__ = ["Block", "group_by_batch_size", "overlap", "rearranged", "stack_blocks"]

Block: TypeAlias = ExampleBlock | MatrixBlock
"""The Z of a layer, and the conversion of its vectors to matrices (`pair`) and back (`vectors`)."""

JOINED = 1 << 24
"""Largest size of the Gram matrices of blocks that are iterated on together, in numbers: 128 MiB."""


def rearranged(tap: AnyTap, guess: Sequence[Pair]) -> Block:
    """Build the rearranged block of a layer.

    Args:
        tap: the statistics of the layer.
        guess: pairs whose sum is the start of the iteration; a diagonal side stays diagonal.
    """
    form = kron.forms_of(guess[0])
    if has_grams(tap):
        return ExampleBlock.of(tap.whole(), form)
    G = reduce(operator.add, (pair.G for pair in guess))
    return MatrixBlock(matrix_map(tap, form, G))


def group_by_batch_size(taps: Mapping[str, AnyTap]) -> list[list[str]]:
    """Group the blocks for `stack_blocks`: those with Gram matrices of equal size together, each other one alone."""
    lists: list[list[str]] = []
    latest: dict[int, list[str]] = {}
    for key, tap in taps.items():
        n, together = tap.sizes.n, latest.get(tap.sizes.n, [])
        numbers = 2 * n * n * sum(taps[other].sizes.k for other in [*together, key])
        if together and numbers <= JOINED and has_grams(tap):
            together.append(key)
            continue
        lists.append([key])
        if has_grams(tap):
            latest[n] = lists[-1]
    return lists


def stack_blocks(blocks: Sequence[Block]) -> LinearMap:
    """Stack the Z of blocks with Gram matrices of equal size; one iteration then serves all of them."""
    maps = [block.Z for block in blocks]
    stackable = [Z for Z in maps if isinstance(Z, ExampleMap)]
    if len(blocks) == 1 or len(stackable) < len(maps):
        return maps[0]
    return ExampleMap(torch.cat([Z.K_a for Z in stackable]), torch.cat([Z.K_g for Z in stackable]))


def overlap(pairs: Sequence[Pair], tap: AnyTap) -> tuple[Tensor, Tensor]:
    """Return `⟨F, F̂⟩` and `‖F̂‖²` of a block and a sum of Kronecker products, without forming either."""
    Z = matrix_map(tap, kron.forms_of(pairs[0]), pairs[0].G)
    products = torch.stack([kron.dot(Z.left(pair.G), pair.A) for pair in pairs])
    return products.sum(), kron.inner(pairs, pairs).sum()
