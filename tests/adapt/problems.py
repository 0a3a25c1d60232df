"""Small problems for adaptive steps, in float64, with dense oracles."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import hessian, jacrev

import fisherfn as ff


class Problem(NamedTuple):
    model: Any
    params: dict[str, Tensor]
    x: Tensor
    y: Tensor
    likelihood: Any


def mlp(likelihood=None, examples=12, seed=0) -> Problem:
    """A tanh net 3-4-2 with drawn targets."""
    likelihood = likelihood or ff.Bernoulli()
    g = torch.Generator().manual_seed(seed)
    shapes = {"a": (4, 3), "b": (2, 4)}
    params = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    x = torch.randn(examples, 3, generator=g, dtype=torch.float64)
    y = torch.rand(examples, 2, generator=g, dtype=torch.float64).round()
    if isinstance(likelihood, ff.Categorical):
        y = y[:, 0].long()
    return Problem(lambda p, x: torch.tanh(x @ p["a"].T) @ p["b"].T, params, x, y, likelihood)


def quadratic(examples=20, seed=0) -> Problem:
    """Linear regression with squared loss: a quadratic in the parameters, whose Fisher is its Hessian."""
    g = torch.Generator().manual_seed(seed)
    scales = torch.tensor([3.0, 1.0, 0.3, 0.1, 0.03], dtype=torch.float64)
    x = torch.randn(examples, 5, generator=g, dtype=torch.float64) * scales
    y = torch.randn(examples, 2, generator=g, dtype=torch.float64)
    return Problem(lambda p, x: x @ p["w"].T, {"w": torch.zeros(2, 5, dtype=torch.float64)}, x, y, ff.Gaussian())


def built(problem: Problem, method="kfac", **options) -> ff.NaturalGradient:
    return ff.natural_gradient(
        problem.model, problem.params, problem.x, likelihood=problem.likelihood, method=method, **options
    )


def loss(problem: Problem, params) -> Tensor:
    return problem.likelihood.nll(problem.model(params, problem.x), problem.y).mean()


def flat(tree) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in tree.values()])


def unflat(problem: Problem, vector: Tensor):
    parts = vector.split([leaf.numel() for leaf in problem.params.values()])
    return {name: part.reshape(leaf.shape) for (name, leaf), part in zip(problem.params.items(), parts, strict=True)}


def dense_fisher(problem: Problem, params=None) -> Tensor:
    """1/N Σ JᵀBJ by the full Jacobian of every example, B the Hessian of the nll in the outputs."""
    params = problem.params if params is None else params

    def outputs(vector):
        return problem.model(unflat(problem, vector), problem.x)

    jacobian = jacrev(outputs)(flat(params))  # [n, c, p]
    f = problem.model(params, problem.x)
    total = torch.zeros(jacobian.shape[-1], jacobian.shape[-1], dtype=f.dtype)
    for n in range(len(f)):
        target = problem.y[n : n + 1]
        B = hessian(lambda o, t=target: problem.likelihood.nll(o.unsqueeze(0), t).sum())(f[n])
        total += jacobian[n].T @ B @ jacobian[n]
    return total / len(f)


def steps(problem, opt, count, *, state=None, params=None, seed=0, **options):
    """Parameters, state and infos of so many steps on the whole batch."""
    params = problem.params if params is None else params
    state = opt.init(params) if state is None else state
    rng, infos = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        params, state, info = opt.step(params, state, (problem.x, problem.y), generator=rng, **options)
        infos.append(info)
    return params, state, infos
