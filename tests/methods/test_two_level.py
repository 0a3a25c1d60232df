"""Two-level: the step by its definition in dense matrices, and what theory says of every form."""

import pytest
import torch

import fisherfn as ff
from fisherfn.views import cheapest_gradient
from tests import oracles, strategies, zoo
from tests.methods.kronecker import dense_taps, drawn
from tests.methods.two_level import (
    COARSE,
    FINE,
    FORMS,
    case,
    coarse_inverse,
    combined,
    doubtful,
    full_rank,
    inverted,
    operator,
    settings,
    span,
)
from tests.oracles import close, differs, unvec, vec

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")
SPACES = pytest.mark.parametrize("coarse", COARSE)
ALL = [(coarse, krylov) for coarse in COARSE for krylov in (False, True)]
MIXED = ("conv", "conv-transpose", "tokens", "scale-vector")  # D25: different families in one net


# -------------------------------------------------------------------------------------------------- by definition


def check_definition(case, coarse, krylov):
    rows = case.rows(coarse, krylov)
    if doubtful(rows):
        return
    Q = coarse_inverse(rows, case.damped)
    for form in FORMS:
        if form == "additive" and coarse == "residual" and rounding(case):
            continue  # test_no_correction_is_added_for_a_zero_residual
        close(case.step(case.v, coarse, krylov, form), combined(form, case.M, case.damped, Q) @ case.v, tol=1e-7)


def rounding(case):
    """Whether a layer's residual is rounding: it has no direction."""
    residual = case.v - case.damped @ (case.M @ case.v)
    return bool((case.layers(residual).norm(dim=1) < 1e-10 * case.v.norm()).any())


@drawn(0.6, settings())
def test_drawn_nets_take_the_step_of_the_definition(setting):
    """Chains, convolutions, embeddings, and mixtures of them."""  # D23, D25
    one = case(*setting)
    for coarse, krylov in ALL:
        check_definition(one, coarse, krylov)


@pytest.mark.parametrize("fine", FINE)
@zoo.as_installed()
def test_over_every_fine_method(fine):
    for id in MIXED:
        one = case(zoo.pick(id), fine)
        for coarse, krylov in ALL:
            check_definition(one, coarse, krylov)


@drawn(0.4, settings())
def test_operators_of_fixed_spaces(setting):
    """Balanced is symmetric positive definite."""
    one = case(*setting)
    for coarse, krylov in ALL:
        rows = one.rows(coarse, krylov)
        for form in () if coarse == "residual" or doubtful(rows) else FORMS:
            dense = operator(*one.two_level(coarse, krylov, form), one.problem.params)
            close(dense, combined(form, one.M, one.damped, coarse_inverse(rows, one.damped)), tol=1e-7)
            if form == "balanced":
                close(dense, dense.T, tol=1e-9)
                assert torch.linalg.eigvalsh((dense + dense.T) / 2).min() > 0


@SPACES
def test_the_forms_are_different_steps(coarse):
    """The correction is that of the residual, not of the gradient; multiplicative is not symmetric."""  # D23
    one = full_rank()
    steps = [one.step(one.v, coarse, False, form) for form in FORMS]
    assert all(differs(steps[p], steps[q], 1e-2) for p, q in ((0, 1), (0, 2), (1, 2)))
    if coarse != "residual":
        dense = operator(*one.two_level(coarse), one.problem.params)
        assert differs(dense, dense.T, 1e-2)


def test_the_residual_spans_the_space_not_the_gradient():
    """M r, layer by layer; neither r nor M∇ nor ∇ span it."""  # D23
    one = full_rank()
    r = one.v - one.damped @ (one.M @ one.v)
    step = one.step(one.v, "residual")
    for rows, same in ((one.M @ r, True), (r, False), (one.M @ one.v, False), (one.v, False)):
        Q = coarse_inverse(one.layers(rows), one.damped)
        expected = combined("multiplicative", one.M, one.damped, Q) @ one.v
        assert differs(step, expected, 1e-3 if not same else 1e-8) != same


def test_the_defaults():
    one = full_rank()
    expected = one.step(one.v, "nicolaides", False, "multiplicative", 1)
    for method in (ff.two_level(), ff.METHODS["twolevel_kfac"](), ff.two_level(ff.kfac())):
        ng, state = inverted(*one.updated(method))
        close(vec(ng.precondition(state, unvec(one.problem.params, one.v))), expected)


# ------------------------------------------------------------------------------------------- multiplicative: nearest


def check_nearest(case, v, coarse, krylov):
    """E(β) = ‖M∇ + R₀ᵀβ − F_•⁻¹∇‖² in the norm of F_•: least at the step, lower by ‖R₀ r‖² in that of F_c⁻¹."""
    F, start = case.damped, case.M @ v
    exact = torch.linalg.solve(F, v)
    z, R = case.step(v, coarse, krylov), span(case.rows(coarse, krylov, v))
    energy, before = ((x - exact) @ F @ (x - exact) for x in (z, start))
    small = 1e-12 * (v @ exact)
    assert energy <= before + small
    assert (R @ (v - F @ z)).norm() <= 1e-8 * v.norm()
    restricted = R @ (v - F @ start)
    gain = restricted @ torch.linalg.solve(R @ F @ R.T, restricted)
    assert (energy - before + gain).abs() <= 1e-8 * before + small
    return energy, before


@drawn(0.6, settings())
def test_the_correction_is_the_best_one_in_the_space(setting):
    one = case(*setting)
    for coarse, krylov in ALL:
        if not doubtful(one.rows(coarse, krylov)):
            check_nearest(one, one.v, coarse, krylov)


@pytest.mark.parametrize("make", zoo.cases("blocks"))
@zoo.as_installed()
def test_the_correction_is_the_best_one_for_the_gradient(make):
    """And more rows are never farther: Krylov's space contains the one that it is made of."""
    one = case(make(), "kfac-eigen", "type2")
    v = vec(oracles.mean_gradient(one.problem))
    for coarse in COARSE:
        (plain, before), (krylov, _) = (check_nearest(one, v, coarse, wanted) for wanted in (False, True))
        assert krylov <= plain * (1 + 1e-8) + 1e-12 * v @ one.M @ v
        if coarse == "residual" and before > 1e-6 * v @ one.M @ v:
            assert plain < 0.999 * before, "no gain at all"


# ---------------------------------------------------------------------------------------------------- limiting cases


@pytest.mark.parametrize("coarse", ["nicolaides", "spectral"])
@pytest.mark.parametrize("id", ["mlp-categorical", "no-bias", "conv-groups", "group-norm", "tied-layer", *MIXED])
@zoo.as_installed()
def test_a_space_that_spans_everything_gives_the_exact_natural_gradient(id, coarse):
    one = case(zoo.pick(id))
    exact = torch.linalg.solve(one.damped, one.v)
    largest = max(len(oracles.positions(one.problem.params, names)) for names in one.problem.blocks.values())
    for form in ("multiplicative", "balanced"):
        close(one.step(one.v, coarse, False, form, largest), exact, tol=1e-7)
        assert differs(one.step(one.v, coarse, False, form), exact, 1e-3), "one vector is as good"


@pytest.mark.parametrize("form", FORMS)
def test_no_correction_is_added_for_a_zero_residual(form):
    """An exact M leaves a residual of rounding, whose direction must not matter."""
    one = full_rank()
    v = unvec(one.problem.params, one.v)
    ng, state = inverted(*one.updated(ff.two_level(ff.exact(), "residual", form=form)))
    close(vec(ng.precondition(state, v)), torch.linalg.solve(one.damped, one.v))


@pytest.mark.parametrize("krylov", [False, True])
def test_wide_layers_whose_fine_step_is_taken_from_rows(krylov):
    """Two examples on layers of width 12: gradients and F_• R₀ᵀβ go to the fine method as taps, as if as matrices."""
    one = case(zoo.from_net(zoo.mlp(12, 12, 12), (2, 12), "gaussian"), "kfac-eigen")
    assert all(isinstance(cheapest_gradient(one.run.stats, block), ff.Tap) for block in one.run.ng.layout.blocks)
    Q = coarse_inverse(one.rows("nicolaides", krylov), one.damped)
    for form in FORMS:
        ng, state = one.two_level("nicolaides", krylov, form)
        expected = combined(form, one.M, one.damped, Q) @ vec(one.run.stats.grads)
        close(vec(ng.precondition(state, one.run.stats)), expected, tol=1e-8)
        close(vec(ng.precondition(state, one.run.stats.grads)), expected, tol=1e-8)


# ------------------------------------------------------------------------------------------------------- published


def published(case, taps):
    """M∇ + R₀ᵀ F_c⁻¹ R₀∇, rows of ones, F_c[l, m] = (Σ E[a_l a_mᵀ]) (Σ E[g_l g_mᵀ]), plus λ for l = m.

    Taps `a [n, t, i]`, `g [n, s, t, o]`. Of several positions, the mean of a and the sum of g.
    """
    a, g = [a.mean(1) for a, _ in taps], [g.sum(2) for _, g in taps]
    F_c = case.damping * torch.eye(len(taps), dtype=torch.float64)
    for row in range(len(taps)):
        for column in range(len(taps)):
            A = torch.einsum("ni,nj->ij", a[row], a[column]) / len(a[row])
            G = torch.einsum("nso,nsp->op", g[row], g[column]) / len(g[row])
            F_c[row, column] += A.sum() * G.sum()
    R = case.layers(torch.ones_like(case.v))
    return case.M @ case.v + R.T @ torch.linalg.solve(F_c, R @ case.v)


@drawn(0.6, settings(strategies.problems(max_shared=1)))
def test_tselepidis_is_the_published_sum(setting):
    one = case(*setting)
    taps = oracles.taps(one.problem, setting[2], one.run.draws)
    close(one.step(one.v, "tselepidis"), published(one, [taps[name] for name in one.problem.blocks]), tol=1e-7)


@pytest.mark.parametrize("id", ["conv-groups", "group-norm", "sequence-pooled", "transformer", *MIXED])
def test_tselepidis_of_any_layers(id):
    """Maps of different size; groups have no one a and g, but the sum of their gradient's entries."""

    def one_group(a, g):
        if len(a) == 1:
            return a[0], g[0].transpose(0, 1)
        total = torch.einsum("ksnto,knti->ns", g, a)
        return torch.ones(len(total), 1, 1, dtype=a.dtype), total[:, :, None, None]

    one = case(zoo.pick(id))
    taps = [one_group(*dense_taps(one.run.stats)[key]) for key in one.problem.blocks]
    close(one.step(one.v, "tselepidis"), published(one, taps))
