r"""The exact Fisher block of every layer as a dense matrix, with a running average: $F \approx \mathrm{diag}(F_l)$.

$$F_l = \frac1N \sum_{n,s} \mathrm{vec}(W_{sn})\, \mathrm{vec}(W_{sn})^\top$$

`exact("block")` keeps the examples of the newest batch. This method keeps the matrix, which can be averaged over
batches or steps, and whose size does not depend on the batch. It needs $(d_{out} d_{in})^2$ numbers per block, so it
serves small layers. Damping is λI.

Müller & Zeinhofer 2023, *Achieving high accuracy with PINNs via energy natural gradient descent*, average the matrix;
Dangel, Müller & Zeinhofer 2024 use one block per layer.

k group, s sample, n example, o output, i input; p = o·i parameters of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn.base import Diagnostics, LayerMethod
from fisherfn.errors import HyperparameterError
from fisherfn.linalg import kron
from fisherfn.linalg.solve import add_diagonal, condition, floored
from fisherfn.per_example import example_matrices, matrix_windows
from fisherfn.taps import AnyTap
from fisherfn.types import Matrix, Shape

WIDEST = 4096
"""Largest block: a matrix and its factor take 128 MiB each in float64."""

Block = Float[Tensor, "k p p"]


@dataclass(frozen=True)
class Dense(LayerMethod):
    """One dense block per layer, averaged over updates. Built by `ff.dense`."""

    name = "dense"
    fit_passes = 1

    def init_block(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, damping: Tensor
    ) -> tuple[Block, Block]:
        """Return a matrix of zeros, and the Cholesky factor √λ I.

        Raises:
            HyperparameterError: a block of more than `WIDEST` parameters.
        """
        width = shape.o * shape.i
        if width > WIDEST:
            raise HyperparameterError(
                f"a dense block of {shape.o}×{shape.i} = {width:,} parameters needs {width:,}² numbers; the limit is "
                f'{WIDEST:,} parameters. Use ff.exact("block"), which keeps the examples, or ff.kfac().'
            )
        eye = torch.eye(width, dtype=dtype, device=device).expand(shape.k, -1, -1)
        return torch.zeros_like(eye), eye.double() * damping.double().sqrt()

    def estimate(self, tap: AnyTap, previous: Block) -> Block:
        """Return the matrix of one batch."""
        del previous
        parts = (example_matrices(part).flatten(3).flatten(0, 1) for part in matrix_windows(tap))  # [sn, k, p]
        return reduce(torch.add, (torch.einsum("mkp,mkq->kpq", W, W) for W in parts)) / tap.sizes.n

    def invert_block(self, factors: Block, damping: Float[Tensor, ""]) -> tuple[Block, Tensor, Diagnostics]:
        """Factorise `F_l + λI` by Cholesky, in float64; λ is at least the precision of the matrix."""
        shift, jitter = floored(factors, damping.expand(len(factors)))
        factor, failed = torch.linalg.cholesky_ex(add_diagonal(factors.double(), shift.double()))
        ok = (failed == 0) & kron.finite(factor) & (shift > 0) & (damping >= 0)
        return factor, ok, {"jitter": jitter, "condition": condition(factor)}

    def apply(self, inverse: Block, W: Matrix) -> Matrix:
        """Solve with the factor."""
        solved = torch.cholesky_solve(W.flatten(1).unsqueeze(-1).double(), inverse)
        return solved.to(W.dtype).reshape(W.shape)

    def matvec_block(self, factors: Block, W: Matrix) -> Matrix:
        """Multiply by the matrix."""
        return (factors @ W.flatten(1).unsqueeze(-1)).reshape(W.shape)


def dense() -> Dense:
    """Build the exact block of every layer as a dense matrix, with a running average; for small layers.

    Raises:
        HyperparameterError: a block of more than 4,096 parameters; raised by `ng.init`.
    """
    return Dense()
