"""What a layer family must say of itself: how it is recognised, and how it turns into `(a, g)`.

A layer is a few pure functions and no state. A new one is a new file with one `Family`, and one line in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Size, Tensor

from fisherfn.rows import Rows


class Call(NamedTuple):
    """One use of a layer, as intercepted: its tensors, and the static configuration that the family reads them by."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    config: Any = None


class Moments(NamedTuple):
    """Sums over examples and positions of a layer's rows: `Σ a` and `Σ a aᵀ`."""

    first: Float[Tensor, "k i"]
    second: Float[Tensor, "k i i"]

    def spread(self, columns: Int[Tensor, " i"]) -> Moments:
        """The same with entry j in place `columns[j]`."""
        back = columns.argsort()
        return Moments(self.first[:, back], self.second[:, back][..., back])


class Family(NamedTuple):
    """A layer family.

    Attributes:
        name: what the coverage report calls it.
        functions: the torch functions that its layers may reach torch as.
        match: reads a call of one of them: a `Call` if it is one of this family's, else None.
        rows: the call's input `[N, …]` (a normalisation's is already normalised) and config to `a: [K, N, T, d_in]`,
            without bias column, dense or with a structure.
        columns: raw output-gradients `[S, N, …]` and config to `g: [K, S, N, T, d_out]`.
        to_matrix: weight to `[K, d_out, d_in]`.
        from_matrix: back, given the weight's shape.
        weight_gradient: raw input and one draw's raw output-gradients `[N, …]` to the weight's gradients, summed over
            examples, where there is a quicker way than by the rows.
        moments: raw input and config to the moments of the rows, where for this config there is a quicker way than by
            the rows; else None.
        refuse: raises the typed error for a call of one of the functions that no run of the library can contain.
        uncoupled: for a call that mixes examples by design (batch norm), the same call without this mixing; else None.
        any_axis: whether the example may be another axis than the first, all axes but the last being alike.
        one_hot: whether the rows are one-hot.
    """

    name: str
    functions: Collection[Callable[..., Any]]
    match: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Call | None]
    rows: Callable[[Tensor, Any], Rows]
    columns: Callable[[Tensor, Any], Float[Tensor, "k s n t o"]]
    to_matrix: Callable[[Tensor, Any], Float[Tensor, "k o i"]]
    from_matrix: Callable[[Tensor, Any], Tensor]
    weight_gradient: Callable[[Tensor, Tensor, Any, Size], Tensor] | None = None
    moments: Callable[[Tensor, Any], Moments | None] = lambda x, config: None
    refuse: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], None] = lambda function, args, kwargs: None
    uncoupled: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Callable[[], Tensor] | None] = (
        lambda function, args, kwargs: None
    )
    any_axis: bool = False
    one_hot: bool = False
