"""Partial differential equations with known solutions, as published: domain, boundary, points and net.

The loss is half the mean squared residual inside the domain plus half the mean squared error on its boundary: two
terms with Gaussian likelihoods. Training points are drawn once, or again every few steps. The error is measured on
other points.

Sources: Müller & Zeinhofer 2023; Dangel, Müller & Zeinhofer 2024, section 4 and appendix; Guzmán-Cordero et al. 2025,
whose runs on the 5-d equation draw new points at every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fisherfn as ff
from common.pinn.nets import Tree, derivatives, value

Batch = dict[str, tuple[Tensor, Tensor]]
"""Points and right-hand sides of each term."""

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
        redraw: the published number of steps between new training points; 0: the same points at all steps.
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
    redraw: int = 0


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
        minus_laplacian, lambda x: math.pi**2 * sum_of_cosines(x), cube(5), redraw=1,
    ),
}  # fmt: skip


class Posed:
    """A problem with its points drawn: terms for `ff.sum_of_terms`, the batches, and the relative error of a net.

    The points of a step are a function of the seed and the step alone, so a run can go on at any step.
    """

    def __init__(self, problem: Problem, seed: int, device: str = "cpu", redraw: int = 0) -> None:
        self.problem, self.seed, self.device, self.redraw = problem, seed, device, redraw
        generator = torch.Generator().manual_seed(seed)
        self.batch = self._drawn(generator)
        self.tests = self._points(EVALUATED, generator).to(device)
        self.truth = problem.solution(self.tests)
        models = {"interior": problem.residual, "boundary": value}
        self.terms: dict[str, Any] = {
            name: ff.Term(model, self.batch[name][0], ff.Gaussian()) for name, model in models.items()
        }

    def at(self, step: int) -> Batch:
        """Return the training points of a step, counted from 1, with their right-hand sides."""
        number = (step - 1) // self.redraw if self.redraw else 0
        if number == 0:
            return self.batch
        mixed = np.random.SeedSequence([self.seed, number]).generate_state(1)  # close seeds, independent numbers
        return self._drawn(torch.Generator().manual_seed(int(mixed[0])))

    def error(self, params: Tree) -> float:
        """Return the relative L2 error ‖u − u*‖ / ‖u*‖ over the evaluation points."""
        return float((value(params, self.tests) - self.truth).norm() / self.truth.norm())

    def _points(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.rand(n, self.problem.dimensions, generator=generator, dtype=torch.float64)

    def _drawn(self, generator: torch.Generator) -> Batch:
        """Draw points inside the domain and on its faces in turn."""
        problem = self.problem
        inside, edge = (self._points(n, generator) for n in (problem.interior, problem.boundary))
        for at, point in enumerate(edge):
            axis, side = problem.faces[at % len(problem.faces)]
            point[axis] = side
        inside, edge = inside.to(self.device), edge.to(self.device)
        return {"interior": (inside, problem.right(inside)), "boundary": (edge, problem.solution(edge))}
