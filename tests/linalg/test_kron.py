"""Kronecker products in both forms of their factors, against the dense matrix of `W ↦ G W A`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisherfn.linalg import kron
from fisherfn.linalg.kron import Forms, Pair
from fisherfn.types import Shape
from tests import drawn, kron_oracles
from tests.oracles import close

SIZE = st.integers(1, 4)
FORM = st.tuples(st.booleans(), st.booleans())


def pair_of(k, o, i, form, seed=0):
    return Pair(drawn.factor(k, i, form[0], seed), drawn.factor(k, o, form[1], seed + 1))


def dense(pair):
    """Return the matrix of each group."""
    return torch.stack([kron_oracles.kron(A, G) for A, G in zip(pair.A, pair.G, strict=True)])


def times(matrix, W):
    return (matrix @ W.flatten(1).unsqueeze(-1)).reshape(W.shape)


@given(st.integers(1, 3), SIZE, SIZE, FORM, drawn.SEEDS)
def test_products_are_those_of_the_dense_matrix(k, o, i, form, seed):
    pair, other, W = pair_of(k, o, i, form, seed), pair_of(k, o, i, form, seed + 7), drawn.normal(k, o, i)
    close(kron.matvec(pair.G, pair.A, W), times(dense(pair), W))
    close(kron.apply([pair], W), times(dense(pair), W))
    close(kron.apply([pair, other], W), times(dense(pair) + dense(other), W))
    close(kron.left(pair.G, W), drawn.matrix(pair.G) @ W)
    close(kron.right(W, pair.A), W @ drawn.matrix(pair.A))


@given(st.integers(1, 3), SIZE, SIZE, FORM, drawn.SEEDS)
def test_numbers_are_those_of_the_dense_matrix(k, o, i, form, seed):
    xs = [pair_of(k, o, i, form, seed), pair_of(k, o, i, form, seed + 7)]
    ys = [pair_of(k, o, i, form, seed + 20)]
    close(kron.inner(xs, ys), (sum(map(dense, xs)) * sum(map(dense, ys))).sum((1, 2)))
    close(kron.trace(xs), sum(map(dense, xs)).diagonal(dim1=1, dim2=2).sum())
    close(kron.dot(xs[0].A, ys[0].A), (drawn.matrix(xs[0].A) * drawn.matrix(ys[0].A)).sum((1, 2)))
    close(kron.diagonal(xs[0].G), drawn.matrix(xs[0].G).diagonal(dim1=1, dim2=2))


@given(st.integers(1, 3), SIZE, SIZE, FORM, drawn.SEEDS)
def test_each_group_has_its_own_number(k, o, i, form, seed):
    pair, scalar = pair_of(k, o, i, form, seed), drawn.normal(k, seed=seed)
    close(kron.times(pair.A, scalar), torch.stack([c * A for c, A in zip(scalar, pair.A, strict=True)]))


def test_a_general_factor_is_transposed_and_a_diagonal_is_its_own_transpose():
    Q = drawn.normal(2, 3, 3)
    close(kron.transpose(Q), torch.einsum("kij->kji", Q))
    assert kron.transpose(Q[0]) is not None and torch.equal(kron.transpose(Q[..., 0]), Q[..., 0])


def test_sums_of_rows_are_in_double_precision():
    """A sum that single precision cannot represent."""
    ones = torch.ones(1, 4000, 2)
    ones[0, 0] = torch.tensor([2.0**13, 0.0])
    found = kron.dot(ones, ones)
    assert found.dtype == torch.float64 and found.item() == 2**26 + 2 * 3999


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (Shape(2, 3, 4), Forms(False, False)),
        (Shape(2, 3, 5), Forms(True, False)),
        (Shape(2, 5, 4), Forms(False, True)),
        (Shape(2, 3, 4, one_hot=True), Forms(True, False)),
    ],
)
def test_factors_wider_than_the_limit_are_diagonals(shape, expected):
    form = kron.forms(shape, 4)
    assert form == expected
    eye = kron.identity(shape, form, torch.float64, torch.device("cpu"))
    assert kron.forms_of(eye) == form and kron.is_diagonal(eye.A) == form.A
    W = drawn.normal(*shape[:3])
    close(kron.matvec(eye.G, eye.A, W), W)
    zeros = kron.zeros(eye)
    assert [x.shape for x in zeros] == [x.shape for x in eye] and not any(x.any() for x in zeros)
