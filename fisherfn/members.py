"""Many models at once: trees whose leaves have the members as first axis, for `torch.vmap`.

Params, states and hyperparameters are trees, so a group of models is one tree per kind: `stack` makes it, `take` reads
members from it, and `select` decides for each member whether a step counts. A sweep is then a vmapped step:

    params = members.stack([init(seed) for seed in seeds])
    states = torch.vmap(lambda p, damping: ng.init(p, damping=damping))(params, dampings)
    new, new_states, info = torch.vmap(step)(params, states, rates)
    sound = members.sound(info)
    params, states = members.select(sound, (new, new_states), (params, states))  # the others stay where they were
    params, states = members.take((params, states), losses.argsort()[:8])  # successive halving
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from fisherfn import tree
from fisherfn.errors import ShapeError, StructureError, expect
from fisherfn.types import Info, PyTree

T = TypeVar("T", bound=PyTree)


def stack(trees: Sequence[T]) -> T:
    """Return one tree whose leaves are those of all members, stacked along a new first axis.

    Args:
        trees: params, states, contexts or hyperparameters of the members, all of one structure.

    Raises:
        StructureError: no members, or members of different structures.
        ShapeError: a leaf has another shape in some member.

    >>> stack([{"w": torch.zeros(2)}, {"w": torch.ones(2)}])
    {'w': tensor([[0., 0.],
            [1., 1.]])}
    """
    if not trees:
        raise StructureError("there are no members to stack: pass a list with at least one tree.")
    for place, other in enumerate(trees):
        if not tree.fits(other, trees[0], Tensor):
            raise StructureError(
                f"member {place} has another structure than member 0: build all members from one model and one method."
            )
    return tree.map(_stacked, *trees)


def repeat(one: T, members: int) -> T:
    """Return a tree in which every member has the leaves of `one`.

    >>> repeat({"w": torch.ones(2)}, 3)["w"].shape
    torch.Size([3, 2])
    """
    return tree.map(lambda leaf: leaf.expand(members, *leaf.shape).clone(), one)


def size(group: PyTree) -> int:
    """Return the number of members.

    Raises:
        StructureError: a tree without leaves.
        ShapeError: the leaves differ in their first axis, or have none.
    """
    leaves = tree.leaves(group)
    if not leaves:
        raise StructureError("a tree without leaves has no members: pass what `stack` or a vmapped function returned.")
    sizes = {leaf.shape[0] for leaf in leaves if leaf.ndim}
    without = ["no"] if any(leaf.ndim == 0 for leaf in leaves) else []
    if without or len(sizes) > 1:
        found = " and ".join([*without, *map(str, sorted(sizes))])
        raise ShapeError(
            f"there are leaves with {found} members: every leaf needs the same first axis. Did you pass the tree of "
            "one model instead of a group?"
        )
    return int(sizes.pop())


def take(group: T, index: int | Sequence[int] | Int[Tensor, "..."]) -> T:
    """Return one member, or a group of the members with these indices, in this order and with repetitions.

    Args:
        group: a tree of members.
        index: a number for a single member without its axis; a list or a tensor of numbers for a group.

    Raises:
        StructureError: an index of no member.
        ShapeError: leaves without members, as of a single model.

    >>> take({"w": torch.arange(6).reshape(3, 2)}, [2, 0])
    {'w': tensor([[4, 5],
            [0, 1]])}
    """
    count = size(group)
    numbers = torch.as_tensor(index)
    numbers = numbers if numbers.numel() else numbers.long()  # an empty list has no type of its own
    if numbers.numel() and not -count <= int(numbers.min()) <= int(numbers.max()) < count:
        raise StructureError(f"there is no member {numbers.tolist()}: the group has the members 0 to {count - 1}.")
    return tree.map(lambda leaf: leaf[numbers.to(leaf.device)], group)


def select(mask: Bool[Tensor, " members"], new: T, old: PyTree) -> T:
    """Return for each member its tree in `new` if its mask is true, else that in `old`.

    A tree in `new` that is not selected may contain NaN. No member depends on another one's mask. If a leaf of the old
    tree has another shape, which follows the batch, `tree.kept` replaces it.

    Args:
        mask: one value per member.
        new: a tree of members, for example after a step.
        old: the same before the step.

    Raises:
        ShapeError: the mask is not one value per member.

    >>> select(torch.tensor([True, False]), {"w": torch.ones(2)}, {"w": torch.zeros(2)})
    {'w': tensor([1., 0.])}
    """
    if mask.shape != (size(new),):
        raise ShapeError(f"the mask has the shape {tuple(mask.shape)}, but there are {size(new)} members.")

    def chosen(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(mask.to(a.device).reshape(-1, *[1] * (a.ndim - 1)), a, tree.kept(a, b))

    return tree.map(chosen, new, old)


def sound(info: Info) -> Shaped[Tensor, " members"]:
    """Return for each member whether its step passed all checks; `ff.check(take(info, m))` says why it did not.

    Args:
        info: the info of a vmapped step.
    """
    expect(info, Info, "info", "pass the info that the vmapped step returned")
    return torch.stack(list(info.ok.values())).all(0)


def _stacked(*leaves: Tensor) -> Tensor:
    shapes = {tuple(leaf.shape) for leaf in leaves}
    if len(shapes) > 1:
        raise ShapeError(
            f"a leaf has the shapes {sorted(shapes)} in different members: members of one group share one "
            "architecture and one batch size."
        )
    return torch.stack(leaves)
