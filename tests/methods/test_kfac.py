"""K-FAC against dense Kronecker products built by hand, and against the exact Fisher where theory gives equality."""

import numpy as np
import pytest
import torch
from hypothesis import given

import fisherfn as ff
from fisherfn.taps import Tap
from tests import drawn, oracles, strategies, zoo
from tests.oracles import close, unvec, vec
from tests.zoo import FISHERS, sampled

LINEAR = pytest.mark.parametrize("make", zoo.cases("linear", "blocks"))
KINDS = pytest.mark.parametrize("fisher", FISHERS)
FORMS = pytest.mark.parametrize("form", ["factored", "eigen"])


def updated(run, problem, **hyper):
    state, info = run.ng.update(run.ng.init(problem.params, **hyper), run.stats)
    assert all(info.ok.values())
    return state


def inverted(run, problem, **hyper):
    return run.ng.invert(updated(run, problem, **hyper))[0]


def dense_matvec(ng, state, params):
    """The matrix of `ng.matvec`, column by column."""
    eye = torch.eye(sum(leaf.numel() for leaf in params.values()), dtype=torch.float64)
    return torch.stack([vec(ng.matvec(state, unvec(params, row))) for row in eye], dim=1)


# ----------------------------------------------------------------------------------------------------- the factors


@pytest.mark.parametrize("positions", [1, 3])
def test_factors_are_the_second_moments_of_either_sharing(positions):
    """Expand takes every position alone; reduce the mean input and the summed output-gradient."""
    (a, g), _ = drawn.tap("dense", (2, 2, 4, positions, 3, 5))
    expand, reduce = (ff.kfac(sharing=sharing).estimate(Tap(a, g), None) for sharing in ("expand", "reduce"))
    close(expand.A, torch.einsum("knti,kntj->kij", a, a) / 4)
    close(expand.G, torch.einsum("ksnto,ksntp->kop", g, g) / (4 * positions))
    close(reduce.A, torch.einsum("kni,knj->kij", a.mean(2), a.mean(2)) / 4)
    close(reduce.G, torch.einsum("ksno,ksnp->kop", g.sum(3), g.sum(3)) / 4)


@LINEAR
@KINDS
def test_matvec_is_the_undamped_kronecker_product(make, fisher):
    """W ↦ G W A with A = 1/N Σ aaᵀ and G = 1/(NT) Σ ggᵀ, whatever the damping."""
    problem = make()
    run = sampled(problem, fisher)
    dense = oracles.kfac_dense(problem, oracles.kfac_of(problem, fisher, run.draws), oracles.kfac_block)
    for damping in (1e-3, 10.0):
        close(dense_matvec(run.ng, updated(run, problem, damping=damping), problem.params), dense)


@LINEAR
@KINDS
@FORMS
@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_precondition_solves_the_damped_kronecker_system(make, fisher, form, damping):
    problem = make()
    run = sampled(problem, fisher, method=ff.kfac(damping_form=form))
    factors = oracles.kfac_of(problem, fisher, run.draws)
    dense = oracles.kfac_dense(problem, factors, lambda A, G: oracles.kfac_damped(A, G, damping, form))
    grads = zoo.random_tree(problem.params)
    nat = run.ng.precondition(inverted(run, problem, damping=damping), grads)
    close(nat, unvec(problem.params, torch.linalg.solve(dense, vec(grads))), tol=1e-7)


def test_a_biased_layer_by_numpy():
    """No helper of the other tests: one layer, one matrix, np.kron."""
    problem = zoo.pick("one-layer")
    x, y = problem.x.numpy(), problem.y.numpy()
    W, b = problem.params["0.weight"].numpy(), problem.params["0.bias"].numpy()
    a, g = np.hstack([x, np.ones((4, 1))]), x @ W.T + b - y
    A, G, lam = a.T @ a / 4, g.T @ g / 4, 0.3
    pi = np.sqrt((np.trace(A) / 4) / (np.trace(G) / 2))
    A_damped, G_damped = A + pi * lam**0.5 * np.eye(4), G + lam**0.5 / pi * np.eye(2)
    grad = g.T @ a / 4
    expected = np.linalg.solve(np.kron(G_damped, A_damped), grad.reshape(-1)).reshape(2, 4)
    run = sampled(problem, "empirical", method=ff.kfac(damping_form="factored"))
    nat = run.ng.precondition(inverted(run, problem, damping=lam), run.stats)
    close(torch.cat([nat["0.weight"], nat["0.bias"][:, None]], dim=1), torch.from_numpy(expected))


def test_factored_is_the_default_form():
    problem = zoo.pick("mlp-categorical")
    runs = [
        sampled(problem, "type2", method=method) for method in ("kfac", ff.kfac(), ff.kfac(damping_form="factored"))
    ]
    first, *rest = (run.ng.precondition(inverted(run, problem, damping=0.1), run.stats.grads) for run in runs)
    for other in rest:
        close(other, first)
    eigen = sampled(problem, "type2", method=ff.kfac(damping_form="eigen"))
    other = eigen.ng.precondition(inverted(eigen, problem, damping=0.1), eigen.stats.grads)
    assert oracles.differs(vec(other), vec(first), 1e-3)


def test_eigen_damping_of_singular_factors_is_exact():
    """One datum: both factors have rank one, yet (G⊗A + λI) is solved to the last digit."""
    problem = zoo.pick("one-datum")
    run = sampled(problem, "mc", samples=1, method=ff.kfac(damping_form="eigen"))
    dense = oracles.fisher_matrix(problem, "mc", run.draws)
    dense = oracles.block_diagonal(problem.params, problem.blocks, dense)
    nat = run.ng.precondition(inverted(run, problem, damping=1e-2), run.stats.grads)
    Fx = dense @ vec(nat) + 1e-2 * vec(nat)
    close(Fx, vec(run.stats.grads))


# -------------------------------------------------------------------------------------------- where K-FAC is exact


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_one_datum_one_draw_is_the_exact_block(fisher):
    """E[aaᵀ ⊗ ggᵀ] = E[aaᵀ] ⊗ E[ggᵀ] when there is only one term."""
    problem = zoo.pick("one-datum")
    run = sampled(problem, fisher, samples=1)
    exact = oracles.block_diagonal(problem.params, problem.blocks, oracles.fisher_matrix(problem, fisher, run.draws))
    close(dense_matvec(run.ng, updated(run, problem), problem.params), exact)


def test_one_datum_is_exact_under_type2_and_many_draws():
    """a is then one vector, so G may be any mean."""
    problem = zoo.pick("one-datum")
    for fisher in ("type2", "mc"):
        run = sampled(problem, fisher, samples=5)
        exact = oracles.fisher_matrix(problem, fisher, run.draws)
        exact = oracles.block_diagonal(problem.params, problem.blocks, exact)
        close(dense_matvec(run.ng, updated(run, problem), problem.params), exact)


def test_deep_linear_gaussian_type2_is_the_exact_block_diagonal():
    """g does not depend on the example there."""
    problem = zoo.pick("deep-linear")
    run = sampled(problem, "type2")
    exact = oracles.block_diagonal(problem.params, problem.blocks, oracles.fisher_matrix(problem, "type2"))
    close(dense_matvec(run.ng, updated(run, problem), problem.params), exact)


def test_kfac_is_not_exact_on_other_nets():
    problem = zoo.pick("mlp-categorical")
    run = sampled(problem, "type2")
    exact = oracles.block_diagonal(problem.params, problem.blocks, oracles.fisher_matrix(problem, "type2"))
    assert oracles.differs(dense_matvec(run.ng, updated(run, problem), problem.params), exact, 1e-3)


@given(strategies.problems(likelihoods=("gaussian-0.3",), activations=(None,), max_shared=0))
def test_drawn_deep_linear_nets_are_exact(problem):
    if isinstance(problem.net, strategies.Residual):
        return  # still linear, but kept apart: see the next test
    run = sampled(problem, "type2")
    exact = oracles.block_diagonal(problem.params, problem.blocks, oracles.fisher_matrix(problem, "type2"))
    close(dense_matvec(run.ng, updated(run, problem), problem.params), exact)


@given(strategies.problems(), strategies.fishers())
def test_drawn_nets(problem, fisher):
    run = sampled(problem, fisher)
    factors = oracles.kfac_of(problem, fisher, run.draws)
    v = zoo.random_tree(problem.params)
    dense = oracles.kfac_dense(problem, factors, oracles.kfac_block)
    close(run.ng.matvec(updated(run, problem), v), unvec(problem.params, dense @ vec(v)))
    if all(A.trace() > 1e-8 and G.trace() > 1e-8 for A, G in factors.values()):  # π is undefined for a dead layer
        damped = oracles.kfac_dense(problem, factors, lambda A, G: oracles.kfac_damped(A, G, 0.1, "factored"))
        nat = run.ng.precondition(inverted(run, problem, damping=0.1), v)
        close(nat, unvec(problem.params, torch.linalg.solve(damped, vec(v))), tol=1e-7)


# ------------------------------------------------------------------------------------------------ running averages


@pytest.mark.parametrize("ema", [0.0, 0.5, 0.95])
def test_running_average_by_hand(ema):
    """M_k = ρ M_{k-1} + (1 - ρ) new, ρ = min(1 - 1/k, ema): the first estimate replaces the empty state."""
    problem = zoo.pick("mlp-categorical")
    ng = problem.build(fisher="empirical")
    state, mean = ng.init(problem.params, ema=ema), None
    for k in range(1, 6):
        turn = torch.randn(problem.x.shape, generator=zoo.generator(k), dtype=torch.float64)
        batch = zoo.replace(problem, x=turn)
        state, _ = ng.update(state, ng.stats(problem.params, batch.batch))
        new = oracles.kfac_of(batch, "empirical")
        rho = min(1 - 1 / k, ema)
        old = mean or new
        mean = {n: [rho * m + (1 - rho) * f for m, f in zip(old[n], new[n], strict=True)] for n in new}
        close(dense_matvec(ng, state, problem.params), oracles.kfac_dense(batch, mean, oracles.kfac_block))
        assert int(state.count) == k


def test_inverses_wait_for_invert():
    """update alone changes matvec, not precondition."""
    problem = zoo.pick("mlp-categorical")
    run = sampled(problem, "empirical")
    state = inverted(run, problem, damping=0.1)
    moved, _ = run.ng.update(state, run.ng.stats(problem.params, (2 * problem.x, problem.y)))
    grads = run.stats.grads
    close(run.ng.precondition(moved, grads), run.ng.precondition(state, grads))
    assert oracles.differs(vec(run.ng.matvec(moved, grads)), vec(run.ng.matvec(state, grads)))


# ------------------------------------------------------------------------------------------------------ edge values


@FORMS
def test_a_dead_layer_does_not_spoil_the_step(form):
    """Zero inputs of a layer, or zero gradients: π is 0/0 unless it is guarded."""
    problem = zoo.from_net(zoo.mlp(3, 4, 2, act=torch.nn.ReLU, bias=False), (4, 3), "gaussian")
    params = {"0.weight": -problem.params["0.weight"].abs(), "2.weight": problem.params["2.weight"]}
    problem = zoo.replace(problem, params=params, x=problem.x.abs())
    run = sampled(problem, "empirical", method=ff.kfac(damping_form=form))
    nat, state, info = run.ng.step(params, run.ng.init(params, damping=0.1), problem.batch)
    assert all(info.ok.values())
    assert all(torch.isfinite(leaf).all() for leaf in nat.values())


def test_an_unknown_damping_form_names_the_known_ones():
    with zoo.as_installed(), pytest.raises(ff.errors.FisherfnError, match="factored"):
        ff.kfac(damping_form="factord")
