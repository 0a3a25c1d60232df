"""Two-level: the rows of the coarse spaces, their matrix, and what is refused."""

from dataclasses import replace

import pytest
import torch

import fisherfn as ff
from fisherfn.methods.coarse_spaces import published
from tests import kron_oracles, oracles, zoo
from tests.drawn import tap as tap_of
from tests.methods.kronecker import drawn, pairs_of
from tests.methods.two_level import (
    COARSE,
    FORMS,
    case,
    coarse_inverse,
    combined,
    full_rank,
    operator,
    rows_of,
    settings,
)
from tests.oracles import close, differs

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")
KRYLOV = pytest.mark.parametrize("krylov", [False, True])
SPACES = pytest.mark.parametrize("coarse", COARSE)


def placed(problem, rows):
    """Rows of every layer, given over its matrix [weight | bias] row-major, over all parameters."""
    total = sum(leaf.numel() for leaf in problem.params.values())
    where = {key: oracles.matrix_positions(problem.params, names) for key, names in problem.blocks.items()}
    parts = [torch.zeros(len(R), total, dtype=R.dtype).index_copy(1, where[key], R) for key, R in rows.items()]
    return torch.cat(parts)


def check_rows(one, coarse, vectors, rows, wrong):
    """The additive operator less M is Q of these rows; that of others is not."""
    Q = operator(*one.two_level(coarse, False, "additive", vectors), one.problem.params) - one.M
    close(Q, coarse_inverse(rows, one.damped))
    assert differs(coarse_inverse(wrong, one.damped), Q, 1e-3), "these rows would do as well"


# ------------------------------------------------------------------------------------------------------- the rows


@pytest.mark.parametrize("vectors", [1, 2, 3])
def test_rows_of_ones_include_the_bias_and_follow_the_matrix(vectors):
    """Parts of [weight | bias], row by row; not of the weights with the biases behind, nor of the weights alone."""
    one = full_rank()
    params = one.problem.params

    def ones(count):
        return torch.stack([(torch.arange(count) * vectors // count == p).double() for p in range(vectors)])

    sizes = {key: len(oracles.positions(params, names)) for key, names in one.problem.blocks.items()}
    rows = placed(one.problem, {key: ones(count) for key, count in sizes.items()})
    bias = oracles.positions(params, [name for name in params if name.endswith("bias")])
    check_rows(one, "nicolaides", vectors, rows, rows.index_fill(1, bias, 0.0))
    if vectors > 1:
        behind = {key: oracles.positions(params, names) for key, names in one.problem.blocks.items()}
        wrong = [torch.zeros(vectors, len(one.v)).double().index_copy(1, behind[k], ones(n)) for k, n in sizes.items()]
        check_rows(one, "nicolaides", vectors, rows, torch.cat(wrong))


@pytest.mark.parametrize("vectors", [1, 2, 4])
def test_spectral_rows_are_the_smallest_eigenvectors_of_the_dense_block(vectors):
    """The eigenvectors are those of kron(G, A), not of kron(A, G), and not the largest."""
    one = full_rank()
    factors = oracles.kfac_of(one.problem, "mc", one.run.draws)

    def vectors_of(dense):
        values, found = torch.linalg.eigh(dense)
        assert values[vectors] - values[vectors - 1] > 1e-6 * values[-1], "several span the space as well"
        return found.T[:vectors]

    rows = {key: vectors_of(torch.kron(G, A)) for key, (A, G) in factors.items()}
    scrambled = {key: vectors_of(torch.kron(A, G)) for key, (A, G) in factors.items()}
    largest = {key: vectors_of(-torch.kron(G, A)) for key, (A, G) in factors.items()}
    for wrong in (scrambled, largest):
        check_rows(one, "spectral", vectors, placed(one.problem, rows), placed(one.problem, wrong))


@drawn(0.6, settings())
def test_spectral_rows_of_drawn_nets(setting):
    """q_G q_Aᵀ of the leading Kronecker product, group by group, whatever the fine method."""
    one = case(*setting)
    ng, state = one.two_level("spectral", vectors=3)
    shapes = {block.key: block.shape for block in ng.layout.blocks}
    for key, flat in state.inverses.space.rows.items():
        R = flat.reshape(-1, *shapes[key])
        A, G = pairs_of(state.factors.fine[key])[0]
        dense = torch.block_diag(*(kron_oracles.kron(*group) for group in zip(A, G, strict=True)))
        found = R.flatten(1)
        length = found.norm(dim=1)
        count = min(3, found.shape[1])
        close(length, torch.tensor([1.0] * count + [0.0] * (3 - count)).double())
        values, scale = torch.linalg.eigvalsh(dense)[:count], dense.norm()
        rayleigh = torch.stack([row @ dense @ row for row in found[:count]])
        assert (rayleigh - values).abs().max() <= 1e-9 * scale
        assert (found[:count] @ dense - rayleigh[:, None] * found[:count]).norm() <= 1e-8 * scale
        for row in R[:count]:  # one product of vectors, in one group
            close(torch.linalg.svdvals(row).flatten().sort().values[-1], torch.tensor(1.0))


@drawn(0.4, settings())
def test_rows_are_orthonormal_and_the_coarse_matrix_is_the_fishers(setting):
    """R₀ R₀ᵀ = I where a row is not zero, and F_c = R₀ F R₀ᵀ + λ R₀ R₀ᵀ."""
    one = case(*setting)
    for coarse, krylov, vectors in (("nicolaides", True, 2), ("spectral", True, 1), ("nicolaides", False, 5)):
        ng, state = one.two_level(coarse, krylov, vectors=vectors)
        R, factor = rows_of(ng, state), state.inverses.space.factor
        alive = R.norm(dim=1) > 0
        close(R @ R.T, torch.diag(alive.double()), tol=1e-9)
        close((factor @ factor.T)[alive][:, alive], (R @ one.damped @ R.T)[alive][:, alive])
        for row in R:
            assert (one.layers(row).norm(dim=1) > 0).sum() <= 1, "a row of two layers"


# ------------------------------------------------------------------------------------------------- dependent rows


@pytest.mark.parametrize("form", FORMS)
def test_krylov_adds_nothing_to_eigenvectors(form):
    """M times an eigenvector of M is none: a second row would be rounding."""
    one = full_rank(fine="kfac-eigen")
    close(one.step(one.v, "spectral", True, form), one.step(one.v, "spectral", False, form))


@SPACES
@KRYLOV
def test_layers_of_one_entry(coarse, krylov):
    """More rows than entries: what depends on others is left out, and the rest is as if it had not been there."""
    one = case(zoo.from_net(zoo.mlp(1, 1, 2, bias=False), (4, 1), "gaussian"))
    Q = coarse_inverse(one.rows(coarse, krylov), one.damped)
    vectors = 1 if coarse == "residual" else 3
    if vectors == 3:  # as many as there are entries in all
        Q = torch.linalg.inv(one.damped)
    for form in FORMS:
        close(one.step(one.v, coarse, krylov, form, vectors), combined(form, one.M, one.damped, Q) @ one.v)


# ----------------------------------------------------------------------------------------------------- refusals


def test_a_coarse_matrix_without_a_factor_leaves_the_state_as_it_was():
    """The fine method is sound: only the statistics of the coarse matrix overflow."""
    one = case(zoo.pick("mlp-gaussian"))
    ng = replace(one.run.ng, method=ff.two_level())
    good, _ = ng.invert(ng.update(ng.init(one.problem.params, damping=0.1), one.run.stats)[0])
    taps = {key: tap._replace(g=tap.g * torch.inf) for key, tap in good.factors.taps.items()}
    bad = good._replace(factors=good.factors._replace(taps=taps))
    after, info = ng.invert(bad)
    close(ng.precondition(after, one.v_tree), ng.precondition(good, one.v_tree), tol=1e-14)
    with pytest.raises(ff.errors.NotPositiveDefiniteError):
        ff.check(info)


def test_without_damping_a_singular_coarse_matrix_has_the_floor_of_its_precision():
    """The space has as many rows as parameters: it is everything, and the step is that of F with a tiny λ."""
    one = case(zoo.pick("mlp-gaussian"))
    ng = replace(one.run.ng, method=ff.two_level(vectors=24))
    state, _ = ng.update(ng.init(one.problem.params, damping=0.0), one.run.stats)
    state, info = ng.invert(state)
    ff.check(info)
    grads = one.run.stats.grads
    expected = one.run.ng.fisher(one.run.stats).solve(grads, 1e-9)
    residual = ff.tree.add(one.run.ng.fisher(one.run.stats) @ ng.precondition(state, grads), grads, scale=-1.0)
    least = ff.tree.add(one.run.ng.fisher(one.run.stats) @ expected, grads, scale=-1.0)
    assert ff.tree.norm(residual) < ff.tree.norm(least) + 1e-6 * ff.tree.norm(grads)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"coarse": "nicolaide"}, "UnknownNameError", "did you mean 'nicolaides'.*residual, tselepidis, spectral"),
        ({"form": "additiv"}, "UnknownNameError", "multiplicative, balanced, additive"),
        ({"vectors": 0}, "HyperparameterError", "vectors must be a whole number >= 1, got 0"),
        ({"vectors": 2.5}, "HyperparameterError", "vectors must be a whole number >= 1, got 2.5"),
        ({"coarse": "residual", "vectors": 2}, "HyperparameterError", "one row"),
        ({"coarse": "tselepidis", "vectors": 2}, "HyperparameterError", "one row"),
        ({"coarse": "tselepidis", "krylov": True}, "HyperparameterError", "krylov"),
        ({"coarse": "tselepidis", "form": "balanced"}, "HyperparameterError", "additive"),
    ],
)
def test_unknown_spaces_and_forms_raise_at_construction(arguments, error, says):
    with zoo.as_installed(), pytest.raises(getattr(ff.errors, error), match=says):
        ff.two_level(**arguments)


@pytest.mark.parametrize("fine", [ff.exact(), ff.exact("block"), ff.two_level()], ids=["exact", "block", "two-level"])
def test_spectral_needs_kronecker_factors(fine):
    one = full_rank()
    ng, state = one.updated(ff.two_level(fine, "spectral"))
    with pytest.raises(ff.errors.HyperparameterError, match="nicolaides"):
        ng.invert(state)


def test_the_other_spelling():
    one = full_rank()
    close(one.step(one.v, "tpselepedis"), one.step(one.v, "tselepidis"))


def test_the_published_matrix_averages_positions_of_inputs_and_sums_those_of_gradients():
    """F_c[l, m] = (Σ E[a_l a_mᵀ]) (Σ E[g_l g_mᵀ]) + λ for l = m, with layers of different numbers of positions."""
    layers = (("one", 3, 2, 3), ("two", 1, 3, 2))  # positions, outputs, inputs
    taps = {key: tap_of("dense", (1, 2, 4, t, o, i), t)[0] for key, t, o, i in layers}
    a = torch.stack([tap.a[0].mean(1).sum(-1) for tap in taps.values()])
    g = torch.stack([tap.g[0].sum((2, 3)).flatten() for tap in taps.values()])
    expected = (a @ a.T / 4) * (g @ g.T / 4)
    factor = published(taps, torch.tensor(0.5).double()).factor
    close(factor @ factor.T, expected + 0.5 * torch.eye(2).double())
