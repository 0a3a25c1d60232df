"""Calls that are computed by their definition."""

import pytest
import torch

import fisherfn as ff
from fisherfn.decompositions.elementary import cdist
from tests.layers.checks import X, checked_model, normal
from tests.oracles import close


@pytest.mark.parametrize("p", [1.0, 2.0, float("inf")])
def test_distances_of_activations(p):
    """Under a single `torch.vmap`, torch's derivative of `torch.cdist` is wrong by more than its size."""

    def model(params, x):
        h = (x @ params["a"]).tanh()
        return torch.cdist(h, h, p=p).flatten(1)

    assert checked_model(model, {"a": normal(4, 3)}, normal(5, 3, 4)) == {"a": "matmul"}
    a, b = normal(3, 4, seed=1), normal(5, 4, seed=2)
    with ff.decompositions.Elementary():
        found = torch.cdist(a, b, p=p)
    close(found, torch.cdist(a, b, p=p))


def test_distances_of_many_vectors_come_from_products():
    """Memory for all differences would be as much again for each coordinate."""

    def model(params, x):
        return torch.cdist((x @ params["a"]).tanh(), X, p=2.0).flatten(1)

    assert checked_model(model, {"a": normal(4, 4)}, normal(3, 30, 4)) == {"a": "matmul"}
    a, b = normal(30, 4), normal(40, 4, seed=1)
    for mode in (None, "use_mm_for_euclid_dist", "donot_use_mm_for_euclid_dist"):
        close(cdist(a, b, compute_mode=mode), torch.cdist(a, b), tol=1e-12)
    gradient = torch.func.grad(lambda a: cdist(a, a).sum())(a)
    assert torch.isfinite(gradient).all(), "also at distance 0"
