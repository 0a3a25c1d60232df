"""The Gaussian likelihood with one fixed variance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fisherfn import tree
from fisherfn.errors import TargetError, expect_positive
from fisherfn.likelihoods.base import check_shape, diagonal_columns, sum_over_outputs
from fisherfn.types import single


@dataclass(frozen=True)
class Gaussian:
    r"""A Gaussian with the outputs as mean and one fixed variance: regression, real-valued autoencoders.

    $-\log p(y \mid f) = \frac{1}{2\sigma^2} \sum_j (y_j - f_j)^2$; σ² = 1/2 is the plain sum of squares.

    >>> Gaussian().nll(torch.zeros(1, 2), torch.ones(1, 2))
    tensor([1.])
    """

    variance: float | Tensor = 1.0

    def __post_init__(self) -> None:
        expect_positive("Gaussian variance", self.variance)

    def nll(self, outputs: Float[Tensor, "n *d"], targets: Tensor) -> Float[Tensor, " n"]:
        _check_targets(targets, outputs)
        return sum_over_outputs(_difference(outputs, targets).square()) / (2 * self.variance)

    def score(self, outputs: Float[Tensor, "n *d"], targets: Tensor) -> Float[Tensor, "n *d"]:
        r"""Return the gradient of `nll` in the outputs, $(f - y) / \sigma^2$."""
        _check_targets(targets, outputs)
        difference = _difference(outputs, targets)
        one = isinstance(self.variance, float) and self.variance == 1
        return (difference if one else difference / self.variance).to(outputs.dtype)

    def sample(self, outputs: Float[Tensor, "n *d"], noise: Float[Tensor, "n *d"]) -> Float[Tensor, "n *d"]:
        """Return `outputs + σ · noise`, with standard normal noise."""
        return outputs + self.variance**0.5 * noise

    def noise(self, shape: torch.Size, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)

    def fisher_sqrt(self, outputs: Float[Tensor, "n *d"]) -> Float[Tensor, "columns n *d"]:
        r"""Return one column per output: $e_j / \sigma$."""
        return diagonal_columns(torch.ones_like(outputs) / self.variance**0.5)

    def column_weights(self, cotangent: Float[Tensor, "n *d"]) -> Float[Tensor, "columns n"]:
        r"""Return the weights of the columns of `fisher_sqrt` whose sum is a cotangent of the outputs: σ times it."""
        return self.variance**0.5 * cotangent.reshape(len(cotangent), -1).mT

    def fisher_product(self, outputs: Float[Tensor, "n *d"], v: Float[Tensor, "n *d"]) -> Float[Tensor, "n *d"]:
        r"""Return $v / \sigma^2$."""
        return v / self.variance

    def valid(self, outputs: Tensor, targets: Tensor) -> Bool[Tensor, ""]:
        return tree.finite_inputs(targets)


def _difference(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return `f − y` in the type of the outputs, at least float32."""
    outputs = single(outputs)
    return outputs - targets.to(outputs.dtype)


def _check_targets(targets: Tensor, outputs: Tensor) -> None:
    check_shape(targets, outputs.shape, "Gaussian", "a target for each output")
    if targets.dtype == torch.bool:
        raise TargetError("Gaussian targets are numbers, got torch.bool: convert them, or use ff.Bernoulli.")
