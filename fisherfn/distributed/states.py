"""States of several processes: whole ones, and ones in which each rank has the inverses of its own blocks only."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial

from torch import Tensor

from fisherfn.base import Preconditioned
from fisherfn.distributed.agreement import agreed, fingerprint
from fisherfn.distributed.preconditioners import OwnerPreconditions, alone, preconditioners, with_inverses
from fisherfn.distributed.ranks import Ranks
from fisherfn.distributed.sharded import placement, sharding_of, stand_ins
from fisherfn.distributed.stats import ReducedStats
from fisherfn.errors import StructureError, expect
from fisherfn.gradients import NOTHING, Own
from fisherfn.natgrad import NaturalGradient
from fisherfn.state import State
from fisherfn.stats import Stats
from fisherfn.types import Tree


@dataclass(frozen=True)
class SharedStates(NaturalGradient):
    """The part of a data-parallel natural gradient that reads a state.

    Attributes:
        ranks: the group, and how messages are sent through it.
    """

    ranks: Ranks

    def precondition(self, state: State, grads: Tree | Stats) -> Tree:
        """Return the preconditioned gradient; see `NaturalGradient.precondition`.

        With `precondition="owner"` or sharded gradients this sends messages, so all ranks call it. The result is
        sharded as the gradients are.

        Raises:
            RankError: on every rank, if the call failed on one of them.
        """
        placed = placement(grads)
        if self._preconditioners is None and not placed:
            return super().precondition(state, grads)

        def fits() -> int:
            self._check_state(state)
            if isinstance(grads, Stats):
                expect(grads, ReducedStats, "statistics", "pass what ng.stats or ng.reduced returned")
                self._check_stats(grads)
            else:
                sharding_of(grads, self.ranks)
                self.layout.validate(stand_ins(grads))
            return 0

        agreed(self.ranks, {"the arguments of ng.precondition": (isinstance(grads, Stats), placed)}, fits)
        if isinstance(grads, Stats) or (sharding := sharding_of(grads, self.ranks)) is None:
            return self._precondition(state, grads, inner=False)[0]
        return sharding.scatter(self._precondition(state, sharding.gather(grads), inner=False)[0])

    def fisher_divergence(self, state: State, stats: Stats) -> dict[str, Tensor]:
        """Return the divergence of each block for the global batch; see `NaturalGradient.fisher_divergence`.

        All ranks call it, because the questions to the statistics are messages.
        """
        return self.local.fisher_divergence(self.gathered(state), stats)

    def gathered(self, state: State) -> State:
        """Return the state with the inverses of all blocks, as one process has it: for checkpoints and operators.

        With `precondition="owner"` each rank has the inverses of its own blocks only, and this is one message, so all
        ranks call it. Else the result is the state itself. `ng.local` takes the result, and `owned` is the inverse.
        """

        def fits() -> int:
            self._check_state(state)
            return 0

        if (method := self._preconditioners) is None:
            return state
        agreed(self.ranks, {"the call of ng.gathered": 0}, fits)
        return with_inverses(state, partial(method.gathered, damping=state.damping))

    def owned(self, state: State) -> State:
        """Return the state without the inverses of blocks that other ranks own, given one with all; sends nothing.

        For a state of one process, or one that `gathered` returned, on any number of ranks.
        """
        self.local._check_state(state)
        method = self._preconditioners
        return state if method is None else with_inverses(state, lambda inverses, _: method.owned(inverses))

    @property
    def local(self) -> NaturalGradient:
        """Return the natural gradient of this rank alone: for statistics that `reduced` takes, and whole states."""
        parts = {field.name: getattr(self, field.name) for field in fields(NaturalGradient)}
        return NaturalGradient(**parts | {"method": alone(self.method)})

    # ---------------------------------------------------------------------------------------------------------

    @property
    def _preconditioners(self) -> OwnerPreconditions | None:
        """Return the method whose inverses stay with their owners, if there is one."""
        return preconditioners(self.method)

    def _precondition(
        self, state: State, grads: Tree | Stats, inner: bool, own: Own = NOTHING
    ) -> tuple[Tree, Preconditioned]:
        """Return the preconditioned gradient, sharded as the parameters of the statistics are."""
        nat, product = super()._precondition(state, grads, inner, own)
        sharding = grads.sharding if isinstance(grads, ReducedStats) else None
        return nat if sharding is None else sharding.scatter(nat), product

    def _check_state(self, state: State) -> None:
        """Raise unless the state belongs to this method on this net, with the inverses of this rank's blocks."""
        try:
            super()._check_state(state)
        except StructureError as error:
            if self._preconditioners is None or not isinstance(state, State):
                raise
            raise StructureError(
                f"the state does not have exactly the inverses of the blocks that rank {self.ranks.rank} of "
                f'{self.ranks.size} owns, as precondition="owner" needs: it has all inverses, or those of another rank '
                "or of another number of ranks. Save ng.gathered(state), and after loading pass ng.owned(state)."
            ) from error


SHAPES = "the shape of an example (pad the batches of all ranks to one length)"
"""The name of an example's shape in errors: ranks that pad to their own longest sequence disagree on it."""


def same_model(ng: NaturalGradient) -> dict[str, object]:
    """Return what must be equal on all ranks in every call, by the name that an error gives it."""
    return {"model, method or likelihood": _identity(ng), SHAPES: (ng.layout.input_shapes, ng.layout.output_shape)}


def _identity(ng: NaturalGradient) -> int:
    """Return the fingerprint of the blocks, method and likelihood of a natural gradient."""
    layout = ng.layout
    blocks = [(block.key, block.names, block.kind, tuple(block.shape)) for block in layout.blocks]
    shapes = (layout.shapes, layout.dtypes)
    method = alone(ng.method)
    return fingerprint((blocks, shapes, method, type(ng.likelihood).__name__, ng.fisher_kind, ng.samples))
