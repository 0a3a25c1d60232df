"""Tasks of the ranks in which owners precondition: the steps of one process, whole states, traffic and errors."""

import torch
import torch.distributed as dist

import fisherfn as ff
from fisherfn.distributed import data_parallel
from fisherfn.methods.two_level import TwoLevel
from tests import zoo
from tests.distributed import equal
from tests.distributed.drop_in import error

METHODS = sorted(set(ff.METHODS) - {"exactNG"})
RUNS = [f"{size}/{method}/step" for size in (2, 3) for method in METHODS] + ["3/kfac/adaptive", "3/ekfac/adaptive"]
TWO_LEVEL = {
    "balanced": ff.two_level(coarse="nicolaides", krylov=True, form="balanced"),
    "residual": ff.two_level(coarse="residual"),
    "spectral": ff.two_level(coarse="spectral", form="additive"),
}
NETS = {"language": "kfac", "conv-groups": "ekfac"}
"""Tied embedding; groups."""


def owning(problem, group, method="kfac", **options):
    return data_parallel(problem.build(method=method), group=group, precondition="owner", **options)


def everything(rank):
    """The results on three ranks, of which two also form a group."""
    pair, three = dist.new_group([0, 1]), dist.new_group([0, 1, 2])
    groups = {3: three} | ({2: pair} if rank < 2 else {})
    problem, x, y = equal.batch()
    found = {}
    for run in RUNS:
        size, method, how = run.split("/")
        if int(size) in groups:
            mine = equal.of_rank(rank, int(size))
            ng = owning(problem, groups[int(size)], method)
            found[run] = equal.trained(ng, problem.params, x[mine], y[mine], how)
    found |= steps(rank, three) | resumed(rank, pair, three) | broken(rank, three)
    return found | (errors(rank, pair) | traffic(pair) if rank < 2 else {})


def steps(rank, group):
    """Single steps with ⟨∇, nat⟩: two-level methods, other nets, a few blocks, and many steps in single precision."""
    problem, x, y = equal.batch()
    mine, found = equal.of_rank(rank, 3), {}
    for name, method in TWO_LEVEL.items():
        found[f"two-level/{name}"] = one_step(owning(problem, group, method), problem, x[mine], y[mine])
    for id, method in NETS.items():
        other, a, b = equal.batch(id)
        found[f"net/{id}"] = one_step(owning(other, group, method), other, a[mine], b[mine])
    found["some"] = one_step(owning(problem, group), problem, x[mine], y[mine], only=True)
    single = zoo.to(problem, torch.float32)
    ng = owning(single, group)
    found["single"] = equal.trained(ng, single.params, x.float()[mine], y[mine], "step", 10 * equal.STEPS)
    return found


def one_step(ng, problem, x, y, only=False):
    """The second step, which may invert one block only, with ⟨∇, nat⟩; and the gradient preconditioned again."""
    random = torch.Generator().manual_seed(0)
    _, state, _ = ng.step(problem.params, ng.init(problem.params, damping=0.1), (x, y), generator=random)
    invert = {next(iter(ng.layout.block_shapes))} if only else True
    stats = ng.stats(problem.params, (x, y), generator=random)
    nat, state, info = ng.step_from(state, stats, stats, invert=invert, inner=True)
    again = ng.precondition(state, stats.grads)
    ok = torch.stack(list(info.ok.values()))
    extra = {f"again/{name}": leaf for name, leaf in again.items()}
    extra |= {f"divergence/{key}": value for key, value in divergences(ng, state, stats).items()}
    return nat | extra | {"inner": info.inner, "ok": ok, "condition": conditions(info)}


def divergences(ng, state, stats):
    """The divergence of each block, for methods that have one."""
    return {} if isinstance(ng.method, TwoLevel) else ng.fisher_divergence(state, stats)


def conditions(info):
    """The condition number of each block, a diagnostic that the owner measures."""
    return torch.stack([value.double() for value in info.diagnostics["condition"].values()])


def resumed(rank, pair, three):
    """Four steps: two on three ranks, one on two ranks and one on a single rank, from saved states."""
    problem, x, y = equal.batch()
    random = torch.Generator().manual_seed(0)

    def stepped(ng, params, state, mine):
        nat, state, _ = ng.step(params, state, (x[mine], y[mine]), generator=random)
        return ff.tree.add(params, nat, scale=-0.05), state

    ng, mine = owning(problem, three), equal.of_rank(rank, 3)
    params, state = problem.params, ng.init(problem.params, damping=0.1)
    for _ in range(2):
        params, state = stepped(ng, params, state, mine)
    held = [key for key, inverse in state.inverses.items() if inverse != ()]
    whole = ng.gathered(state)
    found = {"held": held, "whole": ff.tree.flatten(whole.inverses)}
    back = ng.owned(whole)
    found["owned"] = ff.tree.flatten(back.inverses)
    found["mine"] = ff.tree.flatten(state.inverses)
    if rank > 1:
        return found
    saved = ff.tree.flatten(whole)
    ng, mine = owning(problem, pair), equal.of_rank(rank, 2)
    state = ng.owned(ff.tree.unflatten(ng.local.init(params, damping=0.1), saved))
    params, state = stepped(ng, params, state, mine)
    whole, alone = ng.gathered(state), ng.local
    params, state = stepped(alone, params, ff.tree.unflatten(alone.init(params), ff.tree.flatten(whole)), slice(None))
    return found | {"resumed": params, "logdet": alone.inverse(whole).logdet()}


def broken(rank, group):
    """An inversion that fails on the rank of one block: the same masks everywhere, and no rank changes its state."""
    problem, x, y = equal.batch()
    ng, mine = owning(problem, group), equal.of_rank(rank, 3)
    random = torch.Generator().manual_seed(0)
    _, state, _ = ng.step(problem.params, ng.init(problem.params, damping=0.1), (x[mine], y[mine]), generator=random)
    first = next(iter(state.factors))
    factors = state.factors | {first: ff.tree.map(lambda leaf: leaf * torch.nan, state.factors[first])}
    new, info = ng.invert(state._replace(factors=factors))
    kept = all(
        torch.equal(a, b) for a, b in zip(ff.tree.leaves(new.inverses), ff.tree.leaves(state.inverses), strict=True)
    )
    return {"broken": {key: bool(mask) for key, mask in info.ok.items()}, "kept": kept}


def traffic(group):
    """Bytes of each kind of message in one step, and what "auto" chooses."""
    problem, x, y = equal.batch()
    sent, times = {}, {}

    def observe(what, size):
        sent[what] = sent.get(what, 0) + size
        times[what] = times.get(what, 0) + 1

    ng = owning(problem, group, observe=observe)
    state = ng.init(problem.params)
    sent.clear()
    times.clear()
    ng.step(problem.params, state, (x[:4], y[:4]), generator=torch.Generator().manual_seed(0))
    chosen = {
        f"auto/{every}": data_parallel(
            problem.build(method="kfac"), group=group, precondition="auto", invert_every=every
        )._preconditioners is not None
        for every in (1, 1000)
    }  # fmt: skip
    exact = data_parallel(problem.build(method="exactNG"), group=group, precondition="auto", invert_every=1)
    chosen["auto/exact"] = exact._preconditioners is not None
    return {"sent": dict(sent), "times": dict(times)} | chosen


def errors(rank, group):
    """The error of each call that does not fit."""
    problem, x, y = equal.batch()
    ng = owning(problem, group)
    every = data_parallel(problem.build(method="kfac"), group=group)
    state, whole = ng.init(problem.params), every.init(problem.params)
    stats = ng.stats(problem.params, (x, y), generator=torch.Generator().manual_seed(0))
    grads = ff.tree.map(lambda leaf: torch.stack([leaf, leaf]), stats.grads)
    build, first = problem.build, rank == 0

    def made(method="kfac", **options):
        return data_parallel(build(method=method), group=group, **options)

    cases = {
        "whole state": lambda: ng.step_from(whole, stats, stats),
        "owner's state": lambda: every.step_from(state, stats, stats),
        "one rank": lambda: ng.precondition(state if first else whole, stats),
        "logdet": lambda: ng.inverse(state).logdet(),
        "vmap": lambda: torch.vmap(lambda v: ng._precondition(state, v, False)[0])(grads),
        "exact": lambda: made("exactNG", precondition="owner"),
        "nested": lambda: made(ff.two_level(ff.exact()), precondition="owner"),
        "not shared": lambda: made(precondition="owner", share_inversions=False),
        "unknown": lambda: made(precondition="owners"),
        "auto": lambda: made(precondition="auto"),
        "every": lambda: made(precondition="auto", invert_every=0),
        "differs": lambda: made(precondition="owner" if first else "everywhere"),
        "local statistics": lambda: ng.precondition(
            state, stats if first else ng.local.stats(problem.params, (x, y), curvature=False)
        ),
    }
    return {f"error/{name}": error(call) for name, call in cases.items()}
