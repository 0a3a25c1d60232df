"""More than one process: data-parallel statistics and shared-out inversions on `torch.distributed`."""

from fisherfn.distributed.build import data_parallel
from fisherfn.distributed.natgrad import DataParallel
from fisherfn.distributed.ranks import Ranks, Shard
from fisherfn.distributed.states import SharedStates
from fisherfn.distributed.stats import ReducedStats
from fisherfn.shares import costs as inversion_costs
from fisherfn.shares import owners as inversion_owners

__all__ = [
    "DataParallel",
    "Ranks",
    "ReducedStats",
    "Shard",
    "SharedStates",
    "data_parallel",
    "inversion_costs",
    "inversion_owners",
]
