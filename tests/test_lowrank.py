"""The low-rank system against dense algebra: U by definition, its Gram matrix, and (UUᵀ + λI)⁻¹ in both spaces."""

from math import sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisherfn import lowrank
from fisherfn.errors import TooLargeError
from tests import drawn
from tests.oracles import close

KINDS = pytest.mark.parametrize("kind", drawn.ROWS)
LAMBDA = torch.tensor(0.3, dtype=torch.float64)


def flat(W):
    """Return `[s n k o i]` as rows `[sn, koi]`."""
    return W.flatten(2).flatten(0, 1)


@KINDS
@given(drawn.sizes(), drawn.SEEDS, st.booleans())
def test_products_with_examples_are_those_of_the_matrices(kind, sizes, seed, lazy):
    tap, W = drawn.tap(kind, sizes, seed, lazy)
    k, s, n, _, o, i = sizes
    V, c = drawn.normal(k, o, i, seed=2), drawn.normal(s, n, seed=3)
    close(lowrank.inner_products(tap, V), (W * V).sum((2, 3, 4)))
    close(lowrank.combine(tap, c), torch.einsum("sn,snkoi->koi", c, W))
    close(lowrank.gram(tap), flat(W) @ flat(W).mT)


@KINDS
@pytest.mark.parametrize("window", [1, 40, 10**6])
@pytest.mark.parametrize("positions", [1, 4])
def test_windows_change_nothing(kind, window, positions, monkeypatch):
    """Few positions and many, some examples (or rows of W) at a time: with itself and with another batch."""
    monkeypatch.setattr(lowrank, "WINDOW", window)
    monkeypatch.setattr("fisherfn.taps.WINDOW", window)
    tap, W = drawn.tap(kind, (2, 2, 5, positions, 3, 4), 1, lazy=True)
    other, V = drawn.tap(kind, (2, 3, 4, 2, 3, 4), 9)
    close(lowrank.gram(tap), flat(W) @ flat(W).mT)
    close(lowrank.gram(tap, other), flat(W) @ flat(V).mT)
    c = drawn.normal(2, 5)
    close(lowrank.combine(tap, c), torch.einsum("sn,snkoi->koi", c, W))
    close(lowrank.inner_products(tap, W[0, 0]), (W * W[0, 0]).sum((2, 3, 4)))


@pytest.mark.parametrize("positions", [1, 4])
def test_large_gram_matrices_are_made_from_halves(positions, monkeypatch):
    monkeypatch.setattr(lowrank, "HALVED", 3)
    tap, W = drawn.tap("dense", (2, 1, 13, positions, 3, 4), 1)
    close(lowrank.gram(tap), flat(W) @ flat(W).mT)


def coupled(examples, positions=1):
    """Return two coupled layers of 6 + 8 parameters, and their rows side by side."""
    one, W = drawn.tap("dense", (1, 2, examples, positions, 2, 3), 4)
    two, V = drawn.tap("one-hot" if positions > 1 else "dense", (2, 2, examples, 1, 1, 4), 5)
    return {"one": one, "two": two}, torch.cat([flat(W), flat(V)], 1)


SPACES = pytest.mark.parametrize(("examples", "in_parameters"), [(3, False), (7, True), (20, True)])


@SPACES
def test_the_smaller_matrix_and_its_eigenvalues(examples, in_parameters):
    """Six samples and examples are fewer than 14 parameters; 14 and 40 are not."""
    taps, rows = coupled(examples)
    F = rows.mT @ rows / examples
    assert (lowrank.examples(taps), lowrank.columns(taps), lowrank.parameters(taps)) == (examples, 2 * examples, 14)
    assert lowrank.in_parameters(taps) == in_parameters
    close(lowrank.smaller_matrix(taps), F if in_parameters else rows @ rows.mT / examples)
    close(lowrank.eigenvalues(taps).sort().values, torch.linalg.eigvalsh(F).clamp(min=0))


def system(taps, damping=LAMBDA):
    factor, ok = lowrank.factorise(lowrank.smaller_matrix(taps), damping)
    assert ok
    return lowrank.System(taps, factor, damping)


@SPACES
@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("form", ["matrix", "tap"])
def test_solve_is_the_dense_solution(examples, in_parameters, positions, form):
    """The gradient is given as a matrix, or as a loss tap of another batch: both coupled layers see both."""
    taps, rows = coupled(examples, positions)
    F = rows.mT @ rows / examples
    loss = {
        "one": drawn.tap("dense", (1, 1, 5, positions, 2, 3), 6),
        "two": drawn.tap("dense", (2, 1, 5, 1, 1, 4), 7),
    }
    matrices = {key: W.sum((0, 1)) / 5 for key, (_, W) in loss.items()}
    given_as = matrices if form == "matrix" else {key: tap for key, (tap, _) in loss.items()}
    v = torch.cat([V.flatten() for V in matrices.values()])
    expected = torch.linalg.solve(F + LAMBDA * torch.eye(14, dtype=F.dtype), v)
    found = lowrank.solve(system(taps), given_as)
    assert {key: x.shape for key, x in found.items()} == {key: V.shape for key, V in matrices.items()}
    close(torch.cat([x.flatten() for x in found.values()]), expected)
    close(lowrank.total(taps, given_as).flatten() / sqrt(examples), rows @ v / sqrt(examples))


@SPACES
def test_the_log_determinant_counts_damping_on_what_the_system_does_not_reach(examples, in_parameters):
    taps, rows = coupled(examples)
    F = rows.mT @ rows / examples
    close(lowrank.logdet(system(taps)), torch.linalg.slogdet(F + LAMBDA * torch.eye(14, dtype=F.dtype)).logabsdet)


def test_a_system_that_is_not_positive_definite_is_a_mask():
    matrix = torch.tensor([[1.0, 2.0], [2.0, 1.0]]).double()
    assert not lowrank.factorise(matrix, LAMBDA)[1]
    assert not lowrank.factorise(torch.full((2, 2), torch.nan), LAMBDA)[1]
    factor, ok = lowrank.factorise(matrix.float(), torch.tensor(2.0))
    assert ok and factor.dtype == torch.float64


def test_without_examples_the_fisher_is_zero():
    taps = {key: tap.window(slice(0, 0)) for key, tap in coupled(3)[0].items()}
    assert (lowrank.examples(taps), lowrank.columns(taps)) == (1, 0)
    gradients = {"one": drawn.normal(1, 2, 3), "two": drawn.normal(2, 1, 4)}
    found = lowrank.solve(system(taps), gradients)
    for key, gradient in gradients.items():
        close(found[key], gradient / LAMBDA)


def test_too_many_eigenvalues_are_refused(monkeypatch):
    monkeypatch.setattr(lowrank, "EIGENVALUES", 5)
    with pytest.raises(TooLargeError, match="6 rows"):
        lowrank.eigenvalues(coupled(3)[0])
