"""The task of the ranks: trainers in groups of other sizes, as torchrun would start them one after the other."""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist

import fisherfn as ff
from common import ranks, runs
from common.config import ConfigError, read
from common.data import load
from common.train_config import TrainConfig
from common.trainer import Supervised, run

OPTIMS = ("kfac", "adam")
COMMON = ("--data", "own:load", "--model", "own:net", "--batch_size", "9", "--quiet", "--num_epochs", "3")
NET = """
class Double(nn.Module):
    def forward(self, x):
        return x.double()

def net(data):
    return nn.Sequential(Double(), nn.Linear(12, 5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 2)).double()
"""
INIT = dist.init_process_group

STOP = 6
"""Step after which rank 1 is told to stop: in the second epoch."""


def train(optim: str, name: str, *more: str) -> Path:
    options = ("--optim", optim, "--result_name", name, "--result_dir", os.environ["FISHERFN_FOLDER"], *more)
    lr = ("--lr", "0.01") if optim == "adam" else ()
    return run(read(TrainConfig, [*COMMON, *lr, *options]))


@contextlib.contextmanager
def group(size: int, rank: int, at: int):
    """The environment of a group, in which a rank that is too many takes no part; its store is a file, not a port."""
    store = Path(os.environ["FISHERFN_FOLDER"], f"store-{at}")
    os.environ |= {"WORLD_SIZE": str(size), "RANK": str(rank), "MASTER_ADDR": "none"}

    def formed(backend, timeout):
        INIT(backend, store=dist.FileStore(str(store), size), rank=rank, world_size=size, timeout=timeout)

    dist.init_process_group = formed
    yield rank < size
    os.environ["WORLD_SIZE"] = "1"


def everything(rank: int):
    """4 ranks are stopped in the middle of the second epoch, 2 go on to its end, 3 train the last one."""
    folder = Path(os.environ["FISHERFN_FOLDER"])
    sys.path.insert(0, str(folder))
    dist.barrier()
    dist.destroy_process_group()
    os.environ["FISHERFN_TIMEOUT"] = "60"
    found = {"codes": []}
    for at, optim in enumerate(OPTIMS):
        with group(4, rank, at):
            found["codes"].append(stopped(rank, optim))
        for size, epochs in ((2, "2"), (3, "3")):
            with group(size, rank, size * len(OPTIMS) + at - 2) as member:
                if member:
                    train(optim, optim, "--resume", "--num_epochs", epochs)
    with group(2, rank, 7) as member:
        if member:
            with ranks.joined("cpu"):
                found["refused"] = [refused(*options) for options in REFUSED]
    os.environ["FISHERFN_TIMEOUT"] = "8"
    with group(3, rank, 8) as member:
        if member:
            found["silent"] = silent(rank)
    return found


def stopped(rank: int, optim: str) -> int:
    """Train until rank 1, and no other, is told to stop; return the exit code of this rank."""
    watched = runs.watched

    def told(results, save_every, signals, step, at):
        if rank == 1 and step == STOP:
            os.kill(os.getpid(), signal.SIGTERM)
        watched(results, save_every, signals, step, at)

    runs.watched = told
    try:
        train(optim, optim)
    except runs.Stopped as ended:
        return ended.code
    finally:
        runs.watched = watched
    return 0


REFUSED = (("kfac", "--compile"), ("kfac", "--fisher_batch_size", "4"), ("adam", "--model", "own:build"))


def refused(optim: str, *options: str) -> str:
    config = read(TrainConfig, [*COMMON, "--optim", optim, "--lr", "0.1", *options])
    try:
        Supervised(config, load(config.data, data_path=None, seed=0, download=False))
    except ConfigError as error:
        return str(error)
    return "none"


def silent(rank: int) -> str:
    """The error of the ranks that wait for rank 1, which is connected but takes no part."""
    text, marks = "", [Path(os.environ["FISHERFN_FOLDER"], f"mark-{each}") for each in (0, 2)]
    with ranks.joined("cpu"):
        if rank != 1:
            try:
                ranks.added("test", 1.0)
            except ff.errors.RankError as error:
                text = str(error)
            marks[rank // 2].touch()
        while not all(mark.exists() for mark in marks):
            time.sleep(0.05)
    return text
