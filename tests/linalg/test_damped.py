"""Damped inverses of one and of two products against dense solutions; their determinants; failures as masks."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fisherfn.linalg import damped, kron
from fisherfn.linalg.damped import Rotated
from fisherfn.linalg.kron import Forms, Pair
from fisherfn.types import Shape
from tests import drawn, kron_oracles
from tests.oracles import close

SIZE = st.integers(1, 4)
FORM = st.tuples(st.booleans(), st.booleans())
DAMPING = st.sampled_from([1e-3, 0.1, 2.0])
FLOOR = 0.1


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def pair_of(o, i, form, seed=0):
    return Pair(drawn.factor(2, i, form[0], seed), drawn.factor(2, o, form[1], seed + 1))


def second_of(o, i, form, seed):
    """Return an indefinite second term in the forms of the first."""
    A, G = drawn.symmetric(2, i, seed), drawn.symmetric(2, o, seed + 1)
    return Pair(A.diagonal(dim1=1, dim2=2) if form[0] else A, G.diagonal(dim1=1, dim2=2) if form[1] else G)


def groups(pair):
    return list(zip(pair.A, pair.G, strict=True))


def dense(pair):
    return torch.stack([kron_oracles.kron(A, G) for A, G in groups(pair)])


def factored(pair, damping):
    return torch.stack([kron_oracles.kron(*kron_oracles.damped_pair(A, G, damping)) for A, G in groups(pair)])


def eye(matrices):
    return torch.eye(matrices.shape[-1], dtype=matrices.dtype)


def check(inverse, matrices, o, i):
    """Check the products and the determinant of an inverse."""
    W = drawn.normal(2, o, i)
    close(damped.apply(inverse, W), torch.linalg.solve(matrices, W.flatten(1).unsqueeze(-1)).reshape(W.shape))
    close(damped.logdet(inverse), -torch.linalg.slogdet(matrices).logabsdet.sum())


@given(SIZE, SIZE, FORM, drawn.SEEDS, DAMPING)
def test_one_term_is_solved_in_both_forms_of_damping(o, i, form, seed, damping):
    pair = pair_of(o, i, form, seed)
    inverse, ok, measured = damped.factored(pair, number(damping))
    assert ok.all() and not measured["jitter"].any()
    check(inverse, factored(pair, damping), o, i)
    inverse, ok, _ = damped.eigen(pair, number(damping))
    assert ok.all()
    check(inverse, dense(pair) + damping * eye(dense(pair)), o, i)


@given(SIZE, SIZE, FORM, drawn.SEEDS)
def test_eigenvalues_of_a_product_are_those_of_the_dense_matrix(o, i, form, seed):
    pair = pair_of(o, i, form, seed)
    close(damped.eigenvalues(pair).flatten(1).sort(-1).values, torch.linalg.eigvalsh(dense(pair)))


@given(SIZE, SIZE, FORM, drawn.SEEDS, DAMPING)
def test_two_terms_are_solved_with_the_spectrum_floored(o, i, form, seed, damping):
    """Relative to the damped first term, no direction is below the floor; these are counted."""
    first, second = pair_of(o, i, form, seed), second_of(o, i, form, seed + 40)
    B, C = factored(first, damping), dense(second)
    spectrum = torch.stack([kron_oracles.relative_spectrum(b, c)[0] for b, c in zip(B, C, strict=True)])
    assume((spectrum - FLOOR).abs().min() > 1e-6)
    expected = torch.stack([kron_oracles.floored_sum(b, c, FLOOR) for b, c in zip(B, C, strict=True)])
    inverse, ok, measured = damped.factored_sum(first, second, number(damping), FLOOR)
    assert ok.all() and torch.equal(measured["clipped"], (spectrum < FLOOR).sum(1))
    W = drawn.normal(2, o, i)
    solved = torch.linalg.solve(expected, W.flatten(1).unsqueeze(-1)).reshape(W.shape)
    close(damped.apply(inverse, W), solved, tol=1e-6)
    close(damped.logdet(inverse), -torch.linalg.slogdet(expected).logabsdet.sum(), tol=1e-6)


@given(SIZE, SIZE, FORM, drawn.SEEDS, DAMPING)
def test_eigen_damping_keeps_the_diagonal_of_the_second_term(o, i, form, seed, damping):
    first, second = pair_of(o, i, form, seed), second_of(o, i, form, seed + 40)
    expected, clipped = [], []
    for (A, G), C in zip(groups(first), dense(second), strict=True):
        r, s, Q = kron_oracles.eigenbasis(A, G)
        leading = torch.outer(s, r).reshape(-1) + damping
        values = leading + kron_oracles.diagonal_in(Q, C)
        clipped.append(int((values < FLOOR * leading).sum()))
        expected.append((Q * torch.maximum(values, FLOOR * leading)) @ Q.T)
    inverse, ok, measured = damped.eigen_sum(first, second, number(damping), FLOOR)
    assert ok.all() and measured["clipped"].tolist() == clipped
    check(inverse, torch.stack(expected), o, i)


@pytest.mark.parametrize("form", [(False, False), (True, False), (False, True)])
def test_a_second_term_of_zeros_changes_nothing(form):
    pair, λ = pair_of(3, 4, form), number(0.1)
    zero, W = kron.zeros(pair), drawn.normal(2, 3, 4)
    close(damped.apply(damped.factored_sum(pair, zero, λ)[0], W), damped.apply(damped.factored(pair, λ)[0], W))
    close(damped.apply(damped.eigen_sum(pair, zero, λ)[0], W), damped.apply(damped.eigen(pair, λ)[0], W))


@pytest.mark.parametrize("form", [Forms(False, False), Forms(True, False), Forms(True, True)])
def test_empty_inverses_divide_by_the_damping(form):
    unit = kron.identity(Shape(2, 3, 4), form, torch.float64, torch.device("cpu"))
    W = drawn.normal(2, 3, 4)
    for empty in (damped.empty_pair, damped.empty_rotated):
        close(damped.apply(empty(unit, number(0.25)), W), 4 * W)


def test_a_basis_need_not_be_orthonormal():
    """Q_G [(Q_Gᵀ X Q_A) ∘ s] Q_Aᵀ, and the determinant of that matrix; a reflection has a negative determinant."""
    QA, QG, scale = drawn.normal(2, 4, 4), drawn.normal(2, 3, 3, seed=1), drawn.normal(2, 3, 4, seed=2).abs() + 0.1
    for one, other in ((QA, QG), (QA[..., 0], QG), (QA, QG[..., 0])):
        inverse, W = Rotated(one, other, scale), drawn.normal(2, 3, 4, seed=3)
        Q = torch.stack([kron_oracles.kron(a, g) for a, g in zip(one, other, strict=True)])
        matrices = (Q * scale.flatten(1).unsqueeze(1)) @ Q.mT
        close(damped.apply(inverse, W).flatten(1), (matrices @ W.flatten(1).unsqueeze(-1)).squeeze(-1))
        close(damped.rotated_back(inverse, W).flatten(1), (Q @ W.flatten(1).unsqueeze(-1)).squeeze(-1))
        close(damped.logdet(inverse), torch.linalg.slogdet(matrices).logabsdet.sum())


def test_a_diagonal_in_a_basis_is_that_of_the_rotated_matrix():
    Q, M = drawn.normal(2, 3, 3), drawn.symmetric(2, 3)
    close(damped.diagonal_in(Q, M), (Q.mT @ M @ Q).diagonal(dim1=1, dim2=2))
    assert damped.diagonal_in(torch.ones(2, 3), M[..., 0]) is not None


@pytest.mark.parametrize(("ratio", "clipped"), [(0.2, 0), (0.05, 1), (-3.0, 1)])
@pytest.mark.parametrize("invert", [damped.factored_sum, damped.eigen_sum])
def test_directions_below_the_floor_are_raised_to_it_and_counted(invert, ratio, clipped):
    """One of two directions has this ratio to the damped first term; the other has no second term."""
    first = Pair(number([[3.0]]), number([[2.0, 2.0]]))
    leading = {damped.factored_sum: (3 + 1.5**0.5 * 0.1) * (2 + 0.1 / 1.5**0.5), damped.eigen_sum: 6.01}[invert]
    second = Pair(torch.ones(1, 1).double(), number([[(ratio - 1) * leading, 0.0]]))
    inverse, ok, measured = invert(first, second, number(0.01), FLOOR)
    assert ok.all() and measured["clipped"].tolist() == [clipped]
    expected = number([[[1 / (max(ratio, FLOOR) * leading)], [1 / leading]]])
    close(damped.apply(inverse, torch.ones(1, 2, 1).double()), expected)


INVERSIONS = {
    "factored": damped.factored,
    "eigen": damped.eigen,
    "factored_sum": lambda pair, λ: damped.factored_sum(pair, kron.zeros(pair), λ),
    "eigen_sum": lambda pair, λ: damped.eigen_sum(pair, kron.zeros(pair), λ),
}


@pytest.mark.parametrize("name", INVERSIONS)
@pytest.mark.parametrize("form", [(False, False), (True, True)])
def test_what_cannot_be_inverted_is_a_mask(name, form):
    pair, invert = pair_of(3, 4, form), INVERSIONS[name]
    assert invert(pair, number(0.1))[1].all()
    for side in ("A", "G"):
        assert not invert(pair._replace(**{side: getattr(pair, side) * torch.nan}), number(0.1))[1].any()
    assert not invert(kron.zeros(pair), number(0.0))[1].any()
    if name.startswith("eigen"):
        assert not invert(pair, number(-1e6))[1].any()


@pytest.mark.parametrize("name", ["factored_sum", "eigen_sum"])
def test_a_second_term_that_is_not_finite_is_a_mask(name):
    pair = pair_of(3, 4, (False, False))
    bad = pair._replace(A=pair.A * torch.inf)
    assert not getattr(damped, name)(pair, bad, number(0.1))[1].any()


# one factor ------------------------------------------------------------------------------------------------------


def psd(rank, size=6):
    rows = drawn.normal(2, rank, size, seed=1)
    return rows.mT @ rows


@given(SIZE, SIZE, FORM)
def test_pi_balances_the_mean_eigenvalues(o, i, form):
    pair = pair_of(o, i, form)
    means = [drawn.matrix(F).diagonal(dim1=1, dim2=2).mean(1) for F in (pair.A, pair.G)]
    close(damped.pi(pair.A, pair.G), (means[0] / means[1]).sqrt())


def test_pi_is_one_for_a_factor_of_zeros():
    A, G = drawn.psd(2, 3), drawn.psd(2, 2)
    A[0] = 0
    close(damped.pi(A, G)[0], torch.ones(()).double())
    close(damped.pi(torch.zeros_like(A), G), torch.ones(2).double())


def test_pi_is_finite_for_denormal_factors():
    """The ratio of the traces overflows in float32, its root does not."""
    A, G = drawn.psd(2, 3).float(), drawn.psd(2, 2).float()
    tiny = G * 1e-41
    assert (tiny.diagonal(dim1=1, dim2=2) > 0).all()
    torch.testing.assert_close(damped.pi(A, tiny), damped.pi(A, G) * 10**20.5, rtol=1e-3, atol=0)
    torch.testing.assert_close(damped.pi(tiny, A), damped.pi(G, A) / 10**20.5, rtol=1e-3, atol=0)


def test_the_damped_inverse_is_the_dense_one():
    matrix, damping = psd(6), torch.tensor([0.1, 2.0], dtype=torch.float64)
    expected = torch.linalg.inv(matrix + damping[:, None, None] * torch.eye(6, dtype=torch.float64))
    found = damped.damped_inverse(matrix, damping)
    torch.testing.assert_close(found.inverse, expected, rtol=1e-10, atol=1e-10)
    assert found.ok.all() and not found.jitter.any()


def test_a_damping_below_the_matrixs_rounding_is_raised_and_reported():
    matrix = psd(1)
    found = damped.damped_inverse(matrix, torch.full((2,), 1e-40, dtype=torch.float64))
    assert found.ok.all() and (found.jitter > 0).all()
    assert found.jitter.max() <= 1e-15 * matrix.diagonal(dim1=-2, dim2=-1).sum(-1).max()


def test_a_factor_that_is_not_finite_is_a_mask():
    nan = torch.full((1, 3, 3), torch.nan, dtype=torch.float64)
    assert not damped.damped_inverse(nan, torch.ones(1, dtype=torch.float64)).ok


def test_a_factorisation_that_stops_at_a_zero_is_a_mask():
    matrix = torch.stack([torch.eye(3), torch.tensor([[0.0, 1e30, 0], [1e30, 0, 0], [0, 0, 0]])])
    found = damped.damped_inverse(matrix, torch.zeros(2))
    assert found.ok.tolist() == [True, False]
    broken = torch.full((1, 3, 3), torch.nan)
    assert not damped.damped_inverse(broken, torch.ones(1)).ok
    zero = damped.damped_inverse(torch.zeros(1, 3, 3), torch.zeros(1))
    assert not zero.ok and found.inverse.shape == matrix.shape
