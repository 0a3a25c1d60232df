"""The numbers of one triangle: all of them, once, and the matrix again bit for bit."""

import pytest
import torch

from fisherfn.distributed.triangles import filled, triangle


@pytest.mark.parametrize("d", range(1, 9))
def test_a_triangle_has_each_different_number_once(d):
    matrix = torch.arange(d * d).reshape(1, d, d).tril().double()
    matrix = torch.cat([matrix, -matrix]) + torch.cat([matrix, -matrix]).tril(-1).mT
    packed = triangle(matrix)
    expected = torch.stack([each[tuple(torch.tril_indices(d, d))] for each in matrix])
    assert torch.equal(packed.sort().values, expected.sort().values)
    assert torch.equal(filled(packed, matrix), matrix)


def test_numbers_that_are_not_finite_stay_where_they_are():
    matrix = torch.zeros(1, 5, 5)
    matrix[0, 1, 3] = matrix[0, 3, 1] = float("inf")
    matrix[0, 4, 4] = float("nan")
    assert torch.equal(filled(triangle(matrix), matrix).nan_to_num(7.0), matrix.nan_to_num(7.0))


def test_a_diagonal_stays_as_it_is():
    diagonal = torch.rand(2, 3)
    assert filled(triangle(diagonal), diagonal) is diagonal
