"""The drop-in classes in several processes: each passes its part of the batch, and all take the step of the whole."""

from __future__ import annotations

import torch
import torch.distributed as dist

from fisherfn.distributed import DataParallel, Ranks, data_parallel
from fisherfn.distributed.agreement import agreed, nothing, of_tensors
from fisherfn.distributed.states import SHAPES
from fisherfn.errors import StructureError
from fisherfn.natgrad import NaturalGradient
from fisherfn.types import Tree


def several() -> bool:
    """Return True if a group of several processes exists."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def agree_on_inputs(shapes: object, finite: bool) -> bool:
    """Return True if the inputs of all processes are finite.

    Raises:
        RankError: the processes have examples of different shapes.
    """
    return all(agreed(Ranks(), {SHAPES: shapes}, lambda: int(finite)).counts) if several() else finite


def spread(ng: NaturalGradient, saved: Tree | None = None, compiled: bool = False) -> NaturalGradient:
    """Return the natural gradient of all processes; in a single process, the given one.

    Args:
        ng: the natural gradient of this process.
        saved: the state with which it goes on, if there is one.
        compiled: True if steps are compiled.

    Raises:
        StructureError: compiled steps, or a net that couples examples.
        RankError: the processes have different nets, settings or states.
    """
    if not several():
        return ng
    if compiled:
        raise StructureError("compile=True needs a single process: messages between ranks are no part of a graph.")
    together = data_parallel(ng)
    agreed(
        together.ranks,
        {"the state before the first step (loaded, or of steps alone)": of_tensors(saved or {})},
        nothing,
    )
    return together


def averaged(grads: Tree, examples: int) -> Tree:
    """Return the mean of the gradients of all processes, each counted by its examples.

    Gradients that `DistributedDataParallel` has averaged already are equal on all ranks, and stay as they are.
    """
    if not several():
        return grads
    count = torch.tensor(float(examples), dtype=torch.float64)
    mine = [grad * examples if examples else torch.zeros_like(grad) for grad in grads.values()]
    *sums, total = Ranks().total("gradient", [*mine, count.to(next(iter(grads.values())).device)])
    return {name: part / float(total) for name, part in zip(grads, sums, strict=True)}


def anywhere(holds: bool) -> bool:
    """Return True if something holds on one of the processes, which all of them ask."""
    if not several():
        return holds
    return bool(Ranks().table("a flag", torch.tensor([int(holds)])).any())


def alone(what: str) -> None:
    """Raise `StructureError` in one of several processes, for what only a single process can do."""
    if several():
        raise StructureError(
            f"{what} needs a single process, because its gradient is that of this rank's examples only: pass this "
            "rank's part of the batch to step, which averages over the ranks."
        )


def dropout(ng: NaturalGradient | None) -> DataParallel | None:
    """Return the natural gradient that draws dropout seeds for the global batch; None in a single process."""
    return ng if isinstance(ng, DataParallel) else None
