"""Solving with a sum of two Kronecker products, against dense matrices that know nothing of Kronecker products.

Factored damping: `B + C` with `B = (G + √λ/π I) ⊗ (A + π√λ I)` of the leading term and C the second. Where it is
indefinite, its spectrum relative to B is floored: `B^½ max(I + B^-½ C B^-½, floor) B^½`.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st

import fisherfn as ff
from tests import kron_oracles, zoo
from tests.methods.kronecker import (
    FAMILY,
    ITERATIVE,
    TWO_TERMS,
    as_installed,  # noqa: F401
    dense,
    drawn,
    drawn_taps,
    fit,
    given,
    pairs_of,
    solve,
    solved,
    taps_of,
)
from tests.oracles import close, differs, unvec, vec
from tests.zoo import sampled

EVERY = pytest.mark.parametrize("method", TWO_TERMS)
BOTH = pytest.mark.parametrize("method", ["lanczos", "kfac_cor"])  # to solve, Deflation's sum is as Lanczos's
FORMS = pytest.mark.parametrize("form", ["factored", "eigen"])
FLOOR = 0.05
DAMPINGS = st.sampled_from([1e-4, 1e-2, 1.0])


def terms(factors):
    """Group by group: the leading pair, and the dense second term."""
    (A, G), (A2, G2) = pairs_of(factors)
    return [((A[k], G[k]), kron_oracles.kron(A2[k], G2[k])) for k in range(len(A))]


def damped(pair, damping):
    return kron_oracles.kron(*kron_oracles.damped_pair(*pair, damping))


def relative(factors, damping):
    """The spectrum of each group's sum relative to its damped leading term."""
    return torch.stack([kron_oracles.relative_spectrum(damped(p, damping), C)[0] for p, C in terms(factors)])


def expected(factors, damping, floor):
    return torch.stack([kron_oracles.floored_sum(damped(p, damping), C, floor) for p, C in terms(factors)])


SEEDS = {"deflation": {1: 10, 2: 2}, "lanczos": {1: 10, 2: 2}, "kfac_cor": {1: 5, 2: 0}}


def indefinite(method, damping=1e-4, groups=1, **options):
    """A layer, fitted, some directions of whose sum are negative in either form."""
    problem = given(*taps_of((groups, 1, 6, 2, 3, 4), SEEDS[method][groups]))
    ng, state, _ = fit(problem.run, problem.params, TWO_TERMS[method](floor=FLOOR, **options), damping=damping)
    least = [values.min() for _, _, values in in_leading_basis(state.factors["weight"], damping, floor=-torch.inf)]
    assert max(relative(state.factors["weight"], damping).min(), min(least)) < 0, "not the case that is meant"
    return problem, ng, state


def inverse(ng, state, params):
    """The matrix of `ng.precondition`, column by column; and the info of the inversion."""
    state, info = ng.invert(state)
    assert all(info.ok.values())
    eye = torch.eye(sum(leaf.numel() for leaf in params.values()), dtype=torch.float64)
    return torch.stack([vec(ng.precondition(state, unvec(params, row))) for row in eye], dim=1), info


# ----------------------------------------------------------------------------------------------- factored damping


@BOTH
@drawn(0.3, taps=drawn_taps(), damping=DAMPINGS)
def test_a_positive_definite_sum_is_solved_exactly(method, taps, damping):
    """Compare with `torch.linalg.solve` of the dense sum: no absolute values, π distributes λ."""  # D4, D15
    problem = given(*taps)
    ng, state, _ = fit(problem.run, problem.params, TWO_TERMS[method](floor=FLOOR), damping=damping)
    factors = state.factors["weight"]
    assume(relative(factors, damping).min() > FLOOR)
    B_plus_C = torch.stack([damped(pair, damping) + C for pair, C in terms(factors)])
    V, nat, info = solved(ng, state, problem.params, zoo.random_tree(problem.params))
    close(nat["weight"], solve(B_plus_C, V["weight"]), tol=1e-7)
    assert info.diagnostics["clipped"]["weight"] == 0


@BOTH
@drawn(0.3, taps=drawn_taps(), damping=DAMPINGS)
def test_any_sum_is_solved_with_its_spectrum_floored(method, taps, damping):
    problem = given(*taps)
    ng, state, _ = fit(problem.run, problem.params, TWO_TERMS[method](floor=FLOOR), damping=damping)
    factors = state.factors["weight"]
    spectrum = relative(factors, damping)
    assume((spectrum - FLOOR).abs().min() > 1e-6)
    V, nat, info = solved(ng, state, problem.params, zoo.random_tree(problem.params))
    close(nat["weight"], solve(expected(factors, damping, FLOOR), V["weight"]), tol=1e-6)
    assert info.diagnostics["clipped"]["weight"] == (spectrum < FLOOR).sum()


@EVERY
@FORMS
@pytest.mark.parametrize("groups", [1, 2])
def test_an_indefinite_sum_gives_a_positive_definite_step(method, form, groups):
    problem, ng, state = indefinite(method, groups=groups, damping_form=form)
    P, info = inverse(ng, state, problem.params)
    close(P, P.T)
    assert torch.linalg.eigvalsh((P + P.T) / 2)[0] > 0
    assert info.diagnostics["clipped"]["weight"] > 0


@EVERY
def test_only_offending_directions_change(method):
    """Directions of mixed sign whose sum is positive are solved as they are: absolute values would change them."""
    problem, ng, state = indefinite(method)  # D4
    P, info = inverse(ng, state, problem.params)
    [(pair, C)] = terms(state.factors["weight"])
    B = damped(pair, 1e-4)
    values, vectors = kron_oracles.relative_spectrum(B, C)
    kept = kron_oracles.power(B, -0.5) @ vectors[:, values >= FLOOR]
    assert (values[values >= FLOOR] < 0.99).any(), "no direction that absolute values would change"
    inside = torch.linalg.inv(kept.T @ (B + C) @ kept)  # these directions are orthogonal to the others in B and C
    floored = kron_oracles.power(B, -0.5) @ vectors[:, values < FLOOR]
    close(P, kept @ inside @ kept.T + floored @ floored.T / FLOOR, tol=1e-6)
    assert info.diagnostics["clipped"]["weight"] == (values < FLOOR).sum()


@EVERY
def test_a_lower_floor_takes_longer_steps_where_the_sum_is_indefinite(method):
    steps = []
    for floor in (1e-2, 1e-1, 1.0):
        problem, ng, state = indefinite(method)
        P, _ = inverse(replace(ng, method=TWO_TERMS[method](floor=floor)), state, problem.params)
        steps.append(torch.linalg.eigvalsh(P)[-1])
    assert steps[0] > steps[1] > steps[2]


# ------------------------------------------------------------------------------------------------- eigen damping


def in_leading_basis(factors, damping, floor=0.0):
    """Group by group: the leading term's eigenbasis Q, its eigenvalues + λ, and with them `diag(QᵀCQ)`, floored."""
    found = []
    for (A, G), C in terms(factors):
        r, s, Q = kron_oracles.eigenbasis(A, G)
        leading = torch.outer(s, r).reshape(-1) + damping
        found.append((Q, leading, torch.maximum(leading + kron_oracles.diagonal_in(Q, C), floor * leading)))
    return found


def rotated(found):
    return torch.stack([(Q * values) @ Q.T for Q, _, values in found])


@BOTH
@drawn(0.3, taps=drawn_taps(), damping=DAMPINGS)
def test_eigen_damping_adds_to_the_leading_terms_eigenvalues(method, taps, damping):
    """The second term's diagonal in the leading eigenbasis, and λ; floored relative to the leading term's."""
    problem = given(*taps)
    options = {"floor": FLOOR, "damping_form": "eigen"}
    ng, state, _ = fit(problem.run, problem.params, TWO_TERMS[method](**options), damping=damping)
    found = in_leading_basis(state.factors["weight"], damping, FLOOR)
    V, nat, info = solved(ng, state, problem.params, zoo.random_tree(problem.params))
    close(nat["weight"], solve(rotated(found), V["weight"]), tol=1e-7)
    clipped = sum((values <= FLOOR * leading).sum() for _, leading, values in found)
    assert info.diagnostics["clipped"]["weight"] == clipped


# --------------------------------------------------------------------------------------------- layers of a network


@BOTH
@FORMS
@pytest.mark.parametrize("id", ["sequence-pooled", "conv", "conv-groups", "conv-transpose"])
def test_every_layer_is_solved_at_the_same_damping(method, form, id):
    """Shared positions change neither λ nor the step by a factor T; kernels come back in their own order."""  # D8, D12
    problem, damping = zoo.pick(id), 1.0
    ng, state, _ = fit(sampled(problem), problem.params, TWO_TERMS[method](damping_form=form), damping=damping)
    V, nat, info = solved(ng, state, problem.params, zoo.random_tree(problem.params))
    for key, factors in state.factors.items():
        assert info.diagnostics["clipped"][key] == 0, "choose a larger damping: this test is not of the floor"
        if form == "eigen":
            matrices = rotated(in_leading_basis(factors, damping))
        else:
            matrices = torch.stack([damped(pair, damping) + C for pair, C in terms(factors)])
        close(nat[key], solve(matrices, V[key]), tol=1e-7)


@FORMS
@pytest.mark.parametrize("id", ["mlp-categorical", "conv", "conv-transpose"])
def test_one_term_is_solved_like_kfac(form, id):
    """KPSVD's pair in K-FAC's formula, with its own π."""
    problem, damping = zoo.pick(id), 0.1
    ng, state, _ = fit(sampled(problem), problem.params, FAMILY["kpsvd"](damping_form=form), damping=damping)
    V, nat, _ = solved(ng, state, problem.params, zoo.random_tree(problem.params))
    for key, (A, G) in ((key, pairs_of(factors)[0]) for key, factors in state.factors.items()):
        eye = damping * torch.eye(A.shape[-1] * G.shape[-1], dtype=A.dtype)
        pairs = list(zip(A, G, strict=True))
        factored = torch.stack([damped(pair, damping) for pair in pairs])
        eigen = torch.stack([kron_oracles.kron(*pair) + eye for pair in pairs])
        close(nat[key], solve(factored if form == "factored" else eigen, V[key]), tol=1e-7)


# -------------------------------------------------------------------------------------- where one product is exact


EXACT = {
    "deep-linear": ("type2", 1),  # output-gradients do not depend on the example
    "one-datum": ("mc", 1),  # one term
}


@FORMS
@pytest.mark.parametrize("id", EXACT)
def test_all_methods_agree_where_the_fisher_is_one_kronecker_product(form, id):
    """Equal damping in equal form: comparisons of methods then compare the methods."""  # D4
    problem = zoo.pick(id)
    fisher, samples = EXACT[id]
    run = sampled(problem, fisher, samples=samples)
    v, steps = zoo.random_tree(problem.params), {}
    for name, make in FAMILY.items():
        ng, state, _ = fit(run, problem.params, make(damping_form=form), damping=0.1)
        steps[name] = vec(ng.precondition(ng.invert(state)[0], v))
    if form == "eigen":
        ng, state, _ = fit(run, problem.params, ff.exact(structure="block"), damping=0.1)
        steps["exact"] = vec(ng.precondition(ng.invert(state)[0], v))
    for step in steps.values():
        close(step, steps["kfac"], tol=1e-6)


@FORMS
def test_methods_differ_on_other_nets(form):
    """The guard of the comparison above."""
    problem = zoo.pick("mlp-categorical")
    run, v = sampled(problem, "type2"), zoo.random_tree(problem.params)
    steps = []
    for name in ("kfac", "kpsvd", "lanczos", "kfac_cor", "ekfac"):
        ng, state, _ = fit(run, problem.params, FAMILY[name](damping_form=form), damping=0.1)
        steps.append(vec(ng.precondition(ng.invert(state)[0], v)))
    assert all(differs(a, b, 1e-3) for k, a in enumerate(steps) for b in steps[:k])


@pytest.mark.parametrize("method", ITERATIVE)
@FORMS
def test_a_layer_without_gradient_or_input_gives_a_finite_step(method, form):
    """F = 0: no singular vector, no π."""
    a, g = taps_of((1, 1, 3, 1, 2, 3))
    for taps in ((0 * a, g), (a, 0 * g)):
        problem = given(*taps)
        ng, state, _ = fit(problem.run, problem.params, ITERATIVE[method](damping_form=form), damping=0.25)
        assert not dense(state.factors["weight"]).any()
        V, nat, _ = solved(ng, state, problem.params, zoo.random_tree(problem.params))
        assert torch.isfinite(nat["weight"]).all()
        assert form == "factored" or not differs(nat["weight"], 4 * V["weight"])
