"""The tasks of the ranks: runs of every method whose results must be those of one process."""

import os

import torch
import torch.distributed as dist
from torch import nn

import fisherfn as ff
from fisherfn.distributed import data_parallel
from tests import zoo

SHARDS = {1: [16], 2: [5, 11], 3: [7, 0, 9], 4: [3, 6, 1, 6]}
"""Examples per rank: uneven, and none on one of three ranks."""

# FISHERFN_STEPS=20 FISHERFN_RANKS=all runs the cases in full
STEPS = int(os.environ.get("FISHERFN_STEPS", "4"))
PROBLEM = "mlp-categorical"
EVERYWHERE = os.environ.get("FISHERFN_RANKS") == "all"
FEW = ("ekfac/adaptive", "kfac/step")
RUNS = [f"{method}/{how}" for method in sorted(ff.METHODS) for how in ("step", "adaptive")]


def batch(id: str = PROBLEM, n: int = 16):
    """A problem of the zoo, with a batch of n different examples."""
    problem, random = zoo.pick(id), torch.Generator().manual_seed(1)
    x, y = problem.batch
    chosen = torch.randint(0, x.shape[0], (n,), generator=random)
    x, y = x[chosen], y[chosen]
    if x.is_floating_point():
        x = x + 0.1 * torch.randn(x.shape, generator=random, dtype=x.dtype)
    return problem, x, y


def trained(ng, params, x, y, how: str, steps: int = STEPS):
    """The parameters after some steps, with inverses of every second one; also the losses that adaptive steps keep."""
    random = torch.Generator().manual_seed(0)
    # the default for classes is the KL bound; K-FAC stands for steps whose sizes come from the quadratic model
    rule = "model" if ng.method.name == "kfac" else "auto"
    opt = ff.adaptive(ng, rule=rule, model_examples=5) if how == "adaptive" else None
    some = True if ng.method.couples or opt is not None else {next(iter(ng.layout.block_shapes))}
    state = ng.init(params, damping=0.1) if opt is None else opt.init(params)
    for k in range(steps):
        cadence = {"update": some if k % 4 == 1 else k % 4 != 3, "invert": k % 2 == 0, "generator": random}
        if opt is not None:
            params, state, _ = opt.step(params, state, (x, y), **cadence)
        else:
            nat, state, _ = ng.step(params, state, (x, y), **cadence)
            params = ff.tree.add(params, nat, scale=-0.05)
    remembered = () if opt is None else ("loss", "spread", "actual", "predicted")
    return params | {f"state/{name}": getattr(state, name) for name in remembered}


def of_rank(rank: int, size: int) -> slice:
    start = sum(SHARDS[size][:rank])
    return slice(start, start + SHARDS[size][rank])


def all_methods(rank: int):
    """Every method on three ranks; two of them, or all if asked for, on groups of one, two and four."""
    problem, x, y = batch()
    built = {name: problem.build(method=name) for name in ff.METHODS}
    found = {}
    groups = {size: dist.new_group(range(size)) for size in SHARDS}
    for size, group in groups.items():
        if rank < size:
            mine = of_rank(rank, size)
            for run in RUNS if size == 3 or EVERYWHERE else FEW:
                method, how = run.split("/")
                ng = data_parallel(built[method], group=group)
                found[f"{size}/{run}"] = trained(ng, problem.params, x[mine], y[mine], how)
    return found


def other_cases(rank: int):
    """Cases on two ranks: other nets, single precision, microbatches, traffic, and ranks that disagree."""
    pair = dist.new_group([0, 1])
    if rank > 1:
        return {}
    found = other_nets(rank, pair) | single(rank, pair) | microbatches(rank, pair) | delayed(rank, pair)
    return found | traffic(pair) | errors(rank, pair)


NETS = {"language": ("kfac", "exactNG"), "conv-groups": ("kfac", "lanczos", "exactNG"), "tokens": ("ekfac",)}
"""Tied embedding, shared positions with matrices formed first, one-hot rows."""


def other_nets(rank, group):
    found = {}
    for id, methods in NETS.items():
        problem, x, y = batch(id)
        for method in methods:
            ng = data_parallel(problem.build(method=method), group=group)
            mine = of_rank(rank, 2)
            found[f"{id}/{method}"] = trained(ng, problem.params, x[mine], y[mine], "step", steps=2)
    return found


def single(rank, group):
    """Many steps in single precision."""
    problem, x, y = batch()
    problem = zoo.to(problem, torch.float32)
    x, mine = x.float(), of_rank(rank, 2)
    ng = data_parallel(problem.build(method="kfac"), group=group)
    return {"single": trained(ng, problem.params, x[mine], y[mine], "step", steps=10 * STEPS)}


def microbatches(rank, group):
    """Statistics of unequal microbatches, joined on each rank; one of them, on one rank, is taken in chunks."""
    problem, x, y = batch()
    ng = data_parallel(problem.build(method="kfac"), group=group, share_inversions=False)
    mine, random = of_rank(rank, 2), torch.Generator().manual_seed(0)
    x, y = x[mine], y[mine]
    noise = ng.noise((x, y), random)
    cuts = [slice(0, 2), slice(2, 3), slice(3, len(x))]
    parts = [ng.local.stats(problem.params, (x[cut], y[cut]), noise=noise[cut], chunk_size=4) for cut in cuts]
    nat, _, _ = ng.step_from(ng.init(problem.params, damping=0.1), *[ng.reduced(ff.join(parts))] * 2)
    return {"micro": nat}


def delayed(rank, group):
    """Statistics of two batches that are reduced together, in the second step; also the messages of both steps."""
    problem, x, y = batch()
    sent = []
    ng = data_parallel(problem.build(method="kfac"), group=group, observe=lambda what, size: sent.append(what))
    params, mine, random = problem.params, of_rank(rank, 2), torch.Generator().manual_seed(0)
    state, waiting = ng.init(params, damping=0.1), []
    sent.clear()
    for due in (False, True):
        noise = ng.noise((x[mine], y[mine]), random)
        waiting.append(ng.local.stats(params, (x[mine], y[mine]), noise=noise))
        stats = ng.reduced(ff.join(waiting)) if due else None
        nat, state, _ = ng.step_from(state, ng.reduced(waiting[-1]), stats, invert=due)
        params = ff.tree.add(params, nat, scale=-0.05)
    return {"delayed": params, "delayed/factors": ff.tree.flatten(state.factors), "delayed/sent": sent}


def traffic(group):
    """Bytes of each kind of message in one step."""
    problem, x, y = batch()
    sent: dict[str, int] = {}
    times: dict[str, int] = {}

    def observe(what, size):
        sent[what] = sent.get(what, 0) + size
        times[what] = times.get(what, 0) + 1

    found = {}
    for method in ("kfac", "ekfac"):
        ng = data_parallel(problem.build(method=method), group=group, observe=observe)
        state = ng.init(problem.params)
        sent.clear()
        times.clear()
        ng.step(problem.params, state, (x[:4], y[:4]), generator=torch.Generator().manual_seed(0))
        found |= {f"sent/{method}": dict(sent), f"times/{method}": dict(times)}
    return found


def norm():
    """A natural gradient of a net with batch norm in training mode."""
    model, params, context = ff.functional(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double())
    x = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(5, 3)
    return ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), context=context)


def errors(rank, group):
    """The error of each kind of disagreement, as its type and text."""
    problem, x, y = batch()
    ng = data_parallel(problem.build(method="kfac"), group=group)
    first = rank == 0
    params = problem.params
    other = {name: p + 1 for name, p in params.items()}
    random = torch.Generator().manual_seed(rank)
    same = torch.Generator().manual_seed(0)
    state = ng.init(params, damping=0.1)
    some = {next(iter(ng.layout.block_shapes))}
    found_stats = ng.stats(params, (x, y), generator=same)
    local_stats = ng.local.stats(params, (x, y), generator=torch.Generator().manual_seed(0))
    cases = {
        "method": lambda: data_parallel(problem.build(method="kfac" if first else "ekfac"), group=group),
        "model": lambda: data_parallel(zoo.pick("scale-matrix" if first else "mlp-categorical").build(), group=group),
        "params": lambda: ng.init(params if first else other),
        "shape": lambda: ng.stats(params, (x if first else x[:, :-1], y), generator=same),
        "generator": lambda: ng.stats(params, (x, y), generator=random),
        "arguments": lambda: ng.stats(params, (x, y), generator=same, curvature=first),
        "blocks": lambda: ng.stats(params, (x, y), generator=same, curvature=first or some),
        "empty": lambda: ng.stats(params, (x[:0], y[:0]), generator=same),
        "invert": lambda: ng.step(params, state, (x, y), generator=same, invert=first),
        "state": lambda: ng.step_from(state if first else (), found_stats),
        "unreduced": lambda: ng.step_from(state, found_stats if first else local_stats),
        "norm": lambda: data_parallel(norm(), group=group),
        "twice": lambda: data_parallel(ng, group=group),
    }
    found = {}
    for name, call in cases.items():
        try:
            call()
            found[f"error/{name}"] = "none"
        except ff.FisherfnError as error:
            found[f"error/{name}"] = f"{type(error).__name__}: {error}"
    return found


def everything(rank: int):
    return all_methods(rank) | other_cases(rank)
