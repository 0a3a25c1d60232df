"""The values that travel between floors: trees of parameters, products, infos (taps have a file of their own).

Index legend, used in every file: k group, s draw, n example, t shared position (sequence, pixel), i input, o output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

Tree: TypeAlias = dict[str, Tensor]
"""Parameters, gradients and steps: one tensor a parameter name."""

PyTree: TypeAlias = Any
"""Any nesting of dicts, tuples, lists and registered classes with tensors as leaves."""

Model: TypeAlias = Callable[..., Any]
"""`model(params, x) -> outputs`, or with a context `model(params, x, context) -> (outputs, context)`."""

Matrix: TypeAlias = Float[Tensor, "k o i"]
"""A layer's parameters (or gradient, or step): one matrix a group, the bias as the last column."""


class Shape(NamedTuple):
    """A block's matrices: groups, outputs, inputs (the bias column among them), and whether the inputs are one-hot."""

    k: int
    o: int
    i: int
    one_hot: bool = False


class Product(NamedTuple):
    """A preconditioned gradient, and its inner product with the gradient where asked for (else `()`)."""

    matrix: Matrix
    inner: Float[Tensor, ""] | tuple[()]


@runtime_checkable
class Codec(Protocol):
    """What a tree of parameters looks like as one matrix a block, and back."""

    def matrices(self, values: Tree) -> dict[str, Tensor]:
        """A tree like params as one matrix a block."""
        ...

    def tree(self, matrices: Mapping[str, Tensor]) -> Tree:
        """One matrix a block as a tree like params."""
        ...


class Info(NamedTuple):
    """What a call measured: tensors only, so that it passes through `torch.vmap`. `()` where a call has nothing to say.

    Attributes:
        loss: mean negative log-likelihood of the batch, in nats.
        inner: ⟨∇, nat⟩ over all parameters, when asked for.
        ok: one mask a block; `ff.check` turns a false one into a typed error.
        checks: the masks that `ok` is made of, by what they check (`inputs`, `targets`, `loss` for the batch,
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
