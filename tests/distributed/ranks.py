"""Ranks for tests: one process per rank, connected by gloo, which run a task of this folder and write its results.

The processes are copies of this one (`tests/forked.py`), which saves the import of torch in each of them.
"""

import datetime
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.forked import Forked

ROOT = Path(__file__).parents[2]


def together(size: int, task: str, folder: Path, seconds: float = 600.0) -> list[Any]:
    """Return what the function `task` ("module:function") returned on each of `size` connected ranks."""
    code = "import sys; from tests.distributed.ranks import main; main(*sys.argv[1:])"
    command = [sys.executable, "-c", code, task, str(folder), str(size)]
    quiet = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "FISHERFN_FOLDER": str(folder)}
    log = [(folder / f"rank-{rank}.log").open("w") for rank in range(size)]
    ranks = [
        Forked(
            [*command, str(rank)], cwd=ROOT, env=os.environ | quiet, stdout=log[rank], stderr=log[rank],
            stdin=subprocess.DEVNULL,
        )
        for rank in range(size)
    ]  # fmt: skip
    try:
        end, codes = time.monotonic() + seconds, [None]
        while None in codes and not any(codes) and time.monotonic() < end:  # the others wait for a rank that failed
            time.sleep(0.05)
            codes = [rank.poll() for rank in ranks]
    finally:
        for rank, file in zip(ranks, log, strict=True):
            rank.kill()
            rank.wait()
            file.close()
    assert codes == [0] * size, "\n".join(Path(file.name).read_text()[-2000:] for file in log)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(size)]


def main(task: str, folder: str, size: str, rank: str) -> None:
    """Run the task of one rank."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), int(size))
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=int(size), timeout=timeout)
    module, function = task.split(":")
    sys.modules.pop(module, None)  # the copy has forgotten the modules of the apps that it was imported with
    found = getattr(importlib.import_module(module), function)(int(rank))
    torch.save(found, Path(folder) / f"rank-{rank}.pt")
    if dist.is_initialized():  # a task may have ended its group
        dist.barrier()
        dist.destroy_process_group()
