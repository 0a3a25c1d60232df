"""Several processes that train one net, as torchrun starts them: each takes its part of every batch.

All functions are those of one process if there is no process group, so trainers need no second path.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fisherfn as ff
from common.config import ConfigError

Tree = dict[str, Tensor]

SECONDS = "FISHERFN_TIMEOUT"
"""Variable with the seconds after which a silent rank ends the job: 20 if it is not set."""

ONE_PROCESS = {
    "compile": "the messages between ranks are no part of a compiled step",
    "cg_steps": "conjugate gradients through the model use the examples of one process",
    "fisher_batch_size": "the first examples of a batch are those of the first ranks",
}
"""Options that only one process can use, and the reason."""


@contextlib.contextmanager
def joined(device: str) -> Iterator[str]:
    """Join the processes that torchrun started, and yield this one's device; nothing happens in a single process."""
    if not started():
        yield device
        return
    device = own(device)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=float(os.environ.get(SECONDS, "20")))
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timeout)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def alone(app: str) -> None:
    """Check that torchrun did not start several processes of an app, each of which would train alone."""
    if started():
        raise ConfigError(f"{app} trains in a single process: start it without torchrun")


def several() -> bool:
    """Return True if more than one process trains the net."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def first() -> bool:
    """Return True on the process that writes results and prints."""
    return not several() or dist.get_rank() == 0


def part(examples: int) -> slice:
    """Return the examples of the global batch that are this process's: contiguous, and even up to one."""
    if not several():
        return slice(0, examples)
    rank, size = dist.get_rank(), dist.get_world_size()
    share, more = divmod(examples, size)
    start = rank * share + min(rank, more)
    return slice(start, start + share + (rank < more))


def spread(ng: ff.NaturalGradient) -> ff.NaturalGradient:
    """Return the natural gradient of all processes."""
    return ff.distributed.data_parallel(ng) if several() else ng


def added(what: str, *numbers: float) -> list[float]:
    """Return the sums of numbers over all processes."""
    if not several():
        return list(numbers)
    return [float(total) for total in _ranks().total(what, [torch.tensor(n, dtype=torch.float64) for n in numbers])]


def mean(grads: Tree, loss: Tensor, examples: int) -> tuple[Tree, Tensor]:
    """Return the gradient and loss of the global batch, given those of this process's examples."""
    if not several():
        return grads, loss
    mine = [leaf * examples if examples else torch.zeros_like(leaf) for leaf in (*grads.values(), loss)]
    *sums, count = _ranks().total("gradient", [*mine, loss.new_tensor(float(examples))])
    *means, loss = (total / count for total in sums)
    return dict(zip(grads, means, strict=True)), loss


def signalled(signals: list[int]) -> int:
    """Return the number of a signal that any process received, 0 for none: all stop after the same step."""
    mine = signals[0] if signals else 0
    return int(_ranks().table("signal", torch.tensor([mine])).max()) if several() else mine


def check_options(config: Any, net: nn.Module) -> None:
    """Raise `ConfigError` if several processes cannot train as configured."""
    for name, reason in ONE_PROCESS.items():
        if several() and getattr(config, name):
            raise ConfigError(f"{name} needs a single process, because {reason}: start it without torchrun")
    couples = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())
    if several() and couples:
        raise ConfigError(
            "the net has batch norm, and each process would normalise by its own examples: choose a model without it, "
            "or start it without torchrun"
        )


def own(device: str) -> str:
    """Return this process's GPU instead of "cuda" if torchrun started several processes; any other device as it is."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and started() else device


def started() -> bool:
    """Return True if torchrun started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ


def _ranks() -> ff.distributed.Ranks:
    return ff.distributed.Ranks()
