"""Types of the values that modules exchange: trees of parameters, products, infos (see taps.py for taps).

Index legend, used in every file: k group, s sample, n example, t shared position (sequence, pixel), i input, o output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Tree: TypeAlias = dict[str, Tensor]
"""Parameters, gradients and steps: one tensor per parameter name."""

PyTree: TypeAlias = Any
"""Any nesting of dicts, tuples, lists and registered classes with tensors as leaves."""

Model: TypeAlias = Callable[..., Any]
"""`model(params, x) -> outputs`, or with a context `model(params, x, context) -> (outputs, context)`."""

Matrix: TypeAlias = Float[Tensor, "k o i"]
"""The parameters (or gradient, or step) of a layer: one matrix per group, with the bias as last column."""


@cache
def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which sums of this type are computed: itself, or float32 for half precision."""
    return torch.promote_types(dtype, torch.float32)


def single(x: Tensor) -> Tensor:
    """Return x in at least float32: half precision would round sums, products and large numbers."""
    return x.to(at_least_single(x.dtype))


class Shape(NamedTuple):
    """The shape of a block's matrices: groups, outputs, inputs (including the bias), and a flag for one-hot inputs."""

    k: int
    o: int
    i: int
    one_hot: bool = False


class Product(NamedTuple):
    """A preconditioned gradient, and its inner product with the gradient if requested (else `()`)."""

    matrix: Matrix
    inner: Float[Tensor, ""] | tuple[()]


@runtime_checkable
class Codec(Protocol):
    """Conversion between a tree of parameters and one matrix per block."""

    def matrices(self, values: Tree) -> dict[str, Tensor]:
        """Convert a tree like params to one matrix per block."""
        ...

    def tree(self, matrices: Mapping[str, Tensor]) -> Tree:
        """Convert one matrix per block to a tree like params."""
        ...


class Info(NamedTuple):
    """Measurements of a call: tensors only, so that it passes through `torch.vmap`; `()` for unused fields.

    Attributes:
        loss: mean negative log-likelihood of the batch, in nats.
        inner: ⟨∇, nat⟩ over all parameters, if requested.
        ok: one mask per block; `ff.check` turns a false one into a typed error.
        checks: the masks that `ok` combines, by name (`inputs`, `targets`, `loss` for the batch,
            `statistics`, `factorisation`, `step` for each block).
        diagnostics: measurements of the method by name, then by block (jitter used, residuals, …).
        context: the model's new context.
        adapted: step size, momentum, damping and reduction ratio of an adaptive step (`ff.Adapted`).
    """

    loss: Any = ()
    inner: Any = ()
    ok: dict[str, Bool[Tensor, ""]] = {}
    checks: dict[str, Any] = {}
    diagnostics: dict[str, dict[str, Tensor]] = {}
    context: PyTree = ()
    adapted: Any = ()
