"""The full comparison of ranks with one process: `python -m tests.distributed.matrix [methods]` prints a table.

`FISHERFN_PRECONDITION=owner` compares the form in which owners precondition, for all methods but the exact one.

Every method, with plain and adaptive steps, on 1, 2, 3 and 4 ranks with uneven shards: 20 steps in double precision,
and 200 in single precision on 3 ranks, whose parameters must agree bit for bit. It takes many minutes.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

import fisherfn as ff
from fisherfn.distributed import data_parallel
from tests import zoo
from tests.distributed import equal
from tests.distributed.ranks import together

LONG = 200


FORM = os.environ.get("FISHERFN_PRECONDITION", "everywhere")


def methods():
    known = sorted(set(ff.METHODS) - ({"exactNG"} if FORM == "owner" else set()))
    return os.environ.get("FISHERFN_MATRIX", " ".join(known)).split()


def everything(rank):
    """The parameters of this rank after each run; `single` is their fingerprint after 200 steps in float32."""
    found = {}
    problem, x, y = equal.batch()
    for size in equal.SHARDS:
        group = dist.new_group(range(size))
        for method in methods() if rank < size else ():
            mine = equal.of_rank(rank, size)
            for how in ("step", "adaptive"):
                ng = data_parallel(problem.build(method=method), group=group, precondition=FORM)
                found[f"{method}/{how}/{size}"] = equal.trained(ng, problem.params, x[mine], y[mine], how, 20)
            if size == 3:
                single = zoo.to(problem, torch.float32)
                ng = data_parallel(single.build(method=method), group=group, precondition=FORM)
                found[f"{method}/single"] = equal.trained(
                    ng, single.params, x.float()[mine], y[mine], "step", int(os.environ.get("FISHERFN_LONG", LONG))
                )
    return found


def worst(found, expected):
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def main():
    os.environ["FISHERFN_MATRIX"] = " ".join(sys.argv[1:] or methods())
    with tempfile.TemporaryDirectory() as folder:
        ranks = together(4, "tests.distributed.matrix:everything", Path(folder), seconds=3_600)
    problem, x, y = equal.batch()
    print("largest difference of a parameter from one process after 20 steps, over all ranks")
    for method in methods():
        line = []
        for how in ("step", "adaptive"):
            expected = equal.trained(problem.build(method=method), problem.params, x, y, how, 20)
            for size in equal.SHARDS:
                runs = [rank[f"{method}/{how}/{size}"] for rank in ranks[:size]]
                same = all(torch.equal(run[name], runs[0][name]) for run in runs for name in run)
                line.append(f"{how} {size}: {worst(runs[0], expected):.1e}{'' if same else ' RANKS DIFFER'}")
        single = [rank[f"{method}/single"] for rank in ranks[:3]]
        same = all(torch.equal(run[name], single[0][name]) for run in single for name in run)
        finite = all(bool(value.isfinite().all()) for value in single[0].values())
        print(f"{method:14} {'; '.join(line)}; float32: {'equal' if same and finite else 'NOT EQUAL'}", flush=True)


if __name__ == "__main__":
    main()
