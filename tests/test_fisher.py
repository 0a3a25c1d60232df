"""The sampled Fisher by its definition: F = 1/N Σ_n Σ_s vec(W_sn) vec(W_sn)ᵀ, one example at a time."""

import pytest
import torch
from hypothesis import given

from fisherfn.fisher import relative_error, square_norm
from tests import drawn, oracles, strategies, zoo
from tests.oracles import close, unvec, vec
from tests.zoo import FISHERS, sampled

EVERY = pytest.mark.parametrize("make", zoo.cases())
KINDS = pytest.mark.parametrize("fisher", FISHERS)


def definition(problem, run, fisher):
    return oracles.fisher_matrix(problem, fisher, run.draws)


def check_operator(problem, F, dense, damping=0.1):
    """Every view of the operator against the dense matrix."""
    v = zoo.random_tree(problem.params, seed=5)
    eye = torch.eye(len(dense), dtype=dense.dtype)
    close(F.dense(), dense)
    close(F @ v, unvec(problem.params, dense @ vec(v)))
    close(F.diag(), dense.diagonal())
    close(F.trace(), dense.trace())
    close(F.solve(v, damping), unvec(problem.params, torch.linalg.solve(dense + damping * eye, vec(v))))


@EVERY
@KINDS
def test_full_fisher_is_its_definition(make, fisher):
    problem = make()
    run = sampled(problem, fisher)
    check_operator(problem, run.ng.fisher(run.stats, structure="full"), definition(problem, run, fisher))


@EVERY
def test_full_is_the_default_structure(make):
    problem = make()
    run = sampled(problem)
    close(run.ng.fisher(run.stats).dense(), definition(problem, run, "mc"))


@pytest.mark.parametrize("make", zoo.cases("blocks"))
@KINDS
def test_block_fisher_keeps_the_blocks_of_the_full_one(make, fisher):
    problem = make()
    run = sampled(problem, fisher)
    dense = oracles.block_diagonal(problem.params, problem.blocks, definition(problem, run, fisher))
    check_operator(problem, run.ng.fisher(run.stats, structure="block"), dense)


@pytest.mark.parametrize("make", zoo.cases("linear", "blocks"))
@pytest.mark.parametrize("structure", ["full", "block"])
@KINDS
def test_one_layers_block_is_in_the_order_of_its_matrix(make, structure, fisher):
    """Rows and columns run over W = [weight | bias], row-major."""
    problem = make()
    run = sampled(problem, fisher)
    dense = definition(problem, run, fisher)
    for key, names in problem.blocks.items():
        at = oracles.matrix_positions(problem.params, names)
        close(run.ng.fisher(run.stats, structure=structure).block(key), dense[at[:, None], at])


@EVERY
@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_gram_is_the_small_side_of_the_same_factor(make, fisher):
    """F = U Uᵀ, gram = UᵀU, column s·N + n."""
    problem = make()
    run = sampled(problem, fisher)
    U = oracles.columns(problem, fisher, run.draws)
    close(run.ng.fisher(run.stats).gram(), U.T @ U)


@pytest.mark.parametrize("make", zoo.cases("blocks"))
def test_block_gram_is_a_dict_of_the_blocks(make):
    problem = make()
    run = sampled(problem, "mc")
    U = oracles.columns(problem, "mc", run.draws)
    grams = run.ng.fisher(run.stats, structure="block").gram()
    assert set(grams) == set(run.stats.taps)
    expected = {names: U[oracles.positions(problem.params, names)] for names in problem.blocks.values()}
    left = list(grams.values())
    for rows in expected.values():  # keys of non-layers are the library's business: match by value
        hit = [i for i, gram in enumerate(left) if torch.allclose(gram, rows.T @ rows, rtol=1e-8, atol=1e-12)]
        assert hit, "no block has this gram"
        left.pop(hit[0])
    assert not left


@EVERY
def test_type2_gram_has_the_nonzero_spectrum_of_the_fisher(make):
    """The columns of a square root are free, their spectrum is not."""
    problem = make()
    run = sampled(problem, "type2")
    gram = torch.linalg.eigvalsh(run.ng.fisher(run.stats).gram()).flip(0)
    full = torch.linalg.eigvalsh(oracles.fisher_matrix(problem, "type2")).flip(0)
    shared = min(len(gram), len(full))
    close(gram[:shared], full[:shared])
    assert gram[shared:].abs().sum() + full[shared:].abs().sum() < 1e-8 * full[0]


@EVERY
@pytest.mark.parametrize("damping", [1e-4, 1.0, 1e3])
def test_solve_inverts_the_damped_matvec(make, damping):
    problem = make()
    run = sampled(problem)
    F, v = run.ng.fisher(run.stats), zoo.random_tree(problem.params)
    x = F.solve(v, damping)
    Fx = F @ x
    close({name: Fx[name] + damping * x[name] for name in v}, v, tol=1e-7)


@pytest.mark.parametrize("id", ["mlp-categorical", "mlp-bernoulli", "mlp-gaussian", "sequence-out", "scale-vector"])
def test_many_draws_tend_to_the_exact_expectation(id):
    problem = zoo.pick(id)
    ng = problem.build(samples=1000)
    many = ng.fisher(ng.stats(problem.params, problem.batch, generator=zoo.generator(11))).dense()
    exact = oracles.fisher_matrix(problem, "type2")
    error = (many - exact).norm() / exact.norm()
    assert error < 0.15, f"1000 draws are {error:.2f} away from the expectation"


@pytest.mark.parametrize("id", ["mlp-categorical", "sequence-pooled", "scale-vector"])
def test_draws_differ_from_the_data(id):
    """The three Fishers are three matrices: the kinds are not silently the same."""
    problem = zoo.pick(id)
    dense = [run.ng.fisher(run.stats).dense() for run in (sampled(problem, kind) for kind in FISHERS)]
    assert all(oracles.differs(dense[i], dense[j], 1e-2) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_stats_override_the_builds_fisher_and_samples():
    problem = zoo.pick("mlp-categorical")
    ng = problem.build(fisher="empirical")
    close(ng.fisher(ng.stats(problem.params, problem.batch)).dense(), oracles.fisher_matrix(problem, "empirical"))
    type2 = ng.stats(problem.params, problem.batch, fisher="type2")
    close(ng.fisher(type2).dense(), oracles.fisher_matrix(problem, "type2"))
    mc = ng.stats(problem.params, problem.batch, fisher="mc", samples=3, generator=zoo.generator())
    assert all(tap.g.shape[1] == 3 for tap in mc.taps.values())


def test_own_samples_passed_as_targets_of_the_empirical_fisher():
    """Targets that the user drew: fisher="empirical" with them is fisher="mc" with one draw."""
    problem = zoo.pick("mlp-categorical")
    run = sampled(problem, "mc", samples=1)
    ng = problem.build(fisher="empirical")
    stats = ng.stats(problem.params, (problem.x, run.draws[0]))
    close(ng.fisher(stats).dense(), run.ng.fisher(run.stats).dense())


@given(strategies.problems(), strategies.fishers())
def test_drawn_nets(problem, fisher):
    run = sampled(problem, fisher)
    dense = definition(problem, run, fisher)
    check_operator(problem, run.ng.fisher(run.stats), dense)
    blocks = oracles.block_diagonal(problem.params, problem.blocks, dense)
    check_operator(problem, run.ng.fisher(run.stats, structure="block"), blocks)


@pytest.mark.parametrize("id", ["conv", "conv-transpose", "tokens"])
def test_window_by_window_is_the_whole(id, monkeypatch):
    """One example at a time: what large layers do, made small."""
    problem = zoo.pick(id)
    run = sampled(problem, "mc")
    F, v = run.ng.fisher(run.stats), zoo.random_tree(problem.params)
    whole = F @ v, F.diag(), F.trace(), F.dense(), run.stats.grads
    monkeypatch.setattr("fisherfn.taps.WINDOW", 1)
    parts = F @ v, F.diag(), F.trace(), F.dense(), run.stats.grads
    for part, expected in zip(parts, whole, strict=True):
        close(part, expected)
    state, _ = run.ng.update(run.ng.init(problem.params), run.stats)
    monkeypatch.undo()
    close(run.ng.matvec(state, v), run.ng.matvec(run.ng.update(run.ng.init(problem.params), run.stats)[0], v))


@pytest.mark.parametrize("kind", drawn.ROWS)
def test_the_relative_error_is_that_of_the_dense_block(kind):
    """From ⟨F, F̂⟩ and ‖F̂‖² alone, all groups together."""
    tap, W = drawn.tap(kind, (2, 2, 3, 2, 2, 3))
    rows = W.flatten(2).flatten(0, 1)
    F, other = rows.T @ rows / 3, drawn.psd(1, rows.shape[1])[0]
    close(square_norm(tap), F.square().sum())
    close(relative_error(tap, (F * other).sum(), other.square().sum()), (F - other).norm() / F.norm())
    assert relative_error(tap, F.square().sum(), F.square().sum()) < 1e-6
