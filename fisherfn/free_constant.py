r"""The centred Fisher: a free constant in the log-model makes the second moment of its scores their covariance.

An unnormalised log-density or log-amplitude $\ell(\theta, x)$ is only defined up to a constant, and the metric of the
normalised one is the covariance of its scores $O = \nabla \ell$ (the S matrix of quantum Monte Carlo), not their
second moment. Let the model be $\ell + \kappa c$ with a parameter c. With weights $p_n$ that sum to one, its Fisher is

$$\begin{pmatrix} \sum p\, O O^\top & \kappa \bar O \\ \kappa \bar O^\top & \kappa^2 \end{pmatrix},$$

and to solve with it, for a gradient that is zero for c, is to solve with the Schur complement of the corner,
$\sum p\, O O^\top - \frac{\kappa^2}{\kappa^2 + \lambda} \bar O \bar O^\top + \lambda I$: the damped covariance, up to
a relative error of $\lambda / \kappa^2$ in the subtracted mean. Weights of the examples are taken into account.
"""

from __future__ import annotations

from typing import Any

import torch

from fisherfn.errors import StructureError, expect, expect_positive
from fisherfn.types import Model, PyTree, Tree

NAME = "log_constant"
"""The name of the additional parameter."""


def centred(model: Model, params: Tree, *, scale: float = 100.0) -> tuple[Model, Tree]:
    """Return the model with a free constant added to its outputs, and params with that constant.

    The full Fisher of the result (`ff.exact()`) then acts on the other parameters as the covariance of the
    per-example gradients. Methods with one block per layer do not see the coupling and stay uncentred.

    Args:
        model: a pure function `(params, x) -> outputs` with one output per example, `[N, 1]` or `[N]`.
        params: its parameters.
        scale: κ; the mean is subtracted up to the relative error λ/κ². The smallest possible λ is ε (κ² + tr F) with
            the working precision ε, and a smaller one is raised to it (info.diagnostics["jitter"]): use float64, or
            κ² well below λ/ε. In float32 with λ = 1e-4, κ = 3 is a good choice, and 100 raises λ to 1e-3.

    Raises:
        StructureError: params that have this constant already.
        HyperparameterError: a scale that is not positive.
    """
    expect(params, dict, "params", "pass a tree {name: tensor}")
    expect_positive("scale", scale)
    if NAME in params:
        raise StructureError(f"params have a {NAME!r} already: centre a model once.")
    like = next(iter(params.values()))

    def shifted(params: Tree, x: PyTree) -> Any:
        own = {name: leaf for name, leaf in params.items() if name != NAME}
        return model(own, x) + scale * params[NAME]

    return shifted, {**params, NAME: torch.zeros((), dtype=like.dtype, device=like.device)}
