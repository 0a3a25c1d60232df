"""Blocks of equal shapes as one: their tensors side by side along the first axis, so that one call does the work.

Many layers of a net often have the same shape, and each small tensor costs as many calls as a large one. Functions on a
block are batched over its groups anyway, so the groups of several blocks can be those of one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor

from fisherfn import tree
from fisherfn.types import PyTree

T = TypeVar("T", bound=PyTree)

WIDEST = 256
"""Width up to which joining pays: at 64 it saves half of an inversion's time, at 256 a twentieth."""


def together(
    fn: Callable[[PyTree], tuple[PyTree, Tensor, Mapping[str, Tensor]]], blocks: Mapping[str, PyTree], widest: int
) -> tuple[dict[str, PyTree], dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Call a function on all blocks, once per shape, and return its results by block: trees, masks and numbers.

    Args:
        fn: function of a block that returns a tree with the groups as first axis, and per group a mask and numbers.
        blocks: trees with the groups as first axis.
        widest: a block with a wider axis is not joined with others.
    """
    trees, masks, numbers = dict[str, PyTree](), dict[str, Tensor](), dict[str, dict[str, Tensor]]()
    for keys in sort(blocks, widest):
        found, sound, measured = fn(join([blocks[key] for key in keys]))
        own = {name: summary(values, len(keys)) for name, values in measured.items()}
        trees |= dict(zip(keys, part(found, len(keys)), strict=True))
        masks |= dict(zip(keys, summary(sound, len(keys)), strict=True))
        numbers |= {key: {name: values[place] for name, values in own.items()} for place, key in enumerate(keys)}
    return (
        {key: trees[key] for key in blocks},
        {key: masks[key] for key in blocks},
        {key: numbers[key] for key in blocks},
    )


def each(fn: Callable[[T], T], blocks: Mapping[str, T], widest: int = WIDEST) -> dict[str, T]:
    """Call a function from blocks to blocks on all of them, once per shape.

    >>> each(torch.neg, {"a": torch.ones(1), "b": torch.zeros(1), "c": torch.zeros(1, 2)})
    {'a': tensor([-1.]), 'b': tensor([-0.]), 'c': tensor([[-0., -0.]])}
    """
    groups = sort(blocks, widest)
    parts = [zip(keys, part(fn(join([blocks[key] for key in keys])), len(keys)), strict=True) for keys in groups]
    return {key: block for found in parts for key, block in found}


def sort(blocks: Mapping[str, PyTree], widest: int) -> list[list[str]]:
    """Return the keys of the blocks, those of equal shapes and types together; a block with a wider axis is alone.

    >>> sort({"a": torch.ones(1, 2), "b": torch.ones(1, 3), "c": torch.ones(1, 2)}, widest=3)
    [['a', 'c'], ['b']]
    """
    found: dict[Hashable, list[str]] = {}
    for key, block in blocks.items():
        leaves = tree.leaves(block)
        wide = any(width > widest for leaf in leaves for width in leaf.shape[1:])
        kind = tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves)
        found.setdefault(key if wide else kind, []).append(key)
    return list(found.values())


def join(blocks: Sequence[T]) -> T:
    """Return blocks of equal shapes as one."""
    return blocks[0] if len(blocks) == 1 else tree.map(lambda *leaves: torch.cat(leaves), *blocks)


def part(joined: T, count: int) -> list[T]:
    """Return the blocks of which one was joined.

    >>> part(torch.arange(6), 3)
    [tensor([0, 1]), tensor([2, 3]), tensor([4, 5])]
    """
    if count == 1:
        return [joined]
    parts = [leaf.chunk(count) for leaf in tree.leaves(joined)]
    return [tree.replace_leaves(joined, leaves) for leaves in zip(*parts, strict=True)]


def summary(x: Shaped[Tensor, " groups"], count: int) -> tuple[Shaped[Tensor, ""], ...]:
    """Return a number per block for numbers per group: whether all are true, the sum of counts, else the largest.

    >>> summary(torch.tensor([True, False, True, True]), 2)
    (tensor(False), tensor(True))
    """
    over = torch.all if x.dtype == torch.bool else torch.amax if x.is_floating_point() else torch.sum
    return over(x.reshape(count, -1), 1).unbind() if count > 1 else (over(x, 0),)
