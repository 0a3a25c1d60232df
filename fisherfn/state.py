"""The state of a natural gradient: all values that are carried from step to step."""

from __future__ import annotations

from collections.abc import Collection
from functools import reduce
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherfn import tree
from fisherfn.types import Info, PyTree


class State(NamedTuple):
    """The state of a method: a pytree of tensors, including the hyperparameters that may vary.

    Attributes:
        damping: λ, in the units of the Fisher of the mean loss.
        ema: weight of the old factors in the running average.
        count: number of updates so far.
        examples: mean number of examples per update, or mean weight: a smaller batch counts less in the average.
        factors: the result of `update` for each block, in the method's own structure.
        inverses: the result of `invert`, computed from the factors.
    """

    damping: Float[Tensor, ""]
    ema: Float[Tensor, ""]
    count: Int[Tensor, ""]  # type: ignore[assignment]  # shadows the tuple's own method
    examples: Float[Tensor, ""]
    factors: PyTree
    inverses: PyTree

    def counted(self, n: float | Tensor) -> tuple[State, Float[Tensor, ""]]:
        """Count one more update with n examples; return also the weight ρ of the old factors in the running average.

        ρ = min(1 − 1/k, ema) in update k for batches of equal size; a smaller batch counts less.
        """
        count = self.count + 1
        k = count.to(self.ema.dtype)
        # a state from a version that did not count examples: assume that its batches had this size
        before = torch.where((self.count > 0) & (self.examples == 0), n, self.examples)
        mean = before + (n - before) / k
        r = n / mean
        rho = torch.minimum(1 - r / k, self.ema / (1 + (1 - self.ema) * (r - 1)))
        return self._replace(count=count, examples=mean), rho


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
