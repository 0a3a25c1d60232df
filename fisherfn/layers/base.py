"""Interface of a layer family: how its calls are recognised, and how they are converted to `(a, g)`.

A family is a few pure functions without state. A new one is a new file with one `Family`, and its name in `_ALL`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Size, Tensor

from fisherfn.rows import Rows


class Call(NamedTuple):
    """One intercepted use of a layer: its tensors, and the static configuration with which the family reads them."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    config: Any = None


class Moments(NamedTuple):
    """Sums over examples and positions of a layer's rows: `Σ a` and `Σ a aᵀ`."""

    first: Float[Tensor, "k i"]
    second: Float[Tensor, "k i i"]

    def spread(self, columns: Int[Tensor, " i"]) -> Moments:
        """Return the same moments with entry j moved to index `columns[j]`."""
        back = columns.argsort()
        return Moments(self.first[:, back], self.second[:, back][..., back])


class Family(NamedTuple):
    """A layer family.

    Attributes:
        name: name of the family in the coverage report.
        functions: the torch functions that layers of this family call.
        match: reads a call of one of them; returns a `Call` if it is a layer of this family, else None.
        rows: converts the call's input `[N, …]` (already normalised for a normalisation) and config to
            `a: [K, N, T, d_in]`, without bias column, dense or with a structure.
        columns: converts raw output-gradients `[S, N, …]` and config to `g: [K, S, N, T, d_out]`.
        to_matrix: converts the weight to `[K, d_out, d_in]`.
        from_matrix: inverse of `to_matrix`.
        weight_gradient: computes the weight's gradient, summed over examples, from raw input and one sample's raw
            output-gradients `[N, …]`; None if there is no faster way than from the rows.
        moments: computes the moments of the rows from raw input and config; returns None if this config has no faster
            way than from the rows.
        refuse: raises the typed error for a call of one of the functions that the library cannot handle at all.
        uncoupled: for a call that mixes examples by design (batch norm), the same call without this mixing; else None.
        any_axis: True if the examples may be on any axis but the last (all these axes are equivalent).
        one_hot: True if the rows are one-hot.
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
