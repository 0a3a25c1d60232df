"""Products at full speed give what plain products give, at any width."""

import pytest
import torch

from fisherfn import products
from tests.drawn import normal
from tests.oracles import close


@pytest.mark.parametrize("width", [1, 255, 256, 257, 271])
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_a_product_is_one_whatever_its_width(width, factor):
    x, y = normal(2, 3, 5), normal(2, 5, width, seed=1)
    close(products.product(x, y, factor), factor * torch.einsum("kmj,kji->kmi", x, y))


@pytest.mark.parametrize("width", [3, products.WIDE - 1, products.WIDE, products.WIDE + 3])
@pytest.mark.parametrize("rows", [5, 4 * (products.WIDE + 3)])
def test_a_product_with_itself_in_panels_is_the_product(width, rows):
    """Panels are computed for many rows above the width only."""
    flat = normal(1, rows, width)
    expected = torch.einsum("kmi,kmj->kij", flat, flat)
    close(products.square(flat), expected)
    close(torch.vmap(products.square)(torch.stack([flat, 2 * flat]))[1], 4 * expected)


@pytest.mark.parametrize(
    "x, y", [((2, 3, 4), (2, 4, 5)), ((3, 4), (4, 5)), ((2, 3, 4), (4, 5)), ((1, 3, 4), (2, 4, 5))]
)
def test_products_of_matrices_and_of_batches_of_them(x, y):
    x, y = normal(*x), normal(*y, seed=1)
    close(products.matmul(x, y), torch.einsum("...mj,...ji->...mi", x, y))


@pytest.mark.parametrize(("rows", "width"), [(5, 3), (256, 300), (259, 260)])
def test_a_gram_matrix_is_that_of_the_rows(rows, width):
    """Small ones in one product, large ones by panels of four sizes, some of them unequal."""
    x = torch.randn(2, rows, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    close(products.gram(x), x @ x.mT)
    close(torch.vmap(products.gram)(x.unsqueeze(1))[:, 0], x @ x.mT)
