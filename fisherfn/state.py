"""The state of a natural gradient: all values that are carried from step to step."""

from __future__ import annotations

from collections.abc import Collection
from functools import reduce
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch._C._functorch import maybe_current_level

from fisherfn import tree
from fisherfn.types import Info, PyTree
from fisherfn.which import Which, includes


class State(NamedTuple):
    """The state of a method: a pytree of tensors, including the hyperparameters that may vary.

    Attributes:
        damping: λ, in the units of the Fisher of the mean loss.
        ema: weight of the old factors in the running average.
        count: number of updates so far, each of all blocks or of some.
        examples: mean number of examples per update, or mean weight: a smaller batch counts less in the average.
        factors: the result of `update` for each block, in the method's own structure.
        inverses: the result of `invert`, computed from the factors.
        block_count: number of updates of each block, in the order of the blocks.
        block_examples: mean number of examples per update of each block.
    """

    damping: Float[Tensor, ""]
    ema: Float[Tensor, ""]
    count: Int[Tensor, ""]  # type: ignore[assignment]  # shadows the tuple's own method
    examples: Float[Tensor, ""]
    factors: PyTree
    inverses: PyTree
    block_count: Int[Tensor, " b"] | tuple[()] = ()
    block_examples: Float[Tensor, " b"] | tuple[()] = ()

    def complete(self, keys: Collection[str]) -> State:
        """Return the state with counts for each block, which are all equal in one from a version without them."""
        block_count, block_examples = self._of_blocks(len(keys))
        return self._replace(block_count=block_count, block_examples=block_examples)

    def counted(
        self, n: float | Tensor, keys: Collection[str], which: Which = True
    ) -> tuple[State, dict[str, Float[Tensor, ""]]]:
        """Count one more update of some blocks with n examples; return also the weight ρ of each one's old factors.

        ρ = min(1 − 1/k, ema) in update k of a block for batches of equal size; a smaller batch counts less. ρ is NaN if
        ema or n is outside its range, which makes the averages NaN and their masks false.
        """
        old_count, old_examples = self._of_blocks(len(keys))
        count, examples, _ = self._averaged(self.count, self.examples, n)
        block_count, block_examples, rho = self._averaged(old_count, old_examples, n)
        valid = (self.ema >= 0) & (self.ema <= 1) & (n > 0)
        rho = torch.where(valid, rho, torch.nan)
        if which is not True:
            mask = torch.tensor([includes(which, key) for key in keys], device=self.ema.device)
            block_count = torch.where(mask, block_count, old_count)
            block_examples = torch.where(mask, block_examples, old_examples)
        new = self._replace(count=count, examples=examples, block_count=block_count, block_examples=block_examples)
        return new, {key: each for key, each in zip(keys, rho.unbind(), strict=True) if includes(which, key)}

    def _of_blocks(self, blocks: int) -> tuple[Tensor, Tensor]:
        """Return the number of updates of each block, and their mean number of examples."""
        if isinstance(self.block_count, Tensor) and isinstance(self.block_examples, Tensor):
            return self.block_count, self.block_examples
        return self.count.repeat(blocks), self.examples.repeat(blocks)

    def _averaged(self, count: Tensor, examples: Tensor, n: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next number of updates, their mean number of examples, and ρ."""
        k = (count + 1).to(self.ema.dtype)
        # a state from a version that did not count examples: assume that its batches had this size
        before = torch.where((count > 0) & (examples == 0), n, examples)
        mean = before + (n - before) / k
        r = n / mean
        return count + 1, mean, torch.minimum(1 - r / k, self.ema / (1 + (1 - self.ema) * (r - 1)))


def detached(averages: PyTree, loss: Tensor) -> PyTree:
    """Return averages without an autograd graph if this loss has one: in a state it would grow with every update.

    Parameters that require grad record a graph outside torch.func's transforms only, whose derivatives stay.
    """
    if not loss.requires_grad or maybe_current_level() is not None:
        return averages
    return tree.map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, averages)


def info_of(keys: Collection[str], checks: dict[str, Any], **measured: Any) -> Info:
    """Return an `Info` whose masks combine these checks; checks of the batch apply to every block."""
    batch = [mask for mask in checks.values() if isinstance(mask, Tensor)]
    blocks = [torch.stack([masks[key] for key in keys]) for masks in checks.values() if isinstance(masks, dict)]
    masks = [torch.stack(batch).all().expand(len(keys)), *blocks] if batch else blocks
    ok = reduce(torch.logical_and, masks).unbind()
    return Info(checks=checks, ok=dict(zip(keys, ok, strict=True)), **measured)


def if_ok(info: Info, new: State, old: State) -> State:
    """Return the new state if all checks passed, else the old one."""
    return tree.select(torch.stack(list(info.ok.values())).all(), new, old)
