"""The builder of data-parallel natural gradients: who inverts, who preconditions, and what must agree between ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, TypeAlias, get_args

import torch

from fisherfn.base import LayerMethod, Method
from fisherfn.distributed.agreement import agreed, nothing
from fisherfn.distributed.natgrad import DataParallel, check_uncoupled
from fisherfn.distributed.owners import Owned, leaves, part_sizes
from fisherfn.distributed.preconditioners import OwnerPreconditions
from fisherfn.distributed.ranks import Ranks, crossing
from fisherfn.distributed.states import same_model
from fisherfn.errors import HyperparameterError, StructureError, expect, expect_count, unknown
from fisherfn.methods.two_level import TwoLevel
from fisherfn.natgrad import NaturalGradient
from fisherfn.shares import costs, owners

Precondition: TypeAlias = Literal["everywhere", "owner", "auto"]
"""The rank that multiplies the gradient of a block by its inverse: every rank, its owner, or whichever sends less."""


def data_parallel(
    ng: NaturalGradient,
    *,
    group: Any = None,
    share_inversions: bool = True,
    precondition: Precondition | str = "everywhere",
    invert_every: int | None = None,
    observe: Callable[[str, int], None] | None = None,
) -> DataParallel:
    """Return a natural gradient with the same calls, whose batches are spread over the ranks of a process group.

    Every rank passes its part of the batch, of any size; the result is that of one process with the whole batch, in
    order of rank. Parameters are equal on all ranks, or sharded on their first dimension (`fully_shard`).

    Args:
        ng: the natural gradient, built alike on every rank.
        group: a group of `torch.distributed`; None for all ranks.
        share_inversions: whether each block is inverted by one rank only. False: every rank inverts all blocks, which
            sends nothing.
        precondition: "everywhere" gives all inverses to all ranks in steps that invert. With "owner" a rank has the
            inverses of its own blocks only, and each step sends the preconditioned gradient. "auto" sends less.
        invert_every: steps between refreshes of the inverses, from which "auto" counts the bytes.
        observe: called with the purpose and the payload in bytes of each message, for measurements.

    Raises:
        StructureError: there is no process group, the net couples the examples of a batch (batch norm), or the blocks
            have no owners (exact natural gradient).
        UnknownNameError: another word for `precondition`.
        HyperparameterError: "auto" without `invert_every`.
        RankError: the models, methods or likelihoods of the ranks differ.
    """
    expect(ng, NaturalGradient, "ng", "pass what ff.natural_gradient returned")
    if isinstance(ng, DataParallel):
        raise StructureError("this natural gradient is data-parallel already: pass the one of ff.natural_gradient.")
    ranks = Ranks(group, observe)
    check_uncoupled(ng.layout, ranks)
    _check_form(ng.method, precondition, share_inversions, invert_every)
    form = (share_inversions, precondition, invert_every)
    facts = {**same_model(ng), "share_inversions, precondition or invert_every": form}
    agreed(ranks, facts, nothing)
    owns = precondition == "owner" or (
        precondition == "auto" and owner_sends_less(ng.method, ng, ranks.size, invert_every or 1)
    )
    kind = OwnerPreconditions if owns else Owned
    method = shared(ng.method, ng, ranks, kind) if share_inversions and ranks.size > 1 else ng.method
    return DataParallel(ng.model, ng.layout, ng.likelihood, ng.fisher_kind, ng.samples, method, ranks)


def shared(method: Method, ng: NaturalGradient, ranks: Ranks, kind: type[Owned] = Owned) -> Method:
    """Return the method with shared-out inversions; a method that solves one system is left as it is."""
    if isinstance(method, TwoLevel):
        return replace(method, fine=shared(method.fine, ng, ranks, kind))
    return kind(method, ng.layout.block_shapes, ranks) if isinstance(method, LayerMethod) else method


def owner_sends_less(method: Method, ng: NaturalGradient, ranks: int, invert_every: int) -> bool:
    """Return True if preconditioned gradients in every step are fewer bytes than inverses every few steps.

    A two-level method preconditions several times per step, so the answer for it is False.
    """
    if not isinstance(method, LayerMethod):
        return False
    shapes, meta = ng.layout.block_shapes, torch.device("meta")
    dtype = ng.layout.precision
    _, inverses = method.init(shapes, dtype, meta, torch.ones((), dtype=dtype, device=meta))
    owner = owners(costs(shapes, getattr(method, "diagonal_above", 0)), ranks)
    matrices = {key: [torch.empty(s.k, s.o, s.i, dtype=dtype, device=meta)] for key, s in shapes.items()}
    rarely = crossing(part_sizes(owner, {key: leaves(inverse) for key, inverse in inverses.items()}, ranks))
    return crossing(part_sizes(owner, matrices, ranks)) * invert_every < rarely


def _check_form(method: Method, precondition: str, share_inversions: bool, invert_every: int | None) -> None:
    """Raise unless the method has owners that could precondition, where this is asked for."""
    if precondition not in get_args(Precondition):
        raise unknown("precondition", precondition, get_args(Precondition))
    if invert_every is not None:
        expect_count("invert_every", invert_every)
    if precondition == "auto" and invert_every is None:
        raise HyperparameterError(
            'precondition="auto" compares inverses every few steps with preconditioned gradients in every step: pass '
            "the number of steps between refreshes of the inverses as invert_every."
        )
    if precondition == "everywhere":
        return
    if not share_inversions:
        raise StructureError(
            f'precondition="{precondition}" needs blocks with owners, and share_inversions=False inverts all blocks on '
            "every rank: leave out one of the two."
        )
    if precondition == "owner" and not isinstance(method.fine if isinstance(method, TwoLevel) else method, LayerMethod):
        raise StructureError(
            f"{method.name} solves one system for all blocks on every rank, so no rank owns a block: leave out "
            'precondition="owner", or use a method with an inverse per block, such as ff.kfac().'
        )
