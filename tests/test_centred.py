"""The centred Fisher against the dense covariance of the scores."""

import pytest
import torch
from torch.func import jacrev

import fisherfn as ff
from fisherfn.errors import HyperparameterError, StructureError


def model(params, x):
    return torch.tanh(x @ params["a"].T) @ params["b"].T


class Weighted:
    """Observations with weights: a linear loss Σ w v f, whose Fisher is Σ w ∇f ∇fᵀ."""

    def nll(self, outputs, targets):
        return targets[:, 0] * targets[:, 1] * outputs[:, 0]

    def fisher_sqrt(self, outputs):
        return torch.ones_like(outputs).unsqueeze(0)

    def observed(self, outputs, targets):
        return self, targets[:, 0]


def problem():
    g = torch.Generator().manual_seed(0)
    params = {n: torch.randn(s, generator=g, dtype=torch.float64) for n, s in (("a", (4, 3)), ("b", (1, 4)))}
    x = torch.randn(20, 3, generator=g, dtype=torch.float64)
    p = torch.rand(20, generator=g, dtype=torch.float64)
    p, values = p / p.sum(), torch.randn(20, generator=g, dtype=torch.float64)
    return params, x, p, values - p @ values


@pytest.mark.parametrize(
    ("dtype", "scale", "error", "jitter"),
    [(torch.float64, 100.0, 1e-7, 0.0), (torch.float32, 3.0, 1e-2, 0.0), (torch.float32, 100.0, 1.0, 2e-3)],
)
def test_the_scale_raises_the_smallest_damping(dtype, scale, error, jitter):
    """With λ = 1e-4: a scale of 100 needs double precision, as its docstring says."""
    params, x, p, values = problem()
    free, more = ff.centred(model, {name: leaf.to(dtype) for name, leaf in params.items()}, scale=scale)
    batch = (x.to(dtype), torch.stack([20 * p, values], 1).to(dtype))
    ng = ff.natural_gradient(free, more, batch[0], likelihood=Weighted(), method="exact", fisher="type2")
    nat, _, info = ng.step(more, ng.init(more, damping=1e-4), batch)
    ff.check(info)
    assert jitter / 2 <= max(info.diagnostics["jitter"].values()) <= jitter
    J = jacrev(model)(params, x)
    O = torch.cat([J[name].reshape(20, -1) for name in params], 1)  # noqa: E741
    off = O - p @ O
    expected = torch.linalg.solve(off.T @ (p[:, None] * off) + 1e-4 * torch.eye(16), O.T @ (p * values))
    found = torch.cat([nat[name].reshape(-1) for name in params]).double()
    assert error / 100 <= (found - expected).norm() / expected.norm() <= error


def test_a_step_is_solved_with_the_damped_covariance_of_weighted_scores():
    params, x, p, values = problem()
    free, more = ff.centred(model, params)
    torch.testing.assert_close(free(more, x), model(params, x))
    ng = ff.natural_gradient(free, more, x, likelihood=Weighted(), method="exact", fisher="type2")
    batch = (x, torch.stack([20 * p, values], 1))
    nat, _, info = ng.step(more, ng.init(more, damping=1e-3), batch)
    ff.check(info)
    J = jacrev(model)(params, x)
    O = torch.cat([J[name].reshape(20, -1) for name in params], 1)  # noqa: E741
    off = O - p @ O
    covariance, gradient = off.T @ (p[:, None] * off), O.T @ (p * values)
    expected = torch.linalg.solve(covariance + 1e-3 * torch.eye(16), gradient)
    found = torch.cat([nat[name].reshape(-1) for name in params])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    uncentred = torch.linalg.solve(O.T @ (p[:, None] * O) + 1e-3 * torch.eye(16), gradient)
    assert (found - expected).norm() < 1e-3 * (uncentred - expected).norm()


def test_errors_teach():
    params, _, _, _ = problem()
    with pytest.raises(HyperparameterError, match="scale must be positive"):
        ff.centred(model, params, scale=0.0)
    with pytest.raises(StructureError, match="once"):
        ff.centred(*ff.centred(model, params))
