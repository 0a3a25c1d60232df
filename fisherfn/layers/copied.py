r"""Weights computed from parameters, and parameters that meet the batch in a call of no layer family.

Examples are weight and spectral normalisation, standardised kernels, low-rank updates `W + B A`, parts of a matrix, and
products of three tensors. After computations without the batch, the result takes part in one call on the batch.
`torch.vmap` runs this call with a copy $w_n$ of the result per example. Its gradient
$g_n = \partial L_n / \partial w_n$, pulled back through the computations, is exactly the per-example gradient of the
parameters, and $a = 1$. The rest of the model runs on the whole batch, so unlike with the fallback it may couple
examples, branch on values, and contain functions without a rule for `torch.vmap`. A small parameter is one dense block;
a large one has one block per entry.

This file arranges the examples for such a call. A place `(axis, repeats, outer)` is a `fisherfn.stats.steps.Place`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from jaxtyping import Shaped
from torch import Tensor
from torch.func import vmap

from fisherfn.layers.base import Family
from fisherfn.layers.fallback import columns, from_matrix, rows, to_matrix

_Place: TypeAlias = tuple[int, int, int]
"""Axis of the examples counted from the right, rows per example on it, and how many of these are further out."""


def per_example(
    call: Callable[[Mapping[int, Tensor]], Tensor],
    tensors: Sequence[Tensor],
    places: Sequence[_Place | None],
    copies: Mapping[int, Callable[[int], Tensor]],
    place: _Place,
) -> Tensor:
    """Run a call once per example, with shared tensors replaced by copies, and join the outputs.

    Args:
        call: the call, a function of replacements for some of its tensors, by identity.
        tensors: all tensors that it takes.
        places: position of the examples in each of them; None for a tensor without examples.
        copies: functions that copy the shared tensors for a number of examples, by identity.
        place: position of the examples in the output.

    Raises:
        ValueError: no tensor has an axis of examples.
    """
    with_examples = {id(x): (x, at) for x, at in zip(tensors, places, strict=True) if at is not None}
    if not with_examples:
        raise ValueError("a call without examples")
    (first, (axis, repeats, _)), *_ = with_examples.values()
    examples = first.shape[axis] // repeats
    laid = {key: _examples_first(x, at) for key, (x, at) in with_examples.items()}
    laid |= {key: make(examples) for key, make in copies.items()}

    def one(*each: Tensor) -> Tensor:
        return call(dict(zip(laid, each, strict=True)))

    return _examples_back(vmap(one)(*laid.values()), place)


def _examples_first(x: Shaped[Tensor, "..."], place: _Place) -> Shaped[Tensor, "n ..."]:
    """Move the examples to the first axis; the rows of each stay on the axis where they were."""
    axis, repeats, outer = place
    at = axis + x.ndim
    parts: Tensor = x.unflatten(at, (outer, -1, repeats // outer)).movedim(at + 1, 0)
    return parts.flatten(at + 1, at + 2)


def _examples_back(y: Shaped[Tensor, "n ..."], place: _Place) -> Shaped[Tensor, "..."]:
    """Undo `_examples_first`."""
    axis, repeats, outer = place
    at = axis + y.ndim - 1
    parts: Tensor = y.unflatten(at + 1, (outer, repeats // outer)).movedim(0, at + 1)
    return parts.flatten(at, at + 2)


COPIED = Family("copied", (), lambda function, args, kwargs: None, rows, columns, to_matrix, from_matrix)
