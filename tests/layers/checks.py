"""Checks of every layer: kind, per-example gradients, Fisher block, gradient, K-FAC, each against its definition."""

import torch
from torch.func import grad, vmap

import fisherfn as ff
from tests import oracles, zoo
from tests.layers import unit_weights
from tests.nets import Readout
from tests.oracles import close, unvec, vec


def normal(*shape, seed=0):
    return torch.randn(shape, generator=zoo.generator(seed), dtype=torch.float64)


def readout_of(how, shape, examples=3):
    """A net that is `how(w, x)` before a readout, on inputs [examples, 3, 4], with a weight of this shape."""

    def model(p, x):
        return Readout(2)(how(p["w"], x))

    x = normal(examples, 3, 4, seed=2)
    return zoo.from_model(model, {"w": normal(*shape, seed=1)}, x, "categorical", zoo.generator(), {})


def check_vmap(step, params):
    """A step of two models at once is that of each alone."""
    many = {name: torch.stack([p, 0.5 * p]) for name, p in params.items()}
    together = vmap(step)(many)
    for m in range(2):
        close({name: leaf[m] for name, leaf in together.items()}, step({name: p[m] for name, p in many.items()}))


def twin(problem, net, params, x):
    """Another net on the same batch, with these parameters."""
    return zoo.replace(zoo.from_net(net, x.shape, "categorical"), params=params, x=x, y=problem.y)


def apart_params(params, groups):
    """A grouped layer's parameters (or step) as those of `Separate`: a group's part of each leads."""
    parts = {name.removeprefix("0."): leaf.chunk(groups) for name, leaf in params.items()}
    return {f"0.layers.{k}.{name}": part[k] for k in range(groups) for name, part in parts.items()}


def kinds(ng):
    """{block key: kind}."""
    return {block.key: block.kind for block in ng.layout.blocks}


def dense(a):
    """A tap's inputs as a tensor."""
    return a if isinstance(a, torch.Tensor) else a.dense()


def example_gradients(problem):
    """The oracle: {name: [N, …]} by vmap(grad)."""

    def nll(params, x, y):
        return oracles.nll(problem, problem.model(params, x[None]), y[None])

    return vmap(grad(nll), in_dims=(None, 0, 0))(problem.params, problem.x, problem.y)


def tapped_gradients(ng, stats, key):
    """{name: [N, …]} from the block's loss tap, W_n = Σ_t g aᵀ."""
    tap = stats.loss_tap(key)
    W_n = torch.einsum("knto,knti->nkoi", tap.g[:, 0], dense(tap.a))
    each = [ng.layout.block(key).tensors(W) for W in W_n]
    return {name: torch.stack([tensors[name] for tensors in each]) for name in each[0]}


def check_gradients(problem, ng, stats):
    """Every layer's per-example gradients, and the gradient, are autograd's."""
    expected = example_gradients(problem)
    found = expected.copy()  # fallbacks have no layer to check
    for block in ng.layout.layers:
        found |= tapped_gradients(ng, stats, block.key)
    same(found, expected, tol=1e-10)
    same(dict(stats.grads), {name: leaf.mean(0) for name, leaf in expected.items()}, tol=1e-10)


def same(found, expected, tol=1e-8):
    """Trees, relative to the largest entry of all: some gradients vanish (a bias before a softmax over keys)."""
    assert found.keys() == expected.keys()
    assert all(found[name].shape == leaf.shape for name, leaf in expected.items())
    close(vec({name: found[name] for name in expected}), vec(expected), tol)


def check_fisher(problem, run, fisher):
    """The Fisher, whole and block by block, is its definition."""
    exact = oracles.fisher_matrix(problem, fisher, run.draws)
    F = run.ng.fisher(run.stats)
    close(F.dense(), exact)
    v = zoo.random_tree(problem.params)
    close(vec(F @ v), exact @ vec(v))
    close(vec(F.solve(v, 0.1)), torch.linalg.solve(exact + 0.1 * torch.eye(len(exact)), vec(v)), tol=1e-7)
    if fisher != "type2":
        U = oracles.columns(problem, fisher, run.draws)
        close(F.gram(), U.T @ U)
    where = unvec(problem.params, torch.arange(len(exact), dtype=torch.float64))
    for key, matrix in run.ng.layout.matrices(where).items():
        at = matrix.reshape(-1).long()
        close(F.block(key), exact[at[:, None], at])


def check_kfac(problem, run, fisher, damping=0.1, damping_form="factored", **options):
    """Factors by unit weights: matvec is W ↦ G W A, the step solves the damped system, from matrix and taps alike."""
    layers = unit_weights.kfac_factors(problem, fisher, run.draws, **options)
    known = torch.cat([unit_weights.positions(problem, name).reshape(-1) for name in layers])
    v = zoo.random_tree(problem.params)
    kept = torch.zeros_like(vec(v)).index_fill(0, known, 1.0)
    state = run.ng.update(run.ng.init(problem.params, damping=damping), run.stats)[0]
    product = unit_weights.kfac_dense(problem, layers, oracles.kfac_block) @ vec(v)
    close(vec(run.ng.matvec(state, v)) * kept, product)
    if all(A.trace() * G.trace() > 1e-8 for groups in layers.values() for A, G in groups):  # else π is undefined
        state = run.ng.invert(state)[0]
        damped = unit_weights.kfac_dense(problem, layers, lambda A, G: oracles.kfac_damped(A, G, damping, damping_form))
        solved = torch.linalg.solve(damped[known[:, None], known], vec(v)[known])
        close(vec(run.ng.precondition(state, v))[known], solved, tol=1e-7)
        same(run.ng.precondition(state, run.stats), run.ng.precondition(state, run.stats.grads))


def check_chunks(problem, run, size=2):
    """Statistics made in chunks are the whole batch's, and give the same factors."""
    parts = run.ng.stats(problem.params, problem.batch, noise=run.noise, chunk_size=size)
    close(run.ng.fisher(parts).dense(), run.ng.fisher(run.stats).dense())
    state = run.ng.init(problem.params)
    whole, joined = (ff.tree.flatten(run.ng.update(state, stats)[0]) for stats in (run.stats, parts))
    close(joined, whole)


def check(problem, expected, fisher="mc", **options):
    """Run all checks; `expected` lists the kind of every block, `options` are K-FAC's. Return the statistics."""
    run = zoo.sampled(problem, fisher, method=ff.kfac(**options))
    assert kinds(run.ng) == expected
    check_gradients(problem, run.ng, run.stats)
    check_fisher(problem, run, fisher)
    if problem.net is not None:
        check_kfac(problem, run, fisher, **options)
    return run


def stepped(problem, method=None, fisher="type2", damping=0.1, **kwargs):
    """The preconditioned gradient of one whole step."""
    ng = problem.build(fisher=fisher, method=method or ff.kfac(), **kwargs)
    return ng.step(problem.params, ng.init(problem.params, damping=damping), problem.batch)[0]


def kfac_matrix(problem, method=None, fisher="type2"):
    """The dense matrix of K-FAC's `matvec`, column by column, and the statistics that it is of."""
    run = zoo.sampled(problem, fisher, method=method or ff.kfac())
    state, _ = run.ng.update(run.ng.init(problem.params), run.stats)
    eye = torch.eye(len(vec(problem.params)), dtype=torch.float64)
    return torch.stack([vec(run.ng.matvec(state, unvec(problem.params, row))) for row in eye], dim=1), run


def exact_blocks(problem, run, fisher="type2"):
    """The block diagonal of the exact Fisher: what K-FAC aims at."""
    return oracles.block_diagonal(problem.params, problem.blocks, oracles.fisher_matrix(problem, fisher, run.draws))


X = normal(5, 4, seed=3)


def curved_model(model, params, x=X):
    """A model before a readout, without a module."""

    def curved(p, x):
        return Readout(2)(model(p, x))

    return zoo.from_model(curved, params, x, "categorical", zoo.generator(), {})


def checked_model(model, params, x=X):
    """Check loss, gradients and Fisher of such a model; return the kinds of its blocks."""
    problem = curved_model(model, params, x)
    run = zoo.sampled(problem, "type2")
    check_fisher(problem, run, "type2")
    check_gradients(problem, run.ng, run.stats)
    close(run.stats.loss, oracles.mean_nll(problem))
    return kinds(run.ng)
