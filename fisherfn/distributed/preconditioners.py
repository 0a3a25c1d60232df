"""Inverses that stay with their owners: each rank preconditions its blocks, and one message gives the results to all.

A rank holds the inverses of its own blocks only. In return, every step sends one more gradient.

Pauloski et al. 2021, *KAISA: an adaptive second-order optimizer framework for deep neural networks*, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import masked, tree
from fisherfn.base import Estimated, Method, Preconditioned
from fisherfn.distributed.owners import Owned, from_owners, leaves, rebuilt, scalars, with_scalars
from fisherfn.errors import StructureError
from fisherfn.gradients import Gradient, as_matrix
from fisherfn.methods.two_level import Inverse, TwoLevel
from fisherfn.state import State
from fisherfn.taps import Tap
from fisherfn.types import PyTree, Shape, at_least_single


@dataclass(frozen=True)
class OwnerPreconditions(Owned):
    """A method whose inverses stay with their owners, which precondition: every step sends preconditioned gradients.

    The inverse of a block that another rank owns is the empty tuple. The factors of all blocks are on every rank.
    """

    def init(
        self, shapes: Mapping[str, Shape], dtype: torch.dtype, device: torch.device, damping: Tensor
    ) -> tuple[PyTree, PyTree]:
        """Return the empty state of the method, with the inverses of this rank's blocks."""
        factors: dict[str, PyTree] = {}
        inverses: dict[str, PyTree] = {}
        for key, shape in shapes.items():  # one by one, so that the inverses of others are never in memory together
            one, inverse = self.inner.init({key: shape}, dtype, device, damping)
            factors |= one
            inverses |= self.owned(inverse)
        return factors, inverses

    def invert(self, factors: PyTree, damping: Float[Tensor, ""]) -> Estimated:
        """Invert this rank's blocks; one small message gives the masks and diagnostics of all blocks to all ranks."""
        done, names = self._own(factors, damping), self._diagnostics(factors, damping)
        nothing = torch.zeros(1 + len(names), dtype=torch.float64, device=damping.device)
        rows = [torch.stack(scalars(done, key, names)) if key in done.ok else nothing for key in factors]
        (table,) = self.ranks.total("checks", [torch.stack(rows)])
        inverses = {key: done.factors.get(key, ()) for key in factors}
        return with_scalars(inverses, dict(zip(factors, table, strict=True)), names, damping)

    def precondition(self, inverses: PyTree, gradients: Mapping[str, Gradient], inner: bool) -> Preconditioned:
        """Precondition this rank's blocks, and return the preconditioned gradients of all blocks.

        Raises:
            StructureError: inside a transform such as `torch.vmap`, where no message can be sent.
        """
        if not masked.is_concrete(torch.empty(())):
            raise StructureError(
                'no message can be sent inside torch.vmap or torch.func.grad, and precondition="owner" sends the '
                "preconditioned gradients: use ng.local with the state ng.gathered(state), which has all inverses."
            )
        owner = self.owner
        mine = {key: each for key, each in gradients.items() if owner[key] == self.ranks.rank}
        like = {key: _matrix_like(each) for key, each in gradients.items()}
        done = self.inner.precondition({key: inverses[key] for key in mine}, mine, False).matrices
        sent = {key: [matrix.to(like[key].dtype)] for key, matrix in done.items()}
        found = from_owners(self.ranks, "preconditioned", owner, sent, {key: [each] for key, each in like.items()})
        nat = {key: matrix for key, (matrix,) in found.items()}
        return Preconditioned(nat, tree.dot({key: as_matrix(g) for key, g in gradients.items()}, nat) if inner else ())

    def logdet(self, inverses: PyTree, shapes: Mapping[str, Shape]) -> Float[Tensor, ""] | None:
        """Raise `StructureError`: no rank has all inverses."""
        raise StructureError(
            'with precondition="owner" no rank has all inverses: use ng.local.inverse(ng.gathered(state)).'
        )

    def owned(self, inverses: PyTree) -> PyTree:
        """Return the inverses without those of blocks that other ranks own."""
        owner = self.owner
        return {key: inverse if owner[key] == self.ranks.rank else () for key, inverse in inverses.items()}

    def gathered(self, inverses: PyTree, factors: PyTree, damping: Tensor) -> PyTree:
        """Return the inverses of all blocks, each from its owner."""
        like = self._like(factors, damping)
        sent = {key: leaves(inverse) for key, inverse in inverses.items() if self.owner[key] == self.ranks.rank}
        found = from_owners(self.ranks, "inverses", self.owner, sent, {key: leaves(like[key]) for key in like})
        return {key: rebuilt(like[key], parts) for key, parts in found.items()}


def preconditioners(method: Method) -> OwnerPreconditions | None:
    """Return the method, or the fine method of two levels, if its inverses stay with their owners."""
    inner = method.fine if isinstance(method, TwoLevel) else method
    return inner if isinstance(inner, OwnerPreconditions) else None


def alone(method: Method) -> Method:
    """Return the method of one process."""
    if isinstance(method, TwoLevel):
        return replace(method, fine=alone(method.fine))
    return method.inner if isinstance(method, Owned) else method


def with_inverses(state: State, change: Callable[[PyTree, PyTree], PyTree]) -> State:
    """Return the state with the inverses `change(inverses, factors)`; of two levels, those of the fine method."""
    inverses, factors = state.inverses, state.factors
    if isinstance(inverses, Inverse):
        return state._replace(inverses=inverses._replace(fine=change(inverses.fine, factors.fine)))
    return state._replace(inverses=change(inverses, factors))


def _matrix_like(gradient: Gradient) -> Tensor:
    """Return the preconditioned gradient of a block, without values."""
    if isinstance(gradient, Tap):
        k, _, _, _, o, i = gradient.sizes
        return torch.empty(k, o, i, dtype=at_least_single(gradient.dtype), device="meta")
    return torch.empty(gradient.shape, dtype=at_least_single(gradient.dtype), device="meta")
