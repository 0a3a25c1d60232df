"""Tasks of the ranks for the drop-in classes: wrapped modules, dropout, an existing optimizer, and what is refused."""

import datetime
import os

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


def built_alone(rank, **options):
    """The parameters after four steps of an optimizer that was made before the process group."""
    dist.destroy_process_group()
    (x, y), module = batch(), net()
    opt = ff.optim.NaturalGradient(module, likelihood=ff.Categorical(), example_inputs=x, **options)
    with_steps = ff.optim.NaturalGradient(net(), likelihood=ff.Categorical(), **options)
    with_steps.step((x[CUTS[rank]], y[CUTS[rank]]))
    store = dist.FileStore(f"{os.environ['FISHERFN_FOLDER']}/again-{len(options)}", 2)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timeout)
    for _ in range(4):
        opt.step((x[CUTS[rank]], y[CUTS[rank]]))
    params = {name: p.detach().clone() for name, p in module.named_parameters()}
    return params, error(lambda: with_steps.step((x[CUTS[rank]], y[CUTS[rank]])))


def bad_first_batch(mine, rank):
    """The losses of three steps that skip bad batches, of which the first has a NaN on one rank."""
    x, y = (each[mine] for each in batch())
    opt = ff.optim.NaturalGradient(net(), likelihood=ff.Categorical(), on_bad="skip", **FIXED)
    bad = torch.full_like(x, torch.nan) if rank == 0 else x
    return torch.stack([opt.step((inputs, y)) for inputs in (bad, x, x)]), opt.skipped


def edited(mine=slice(None), rank=0, send=lambda p: None):
    """The parameters after three steps, an edit of the weights on the first rank, which it sends, and two more steps.

    Only the first rank can notice the edit: what is received does not count as a change of a tensor.
    """
    module, (x, y) = net(0.0), batch()
    opt = ff.optim.NaturalGradient(module, likelihood=ff.Gaussian(), generator=0)
    targets = nn.functional.one_hot(y, 3).double()
    rejected = []
    for step in range(5):
        if step == 3:
            for p in module.parameters():
                if rank == 0:
                    with torch.no_grad():
                        p.mul_(-8.0)
                send(p.detach())
        opt.step((x[mine], targets[mine]))
        rejected.append(bool(opt.info.adapted.rejected))
    return {name: p.detach().clone() for name, p in module.named_parameters()}, rejected


def overflowed(mine, rank):
    """The parameters after two steps of a scaled loss, of which the first overflows on one rank, and the scale."""
    module, (x, y) = net(0.0).float(), batch()
    x, y = x[mine].float(), y[mine]
    sgd = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    pre = ff.optim.Preconditioner(module, likelihood=ff.Categorical(), optimizer=sgd, damping=0.1, scaler=scaler)
    for weight in (torch.inf if rank == 0 else 1.0, 1.0):
        sgd.zero_grad()
        scaler.scale(weight * nn.functional.cross_entropy(module(x), y)).backward()
        pre.step(x)
        scaler.step(sgd)
        scaler.update()
    return {name: p.detach().clone() for name, p in module.named_parameters()}, scaler.get_scale()


def everything(rank):
    """Called on all ranks, of which two train; the default group is used, as a user would."""
    mine = CUTS[rank]
    found = {
        "adaptive": optimized(mine=mine),
        "fixed": optimized(mine=mine, **FIXED),
        "wrapped": optimized(DistributedDataParallel, mine=mine, **FIXED),
        "preconditioned": preconditioned(mine),
        "edited": edited(mine, rank, lambda p: dist.broadcast(p, src=0)),
        "bad": bad_first_batch(mine, rank),
        "overflowed": overflowed(mine, rank),
        "refused": refused(mine),
    }
    found["adaptive, built alone"], _ = built_alone(rank)
    found["fixed, built alone"], found["refused"]["steps alone"] = built_alone(rank, **FIXED)
    return found


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

    def late_norm():
        module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double().eval()
        opt = ff.optim.NaturalGradient(module, likelihood=likelihood, **FIXED, example_inputs=x)
        module.train()
        opt.step((x, y))

    def other_length():
        long = torch.randn(len(x), 5 + dist.get_rank(), 4, dtype=torch.float64)
        labels = torch.zeros(long.shape[:2], dtype=torch.int64)
        ff.optim.NaturalGradient(net(0.0), likelihood=likelihood, **FIXED).step((long, labels))

    def watched():
        with pre.watch():
            pass

    def unbatched():
        module(x).sum().backward()
        pre.step()

    def unbatched_optimizer():
        module = net(0.0)
        opt = ff.optim.NaturalGradient(module, likelihood=likelihood, **FIXED)
        opt.step((x, y))
        module(x).sum().backward()
        opt.step()  # takes no statistics

    cases = {
        "batch norm": lambda: ff.optim.NaturalGradient(norm, likelihood=likelihood).step((x, y)),
        "batch norm after a build in evaluation mode": late_norm,
        "other lengths": other_length,
        "compiled": lambda: ff.optim.NaturalGradient(net(0.0), likelihood=likelihood, compile=True).step((x, y)),
        "other parameters": lambda: ff.optim.NaturalGradient(other, likelihood=likelihood, **FIXED).step((x, y)),
        "watched": watched,
        "unbatched": unbatched,
        "unbatched optimizer": unbatched_optimizer,
    }
    return {name: error(call) for name, call in cases.items()}


def error(call):
    try:
        call()
    except ff.FisherfnError as raised:
        return f"{type(raised).__name__}: {raised}"
    return "none"
