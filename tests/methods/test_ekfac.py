"""E-KFAC: K-FAC's eigenbasis with the Fisher's own diagonal in it."""

import pytest
import torch

import fisherfn as ff
from fisherfn.methods.ekfac import scale_in_new_basis
from tests import kron_oracles, oracles, strategies, zoo
from tests.methods.kronecker import (
    FAMILY,
    as_installed,  # noqa: F401
    blocks,
    dense,
    drawn,
    drawn_taps,
    fit,
    given,
    norm,
    solve,
    solved,
    taps_of,
)
from tests.oracles import close, differs, unvec, vec
from tests.zoo import sampled

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")
FORMS = pytest.mark.parametrize("form", ["factored", "eigen"])
IDS = pytest.mark.parametrize(
    "id", ["mlp-categorical", "sequence-pooled", "scale-vector", "conv", "conv-groups", "conv-transpose", "tokens"]
)
NETS = (
    strategies.problems(max_shared=1)
    | strategies.read_out(strategies.convolutions(1) | strategies.transposed_convolutions(1))
    | strategies.embeddings()
)


def basis(factors, k):
    """Columns of Q_G ⊗ Q_A of one group."""
    return torch.kron(*(kron_oracles.matrix(Q[k]).contiguous() for Q in (factors.QG, factors.QA)))


def check_diagonal(F_k, factors):
    for k, F in enumerate(F_k):
        Q, eye = basis(factors, k), torch.eye(len(F), dtype=F.dtype)
        close(Q.T @ Q, eye)
        close(factors.scale[k].reshape(-1), kron_oracles.diagonal_in(Q, F))


# ----------------------------------------------------------------------------------------------------- the factors


@drawn(0.4, NETS, strategies.fishers())
def test_scalings_are_the_fishers_diagonal_in_an_orthonormal_basis(problem, fisher):
    """diag(QᵀFQ), the nearest of all diagonals there; over shared positions too, and for one-hot inputs."""
    run = sampled(problem, fisher)
    _, state, _ = fit(run, problem.params, FAMILY["ekfac"]())
    for key, F in blocks(run.stats).items():
        check_diagonal(F, state.factors[key])


@IDS
def test_the_basis_is_kfacs(id):
    problem = zoo.pick(id)
    run = sampled(problem)
    _, state, _ = fit(run, problem.params, FAMILY["ekfac"]())
    _, kfac, _ = fit(run, problem.params, FAMILY["kfac"]())
    for key, factors in state.factors.items():
        close(factors.A, kfac.factors[key].A)
        close(factors.G, kfac.factors[key].G)
        for k in range(len(factors.A)):
            Q = basis(factors, k)
            rotated = Q.T @ kron_oracles.kron(factors.A[k], factors.G[k]) @ Q
            close(rotated, torch.diag(rotated.diagonal()))


@drawn(0.4, NETS, strategies.fishers())
def test_the_error_is_never_above_kfacs(problem, fisher):
    run = sampled(problem, fisher)
    ekfac, kfac = (fit(run, problem.params, method)[1].factors for method in (FAMILY["ekfac"](), FAMILY["kfac"]()))
    for key, F in blocks(run.stats).items():
        assert norm(F - dense(ekfac[key])) <= norm(F - dense(kfac[key])) + 1e-9 * norm(F), key


def test_the_error_is_below_kfacs_where_inputs_and_gradients_depend():
    """The guard of the inequality above, and what E-KFAC is for."""
    problem = given(*taps_of((1, 1, 8, 1, 4, 4)))
    F = blocks(problem.run.stats)["weight"]
    ekfac, kfac = (
        fit(problem.run, problem.params, method)[1].factors for method in (FAMILY["ekfac"](), FAMILY["kfac"]())
    )
    assert norm(F - dense(ekfac["weight"])) < 0.95 * norm(F - dense(kfac["weight"]))


@drawn(0.4, drawn_taps())
def test_the_diagonal_is_the_best_one_in_the_basis(taps):
    """⟨F − F̂, F̂'⟩ = 0 for every F̂' that is diagonal in the basis."""
    problem = given(*taps)
    _, state, _ = fit(problem.run, problem.params, FAMILY["ekfac"]())
    factors, F_k = state.factors["weight"], blocks(problem.run.stats)["weight"]
    for k, (F, fitted) in enumerate(zip(F_k, dense(factors), strict=True)):
        assert kron_oracles.diagonal_in(basis(factors, k), F - fitted).abs().max() <= 1e-9 * F.norm()


@pytest.mark.parametrize("id", ["one-datum", "deep-linear"])
def test_ekfac_is_the_exact_block_if_kfac_is(id):
    problem = zoo.pick(id)
    run = sampled(problem, "type2")
    _, state, _ = fit(run, problem.params, FAMILY["ekfac"]())
    for key, F in blocks(run.stats).items():
        close(dense(state.factors[key]), F)


def test_factors_above_the_width_keep_the_standard_basis():
    problem = given(*taps_of((2, 2, 5, 2, 3, 4)))
    F = blocks(problem.run.stats)["weight"]
    for limit, ndims in ((3, [2, 3]), (1, [2, 2])):
        _, state, _ = fit(problem.run, problem.params, FAMILY["ekfac"](diagonal_above=limit))
        factors = state.factors["weight"]
        assert [factors.A.ndim, factors.G.ndim] == ndims
        check_diagonal(F, factors)
    close(factors.scale, F.diagonal(dim1=1, dim2=2).reshape(factors.scale.shape))


# ----------------------------------------------------------------------------------------------------- the solve


@IDS
@FORMS
@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_precondition_solves_the_damped_system(id, form, damping):
    """Eigen: λ is added to the scalings; factored: what K-FAC's damped factors have more than its factors."""
    problem = zoo.pick(id)
    ng, state, _ = fit(sampled(problem), problem.params, FAMILY["ekfac"](damping_form=form), damping=damping)
    V, nat, _ = solved(ng, state, problem.params, zoo.random_tree(problem.params))
    for key, factors in state.factors.items():
        fitted, added = dense(factors), []
        for A, G in zip(factors.A, factors.G, strict=True):
            more = kron_oracles.kron(*kron_oracles.damped_pair(A, G, damping)) - kron_oracles.kron(A, G)
            added.append(more if form == "factored" else damping * torch.eye(len(more), dtype=more.dtype))
        close(nat[key], solve(fitted + torch.stack(added), V[key]), tol=1e-7)


@FORMS
@drawn(0.2, problem=NETS)
def test_steps_are_positive_definite(form, problem):
    """No scaling is negative, so that no damping is too small."""
    ng, state, _ = fit(sampled(problem), problem.params, FAMILY["ekfac"](damping_form=form), damping=1e-4)
    assert all(factors.scale.min() >= 0 for factors in state.factors.values())
    v = zoo.random_tree(problem.params)
    assert ff.tree.dot(v, ng.precondition(ng.invert(state)[0], v)) > 0


# -------------------------------------------------------------------------------------------- when the basis moves


def test_a_step_without_invert_moves_the_scalings_in_the_old_basis():
    problem = zoo.pick("sequence-pooled")
    run = sampled(problem, "empirical", method="ekfac")
    _, state, _ = run.ng.step(problem.params, run.ng.init(problem.params), problem.batch)
    batch = (0.5 * problem.x, problem.y)
    _, kept, _ = run.ng.step(problem.params, state, batch, invert=False)
    _, moved, _ = run.ng.step(problem.params, state, batch)
    stats = run.ng.stats(problem.params, batch)
    first, *_ = keys = list(kept.factors)
    by_key = dict.fromkeys(keys, kept)
    for inverting, expected in ((False, by_key), ({first}, by_key | {first: moved})):
        alone, _ = run.ng.update(state, stats, inverting=inverting)
        for key in keys:
            close(ff.tree.flatten(alone.factors[key]), ff.tree.flatten(expected[key].factors[key]))
    new = blocks(stats)
    for key, factors in kept.factors.items():
        close(factors.QA, state.factors[key].QA)
        assert differs(moved.factors[key].QA, state.factors[key].QA, 1e-3)
        diagonal = kron_oracles.diagonal_in(basis(factors, 0), new[key][0]).reshape(factors.scale.shape)
        close(factors.scale, (state.factors[key].scale + diagonal) / 2)
        close(factors.A, moved.factors[key].A)


def test_eigenvalues_are_transferred_as_the_diagonal_of_the_old_operator():
    """The definition, on dense matrices of two groups."""
    problem = given(*taps_of((2, 1, 6, 1, 4, 5)))
    _, one, _ = fit(problem.run, problem.params, FAMILY["ekfac"]())
    _, two, _ = fit(given(*taps_of((2, 1, 6, 1, 4, 5), seed=3)).run, problem.params, FAMILY["ekfac"]())
    old, new = one.factors["weight"], two.factors["weight"]
    found = scale_in_new_basis(old, new.QA, new.QG)
    for k, F in enumerate(dense(old)):
        close(found[k].flatten(), kron_oracles.diagonal_in(basis(new, k), F))


def test_five_refreshes_in_float32_stay_at_the_basis_and_diagonal_in_float64():
    """The factors of a running average, with bases decomposed in single precision."""
    problem = zoo.pick("mlp-categorical")
    states = []
    for dtype in (torch.float64, torch.float32):
        params = {name: p.to(dtype) for name, p in problem.params.items()}
        ng = ff.natural_gradient(
            problem.model, params, problem.x.to(dtype), likelihood=problem.likelihood, method="ekfac",
            fisher="empirical",
        )  # fmt: skip
        state = ng.init(params, damping=0.1)
        for step in range(5):
            batch = ((1 + 0.1 * step) * problem.x.roll(step, 0)).to(dtype), problem.y
            _, state, info = ng.step(params, state, batch)
            ff.check(info)
        for factors in state.factors.values():
            eye = torch.eye(factors.QA.shape[-1], dtype=dtype)
            assert (factors.QA.mT @ factors.QA - eye).abs().max() < 8 * torch.finfo(dtype).eps
        states.append(state)
    for key in states[0].factors:
        exact, found = (dense(state.factors[key]).double() for state in states)
        assert (found - exact).norm() < 1e-5 * exact.norm()


def test_matvec_is_the_dense_operator_in_params_order():
    """Against gradients by definition, in a net whose kernels are stored transposed."""
    problem = zoo.pick("conv-transpose")
    run = sampled(problem)
    ng, state, _ = fit(run, problem.params, FAMILY["ekfac"]())
    exact = oracles.fisher_matrix(problem, "mc", run.draws)
    exact = oracles.block_diagonal(problem.params, problem.blocks, exact)
    eye = torch.eye(len(exact), dtype=exact.dtype)
    fitted = torch.stack([vec(ng.matvec(state, unvec(problem.params, row))) for row in eye])
    close((fitted * fitted).sum(), (exact * fitted).sum())  # a projection of the exact block diagonal
    assert (exact - fitted).norm() < 0.9 * exact.norm()
