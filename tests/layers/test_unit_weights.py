"""The layers' oracle against another definition: per-example gradients by autograd. No library code runs here."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import oracles, strategies
from tests.layers import unit_weights
from tests.oracles import close

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch pads an even kernel unevenly

LAYERS = [
    *(strategies.convolutions(dims) for dims in (1, 2, 3)),
    *(strategies.transposed_convolutions(dims) for dims in (1, 2, 3)),
    strategies.norms(),
]


@given(strategies.read_out(st.one_of(LAYERS)) | strategies.embeddings())
def test_rows_and_output_gradients_multiply_to_the_per_example_gradients(problem):
    U = oracles.columns(problem, "empirical") * len(problem.x) ** 0.5
    for name, (a, g) in unit_weights.taps(problem, "empirical").items():
        W = torch.einsum("knto,knti->nkoi", g[:, :, 0], a)
        close(W.flatten(1).T, U[unit_weights.positions(problem, name).reshape(-1)], tol=1e-10)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_one_position_is_the_linear_oracle(sharing):
    a, g = torch.randn(4, 1, 3, dtype=torch.float64), torch.randn(4, 2, 1, 2, dtype=torch.float64)
    close(unit_weights.factors(a, g, sharing)[0], oracles.kfac_factors(a, g)[0])
    close(unit_weights.factors(a, g, sharing)[1], oracles.kfac_factors(a, g)[1])


def test_reduce_by_hand():
    """ā = (a_1 + a_2) / 2 and ĝ = g_1 + g_2, one example."""
    a, g = torch.tensor([[[1.0], [3.0]]]), torch.tensor([[[[1.0], [4.0]]]])
    A, G = unit_weights.factors(a, g, "reduce")
    assert (A.item(), G.item()) == (4.0, 25.0)
    A, G = unit_weights.factors(a, g, "expand")
    assert (A.item(), G.item()) == (10.0, 8.5)
