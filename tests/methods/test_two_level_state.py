"""Two-level: the state over several steps, members, files and precisions."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.utils import _pytree as pytree

import fisherfn as ff
from tests import oracles, zoo
from tests.methods.protocol import at, stack
from tests.methods.two_level import (
    COARSE,
    FORMS,
    Case,
    coarse_inverse,
    combined,
    full_rank,
    method,
)
from tests.oracles import close, differs, unvec, vec

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")
KRYLOV = pytest.mark.parametrize("krylov", [False, True])
SPACES = pytest.mark.parametrize("coarse", COARSE)
ANY = [(coarse, False, form) for coarse in COARSE for form in FORMS] + [
    ("residual", True, "multiplicative"),
    ("spectral", True, "multiplicative"),
    ("tselepidis", False, "additive"),
]
EVERY = pytest.mark.parametrize(("coarse", "krylov", "form"), ANY)


@SPACES
@KRYLOV
def test_the_fisher_is_the_newest_and_the_fine_method_averages(coarse, krylov):
    """Batches of 5, 2 and 7 examples; F_c is never an average over other bases."""
    problem = zoo.pick("mlp-categorical")
    run = zoo.sampled(problem, "empirical")
    batches = []
    for seed, size in enumerate((5, 2, 7)):
        x = torch.randn(size, 3, generator=zoo.generator(seed), dtype=torch.float64)
        batches.append(zoo.replace(problem, x=x, y=torch.arange(size) % 3))
    *earlier, last = (run.ng.stats(problem.params, batch.batch) for batch in batches)
    F = oracles.fisher_matrix(batches[-1], "empirical")
    one = Case(problem, replace(run, stats=last), F, "kfac", 0.1, tuple(earlier))
    Q = coarse_inverse(one.rows(coarse, krylov), one.damped)
    close(one.step(one.v, coarse, krylov), combined("multiplicative", one.M, one.damped, Q) @ one.v)
    alone = Case(problem, replace(run, stats=last), F)
    assert differs(one.M, alone.M, 1e-3), "no average at all"


@EVERY
def test_steps_change_at_invert_only(coarse, krylov, form):
    """Before the first, grad/λ; an update alone changes matvec, not the step, also with a batch of another size."""
    problem = zoo.pick("conv")
    run = zoo.sampled(problem, "empirical", method=method("kfac", coarse, krylov, form))
    v = zoo.random_tree(problem.params)
    empty = run.ng.init(problem.params, damping=0.3)
    first, _ = run.ng.update(empty, run.stats)
    for state in (empty, first):
        close(run.ng.precondition(state, v), ff.tree.scale(v, 1 / 0.3))
    state, _ = run.ng.invert(first)
    other = run.ng.stats(problem.params, (2 * problem.x[:3], problem.y[:3]))
    moved, info = run.ng.update(state, other)
    assert all(info.ok.values())
    close(run.ng.precondition(moved, v), run.ng.precondition(state, v))
    assert differs(vec(run.ng.matvec(moved, v)), vec(run.ng.matvec(state, v)))
    again, info = run.ng.invert(moved)
    assert all(info.ok.values())
    assert differs(vec(run.ng.precondition(again, v)), vec(run.ng.precondition(state, v)), 1e-3)


def test_matvec_and_error_are_the_fine_methods():
    one = full_rank(fine="lanczos")
    ng, state = one.two_level()
    fine, alone = one.updated(ff.lanczos())
    v = unvec(one.problem.params, one.v)
    close(ng.matvec(state, v), fine.matvec(alone, v))
    close(ng.fisher_error(state, one.run.stats), fine.fisher_error(alone, one.run.stats))


@EVERY
def test_vmap_over_models_and_dampings_is_the_loop(coarse, krylov, form):
    one = full_rank()
    problem, ng = one.problem, replace(one.run.ng, method=method("kfac", coarse, krylov, form))
    members = [ff.tree.add(problem.params, zoo.random_tree(problem.params, m), scale=0.1) for m in range(3)]

    def two_steps(params, damping):
        state = ng.init(params, damping=damping)
        for _ in range(2):
            nat, state, info = ng.step(params, state, problem.batch, noise=one.run.noise, inner=True)
            params = ff.tree.add(params, nat, scale=-0.1)
        return nat, info.inner

    dampings = torch.tensor([0.05, 0.5, 5.0], dtype=torch.float64)
    nats, inners = torch.vmap(two_steps)(stack(members), dampings)
    for m in range(3):
        nat, inner = two_steps(members[m], dampings[m])
        close(at(nats, m), nat, tol=1e-9)
        close(inners[m], inner, tol=1e-9)
    assert differs(at(nats, 0)["0.weight"], at(nats, 2)["0.weight"], 1e-2)


@EVERY
def test_saved_and_resumed_and_nothing_mutated(coarse, krylov, form, tmp_path):
    one = full_rank()
    ng, stats, v = replace(one.run.ng, method=method("kfac", coarse, krylov, form)), one.run.stats, dict(one.v_tree)
    state, _ = ng.invert(ng.update(ng.init(one.problem.params, damping=0.1), stats)[0])
    arguments = (state, stats, v)
    before = copy.deepcopy(pytree.tree_leaves(arguments))
    torch.save(ff.tree.flatten(state), tmp_path / "state.pt")
    again = ff.tree.unflatten(state, torch.load(tmp_path / "state.pt", weights_only=True))

    def everything(state):
        new, _ = ng.invert(ng.update(state, stats)[0])
        return new, ng.precondition(state, v), ng.precondition(new, stats), ng(one.problem.params, stats)

    results = [everything(s) for s in (state, again)]
    assert all(torch.equal(a, b) for a, b in zip(*map(pytree.tree_leaves, results), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(pytree.tree_leaves(arguments), before, strict=True))


@SPACES
@KRYLOV
def test_single_precision_keeps_the_direction(coarse, krylov):
    exact = full_rank().problem
    steps = []
    for problem in (exact, zoo.to(exact, torch.float32)):
        run = zoo.sampled(problem, "empirical", method=method("kfac", coarse, krylov))
        steps.append(vec(run.ng(problem.params, run.stats, damping=0.01)))
    close(steps[1], steps[0], tol=1e-3)
