"""Partial differential equations with known solutions, as published: domain, boundary, points and net.

The loss is half the mean squared residual inside the domain plus half the mean squared error on its boundary: two
terms with Gaussian likelihoods. Training points are drawn once; the error is measured on other points.

Sources: Müller & Zeinhofer 2023; Dangel, Müller & Zeinhofer 2024, section 4 and appendix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fisherfn as ff
from common.pinn.nets import Tree, derivatives, value

EVALUATED = 10_000
"""Number of points on which the error is measured, drawn uniformly."""


@dataclass(frozen=True)
class Problem:
    """An equation on the unit cube.

    Attributes:
        title: the equation.
        dimensions: number of coordinates.
        model: widths of the published net.
        interior, boundary: numbers of training points.
        solution: the true solution at each point, `[n, 1]`.
        residual: the left-hand side of the equation as a function of params and points, `[n, 1]`.
        right: the right-hand side at each point.
        faces: pairs (coordinate, value) of the faces on which boundary values are given.
    """

    title: str
    dimensions: int
    model: str
    interior: int
    boundary: int
    solution: Callable[[Tensor], Tensor]
    residual: Callable[[Tree, Tensor], Tensor]
    right: Callable[[Tensor], Tensor]
    faces: tuple[tuple[int, float], ...]


def minus_laplacian(params: Tree, x: Tensor) -> Tensor:
    """Return −Δu of the net."""
    return -derivatives(params, x, [1.0] * x.shape[1]).second


def heat_residual(params: Tree, x: Tensor) -> Tensor:
    """Return u_t − ¼ u_xx of the net at points (t, x)."""
    u = derivatives(params, x, [0.0, 0.25])
    return u.first[:, 0] - u.second


def product_of_sines(x: Tensor) -> Tensor:
    """Return Π sin(πx_i)."""
    return torch.sin(math.pi * x).prod(-1, keepdim=True)


def sum_of_cosines(x: Tensor) -> Tensor:
    """Return Σ cos(πx_i)."""
    return torch.cos(math.pi * x).sum(-1, keepdim=True)


def decaying_sine(x: Tensor) -> Tensor:
    """Return exp(−π²t/4) sin(πx) at points (t, x)."""
    return torch.exp(-(math.pi**2) * x[:, :1] / 4) * torch.sin(math.pi * x[:, 1:])


def cube(dimensions: int) -> tuple[tuple[int, float], ...]:
    """Return all faces of the unit cube."""
    return tuple((axis, side) for axis in range(dimensions) for side in (0.0, 1.0))


PROBLEMS = {
    "POISSON_2D": Problem(
        "−Δu = 2π² sin(πx) sin(πy), u = 0 on the boundary", 2, "2-64-1", 900, 120, product_of_sines, minus_laplacian,
        lambda x: 2 * math.pi**2 * product_of_sines(x), cube(2),
    ),
    "HEAT": Problem(
        "u_t = ¼ u_xx, u(0, x) = sin(πx), u(t, 0) = u(t, 1) = 0", 2, "2-64-1", 900, 120, decaying_sine, heat_residual,
        lambda x: torch.zeros_like(x[:, :1]), ((0, 0.0), (1, 0.0), (1, 1.0)),
    ),
    "POISSON_5D": Problem(
        "−Δu = π² Σ cos(πx_i), u = Σ cos(πx_i) on the boundary", 5, "5-64-64-48-48-1", 3000, 500, sum_of_cosines,
        minus_laplacian, lambda x: math.pi**2 * sum_of_cosines(x), cube(5),
    ),
}  # fmt: skip


class Posed:
    """A problem with its points drawn: terms for `ff.sum_of_terms`, the batch, and the relative error of a net."""

    def __init__(self, problem: Problem, seed: int, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(seed)

        def points(n: int) -> Tensor:
            return torch.rand(n, problem.dimensions, generator=generator, dtype=torch.float64)

        inside, edge, self.tests = points(problem.interior), points(problem.boundary), points(EVALUATED).to(device)
        for at, point in enumerate(edge):  # the faces in turn
            axis, side = problem.faces[at % len(problem.faces)]
            point[axis] = side
        inside, edge = inside.to(device), edge.to(device)
        self.batch = {"interior": (inside, problem.right(inside)), "boundary": (edge, problem.solution(edge))}
        self.truth = problem.solution(self.tests)
        models = {"interior": problem.residual, "boundary": value}
        self.terms: dict[str, Any] = {
            name: ff.Term(model, self.batch[name][0], ff.Gaussian()) for name, model in models.items()
        }

    def error(self, params: Tree) -> float:
        """Return the relative L2 error ‖u − u*‖ / ‖u*‖ over the evaluation points."""
        return float((value(params, self.tests) - self.truth).norm() / self.truth.norm())
