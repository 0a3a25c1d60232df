"""Gradients from their rows are gradients from their matrices, through every kind of inverse."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisherfn import gradients
from fisherfn.linalg import damped
from fisherfn.linalg.damped import Rotated
from fisherfn.linalg.kron import Pair
from fisherfn.taps import Sizes, Tap
from tests import drawn
from tests.oracles import close

KINDS = pytest.mark.parametrize("kind", drawn.ROWS)


def inverse_of(k, o, i, form, seed):
    """Return an inverse of these sizes: two factors, either of them diagonal, or a basis that is not orthonormal."""
    if form == "basis":
        return Rotated(drawn.normal(k, i, i, seed=seed), drawn.normal(k, o, o, seed=seed + 1), drawn.normal(k, o, i))
    diagonal_A, diagonal_G = form
    return Pair(drawn.factor(k, i, diagonal_A, seed), drawn.factor(k, o, diagonal_G, seed + 1))


FORMS = st.sampled_from(["basis", (False, False), (True, False), (False, True), (True, True)])


@KINDS
@given(drawn.sizes(samples=1), drawn.SEEDS, FORMS)
def test_from_rows_it_is_the_preconditioned_matrix(kind, sizes, seed, form):
    tap, W = drawn.tap(kind, sizes, seed)
    k, _, n, _, o, i = sizes
    gradient = W.sum((0, 1)) / n
    inverse = inverse_of(k, o, i, form, seed)
    expected = damped.apply(inverse, gradient)
    found = gradients.precondition(inverse, tap, True)
    close(gradients.as_matrix(tap), gradient)
    close(found.matrix, expected)
    close(found.inner, (gradient * expected).sum())
    assert gradients.precondition(inverse, tap, False).inner == ()


@pytest.mark.parametrize("form", ["basis", (False, False)])
@pytest.mark.parametrize(("n", "width"), [(2, 9), (30, 3)])
def test_few_and_many_rows_have_the_same_inner_product(form, n, width):
    """Few rows are multiplied with each other, many with the step."""
    tap, W = drawn.tap("dense", (2, 1, n, 1, width, width + 1))
    inverse = inverse_of(2, width, width + 1, form, 3)
    gradient = W.sum((0, 1)) / n
    found = gradients.precondition(inverse, tap, True)
    close(found.inner, (gradient * damped.apply(inverse, gradient)).sum())
    close(found.matrix, damped.apply(inverse, gradient))


@pytest.mark.parametrize("form", ["basis", (False, False)])
def test_samples_of_a_loss_tap_add_up(form):
    tap, W = drawn.tap("dense", (1, 3, 4, 2, 3, 2))
    inverse = inverse_of(1, 3, 2, form, 0)
    close(gradients.precondition(inverse, tap, False).matrix, damped.apply(inverse, W.sum((0, 1)) / 4))


@pytest.mark.parametrize("form", ["basis", (False, False)])
def test_without_examples_the_gradient_is_zero(form):
    tap, _ = drawn.tap("dense", (1, 1, 2, 1, 3, 2))
    found = gradients.precondition(inverse_of(1, 3, 2, form, 0), tap.window(slice(0, 0)), True)
    assert not found.matrix.any() and found.inner == 0


def test_a_matrix_is_its_own_matrix_and_half_precision_is_raised():
    tap, W = drawn.tap("dense", (1, 1, 4, 2, 3, 2))
    gradient = W.sum((0, 1)) / 4
    assert gradients.as_matrix(gradient) is gradient
    half = gradients.as_matrix(Tap(tap.a.bfloat16(), tap.g.bfloat16()))
    assert half.dtype == torch.float32
    close(half.double(), gradient, tol=1e-1)


@given(st.tuples(*[st.integers(1, 40)] * 4))
def test_rows_are_chosen_where_they_need_fewer_multiplications(numbers):
    n, t, o, i = numbers
    m = n * t
    by_rows = m * o * o + m * i * i + m * o * i
    as_matrix = m * o * i + o * o * i + o * i * i
    assert gradients.tap_is_cheaper(Sizes(1, 1, n, t, o, i)) == (by_rows < as_matrix)
