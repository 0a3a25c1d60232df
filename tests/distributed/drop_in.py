"""Tasks of the ranks for the drop-in classes: wrapped modules, dropout, an existing optimizer, and what is refused."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fisherfn as ff

CUTS = {0: slice(0, 5), 1: slice(5, 16)}
"""The examples of two ranks."""


def net(dropout: float = 0.3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3)).double()


def batch():
    random = torch.Generator().manual_seed(1)
    x = torch.randn(16, 4, generator=random, dtype=torch.float64)
    return x, torch.randint(0, 3, (16,), generator=random)


def optimized(wrap=lambda net: net, mine=slice(None), **options):
    """The parameters after four steps of `NaturalGradient`."""
    module, (x, y) = wrap(net()), batch()
    opt = ff.optim.NaturalGradient(module, likelihood=ff.Categorical(), **options)
    for _ in range(4):
        opt.step((x[mine], y[mine]))
    return {name.removeprefix("module."): p.detach().clone() for name, p in module.named_parameters()}


def preconditioned(mine=slice(None)):
    """The parameters after four steps of SGD with preconditioned gradients."""
    module, (x, y) = net(0.0), batch()
    sgd = torch.optim.SGD(module.parameters(), lr=0.1)
    pre = ff.optim.Preconditioner(module, likelihood=ff.Categorical(), optimizer=sgd, damping=0.1, update_every=2)
    for _ in range(4):
        sgd.zero_grad()
        nn.functional.cross_entropy(module(x[mine]), y[mine]).backward()
        pre.step(x[mine])
        sgd.step()
    return {name: p.detach().clone() for name, p in module.named_parameters()}


FIXED = {"lr": 0.1, "damping": 0.1}


def everything(rank):
    """Called on all ranks, of which two train; the default group is used, as a user would."""
    mine = CUTS[rank]
    found = {
        "adaptive": optimized(mine=mine),
        "fixed": optimized(mine=mine, **FIXED),
        "wrapped": optimized(DistributedDataParallel, mine=mine, **FIXED),
        "preconditioned": preconditioned(mine),
    }
    return found | {"refused": refused(mine)}


def refused(mine):
    """The errors of what needs a single process, on a net with batch norm among others."""
    x, y = (each[mine] for each in batch())
    likelihood = ff.Categorical()
    norm = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    module = net(0.0)
    other = net(0.0)
    with torch.no_grad():
        other[0].weight.add_(dist.get_rank())
    pre = ff.optim.Preconditioner(module, likelihood=likelihood, example_inputs=x)

    def watched():
        with pre.watch():
            pass

    def unbatched():
        module(x).sum().backward()
        pre.step()

    cases = {
        "batch norm": lambda: ff.optim.NaturalGradient(norm, likelihood=likelihood).step((x, y)),
        "compiled": lambda: ff.optim.NaturalGradient(net(0.0), likelihood=likelihood, compile=True).step((x, y)),
        "other parameters": lambda: ff.optim.NaturalGradient(other, likelihood=likelihood, **FIXED).step((x, y)),
        "watched": watched,
        "unbatched": unbatched,
    }
    return {name: error(call) for name, call in cases.items()}


def error(call):
    try:
        call()
    except ff.FisherfnError as raised:
        return f"{type(raised).__name__}: {raised}"
    return "none"
