"""Tasks of the ranks with parameters that `fully_shard` has sharded: the steps of one process, and what is refused."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.func import functional_call

import fisherfn as ff
from fisherfn.distributed import data_parallel
from tests.distributed.drop_in import error
from tests.distributed.equal import of_rank

FORMS = {"kfac/owner": "kfac", "ekfac/owner": "ekfac", "exactNG/everywhere": "exactNG", "kfac/everywhere": "kfac"}
RUNS = [f"{size}/{form}" for size in (2, 3) for form in FORMS]
LIKELIHOOD = ff.Categorical()


def net():
    """A net with first dimensions of 5, 4 and 3: uneven shards, and on three ranks an empty one."""
    torch.manual_seed(0)
    layers = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Softplus()
    return nn.Sequential(*layers).double()


SKELETON = net().to("meta")


def model(params, x):
    """The net as a function of its parameters; the module that fully_shard has changed is not called."""
    return functional_call(SKELETON, params, (x,))


def batch():
    random = torch.Generator().manual_seed(1)
    return torch.randn(16, 4, generator=random, dtype=torch.float64), torch.randint(0, 3, (16,), generator=random)


def built(method):
    x, _ = batch()
    whole = {name: p.detach() for name, p in net().named_parameters()}
    return ff.natural_gradient(model, whole, x[:5], likelihood=LIKELIHOOD, method=method)


def sharded(mesh):
    """The net with sharded parameters, and these by name."""
    module = fully_shard(net(), mesh=mesh)
    return module, {name: p.detach() for name, p in module.named_parameters()}


def trained(ng, params, x, y, steps=4):
    """The parameters after some steps, clipped by the KL bound, with the last statistics and state."""
    random, state = torch.Generator().manual_seed(0), ng.init(params, damping=0.1)
    for k in range(steps):
        stats = ng.stats(params, (x, y), generator=random)
        nat, state, info = ng.step_from(state, stats, stats, invert=k % 2 == 0, inner=True)
        params = ff.tree.add(params, ff.kl_clip(nat, info.inner, lr=0.5, kl_bound=1e-2), scale=-0.5)
    return params, state, stats


def whole(values):
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in values.items()}


def everything(rank):
    """The results on three ranks, of which two also form a mesh."""
    meshes = {3: init_device_mesh("cpu", (3,)), 2: DeviceMesh("cpu", [0, 1])}
    both = DeviceMesh("cpu", torch.arange(3).reshape(3, 1), mesh_dim_names=("data", "tensor"))
    found = {}
    for run in RUNS:
        size, method, form = run.split("/")
        mesh = meshes[int(size)]
        if rank < int(size):
            found[run] = one_run(rank, mesh, method, form)
    if rank < 2:
        found |= refused(rank, meshes[2])
    return found | wrong_meshes(meshes[3], both)


def one_run(rank, mesh, method, form):
    x, y = (each[of_rank(rank, mesh.size())] for each in batch())
    sent = {}

    def observe(what, size):
        sent[what] = sent.get(what, 0) + size

    ng = data_parallel(built(method), group=mesh.get_group(), precondition=form, observe=observe)
    module, start = sharded(mesh)
    params, state, stats = trained(ng, start, x, y)
    mixed = start | {"0.weight": start["0.weight"].full_tensor()}
    mixed, _, _ = trained(ng, mixed, x, y)
    nat = ng.precondition(state, stats)
    again = ng.precondition(state, stats.grads)
    for name, p in module.named_parameters():  # any torch optimizer may take the step instead
        p.grad = again[name]
    torch.optim.SGD(module.parameters(), lr=1.0).step()
    placed = all(each[name].placements == (Shard(0),) for each in (params, nat, again, stats.grads) for name in start)
    local = {name: tuple(p.to_local().shape) for name, p in params.items()}
    own = [key for key, inverse in state.inverses.items() if inverse != ()]
    return {
        "params": whole(params), "nat": whole(nat), "again": whole(again), "grads": whole(stats.grads),
        "sgd": whole(dict(module.named_parameters())), "mixed": whole(mixed),
        "kept": isinstance(mixed["0.weight"], DTensor),
        "placed": placed, "local": local, "own": own, "sent": sent,
    }  # fmt: skip


def refused(rank, mesh):
    """The errors of what needs whole parameters, or the same placement on all ranks."""
    x, y = (each[of_rank(rank, 2)] for each in batch())
    alone = built("kfac")
    ng = data_parallel(alone, group=mesh.get_group())
    module, params = sharded(mesh)
    full = whole(params)
    state = ng.init(params)
    stats = ng.stats(params, (x, y), generator=torch.Generator().manual_seed(0))
    columns = full | {"2.weight": distribute_tensor(full["2.weight"], mesh, [Shard(1)])}
    copies = full | {"2.weight": distribute_tensor(full["2.weight"], mesh, [Replicate()])}
    uneven = torch.zeros(3 if rank else 1, 5, dtype=torch.float64)
    odd = full | {"2.weight": DTensor.from_local(uneven, mesh, [Shard(0)], shape=(4, 5), stride=(5, 1))}
    cases = {
        "functional": lambda: ff.functional(module),
        "build": lambda: ff.natural_gradient(model, params, x, likelihood=LIKELIHOOD),
        "alone": lambda: alone.init(params),
        "alone stats": lambda: alone.stats(params, (x, y), curvature=False),
        "adaptive": lambda: ff.adaptive(ng).init(params),
        "tree": lambda: ng.step_from(state, stats.grads, stats),
        "columns": lambda: ng.init(columns),
        "copies": lambda: ng.stats(copies, (x, y), curvature=False),
        "odd": lambda: ng.init(odd),
        "one rank": lambda: ng.stats(params if rank else full, (x, y), curvature=False),
        "gradients": lambda: ng.precondition(state, columns),
    }
    return {f"error/{name}": error(call) for name, call in cases.items()}


def wrong_meshes(mesh, both):
    """The errors of meshes that are not that of the batch."""
    x, _ = batch()
    full = {name: p.detach() for name, p in net().named_parameters()}
    ng = data_parallel(built("kfac"))
    two = {name: distribute_tensor(p, both, [Shard(0), Replicate()]) for name, p in full.items()}
    backwards = DeviceMesh("cpu", [2, 1, 0])
    turned = {name: distribute_tensor(p, backwards, [Shard(0)]) for name, p in full.items()}
    return {"error/2-d": error(lambda: ng.init(two)), "error/backwards": error(lambda: ng.init(turned))}
