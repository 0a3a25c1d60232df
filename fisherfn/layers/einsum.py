r"""Products with a parameter of any axes: `torch.einsum` of two tensors, `bmm`, and `matmul` of three axes or more.

Experts, `torch.einsum('nei,eio->neo', x, W)`, are a layer per expert; so is every axis that input, weight and output
have in common. Axes of the weight that only the output has make up $d_{out}$, those that are summed over make up
$d_{in}$, and all other axes of the input are positions (or the examples):

$$s_{pko} = \sum_i W_{koi}\, x_{pki}.$$

k group, p position or example, o output, i input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Size, Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fisherfn.layers.base import Call, Family

_MATMULS = {torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__, Tensor.__rmatmul__}
_SUMS = {torch.baddbmm, Tensor.baddbmm}


class Axes(NamedTuple):
    """The axes of a weight of this shape: groups, then outputs, then inputs."""

    shape: Size
    groups: tuple[int, ...]
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """Return the axes, in the order of the matrices."""
        return (*self.groups, *self.outputs, *self.inputs)

    def size(self, axes: tuple[int, ...]) -> int:
        """Return the number of entries that some of the axes have together."""
        return math.prod(self.shape[axis] for axis in axes)


def grouped_product(x: Float[Tensor, "*p k i"], weight: Float[Tensor, "*shape"], axes: Axes) -> Float[Tensor, "*p k o"]:
    """Return the product of every group, the form that all of this family's calls are brought into."""
    if has_torch_function((x, weight)):
        return handle_torch_function(grouped_product, (x, weight), x, weight, axes)
    return torch.einsum("...ki,koi->...ko", x, to_matrix(weight, axes))


def as_grouped_product(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], is_parameter: Callable[[Any], bool]
) -> Callable[[], Any] | None:
    """A product with one parameter as `grouped_product`; None for any other call."""
    if kwargs:
        return None
    if function is torch.einsum and args and isinstance(args[0], str):
        equation = args[0]
        operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
        added = None
    elif function in _MATMULS or function in _SUMS:
        operands, added = (args[-2:], args[0]) if function in _SUMS else (args, None)
        operands = operands[::-1] if function is Tensor.__rmatmul__ else operands
        if len(operands) != 2 or not all(isinstance(each, Tensor) and each.ndim > 1 for each in operands):
            return None
        if is_parameter(operands[1]) and operands[1].ndim == 2:
            return None  # a plain linear layer
        equation = _of_matmul(*(each.shape for each in operands))
    else:
        return None
    found = [is_parameter(each) for each in operands]
    if len(operands) != 2 or sum(found) != 1:
        return None
    x, weight = operands if found[1] else operands[::-1]
    letters = _letters(equation, [each.ndim for each in operands])
    if letters is None:
        return None
    parts = _product(x, weight, *(letters[:2] if found[1] else letters[1::-1]), letters[2])
    if parts is None or added is None:
        return parts
    return lambda: parts() + added


def _of_matmul(a: Size, b: Size) -> str:
    """The equation of a matrix product: batch axes from the right, of which one of length 1 is summed over."""
    names = iter("abcdefghijklmnopqrstuvw")
    left, right, out = "xy", "yz", "xz"
    for axis in range(3, max(len(a), len(b)) + 1):
        name, other = next(names), next(names)
        alike = len(a) < axis or len(b) < axis or a[-axis] == b[-axis]
        one = not alike and a[-axis] == 1
        left = (other if one else name) + left if len(a) >= axis else left
        right = (other if not alike and not one else name) + right if len(b) >= axis else right
        out = name + out
    return f"{left},{right}->{out}"


def _letters(equation: str, dimensions: list[int]) -> tuple[str, str, str] | None:
    """The letters of both operands and the output, an ellipsis of one operand spelled out."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    parts = inputs.split(",")
    if len(parts) != 2:
        return None
    if not arrow:
        out = "..." * ("..." in inputs) + "".join(sorted(c for c in set(inputs) - {",", "."} if inputs.count(c) == 1))
    if sum("..." in part for part in parts) > 1:
        return None
    free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    for part, dimension in zip(parts, dimensions, strict=True):
        if "..." in part:
            spelled = "".join(free[: dimension - len(part) + 3])
            parts, out = [each.replace("...", spelled) for each in parts], out.replace("...", spelled)
    if any(len(set(part)) != len(part) for part in (*parts, out)):
        return None
    return parts[0], parts[1], out


def _product(x: Tensor, weight: Tensor, of_x: str, of_w: str, out: str) -> Callable[[], Tensor] | None:
    """A product by its letters; None where the weight is summed alone, or nothing could be an axis of examples."""
    sizes = dict(zip(of_w, weight.shape, strict=True))
    if any(sizes.get(c, length) != length for c, length in zip(of_x, x.shape, strict=True)):
        return None  # broadcast along an axis of the weight
    groups, inner = ("".join(c for c in of_w if c in of_x and (c in out) == kept) for kept in (True, False))
    outer = "".join(c for c in of_w if c not in of_x)
    positions = "".join(c for c in of_x if c not in of_w and c in out)
    if any(c not in out for c in outer) or not positions:
        return None
    axes = Axes(weight.shape, *(tuple(of_w.index(c) for c in part) for part in (groups, outer, inner)))

    def parts() -> Tensor:
        canonical = torch.einsum(f"{of_x}->{positions}{groups}{inner}", x)
        canonical = canonical.reshape(*canonical.shape[: len(positions)], axes.size(axes.groups), -1)
        found = grouped_product(canonical, weight, axes)
        lengths = [sizes[c] for c in groups + outer]
        return torch.einsum(f"{positions}{groups}{outer}->{out}", found.reshape(*found.shape[:-2], *lengths))

    return parts


def match(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    x, weight, axes = args
    return Call(x, weight, None, axes)


def rows(x: Float[Tensor, "n *t k i"], axes: Axes) -> Float[Tensor, "k n positions i"]:
    return rearrange(x, "n ... k i -> k n (...) i")


def columns(g: Float[Tensor, "s n *t k o"], axes: Any) -> Float[Tensor, "k s n positions o"]:
    return rearrange(g, "s n ... k o -> k s n (...) o")


def to_matrix(weight: Float[Tensor, "*shape"], axes: Axes) -> Float[Tensor, "k o i"]:
    sizes = [axes.size(each) for each in (axes.groups, axes.outputs, axes.inputs)]
    return weight.permute(axes.order).reshape(sizes)


def from_matrix(matrix: Float[Tensor, "k o i"], axes: Axes) -> Float[Tensor, "*shape"]:
    back = sorted(range(len(axes.order)), key=axes.order.__getitem__)
    return matrix.reshape([axes.shape[axis] for axis in axes.order]).permute(back)


EINSUM = Family("einsum", (grouped_product,), match, rows, columns, to_matrix, from_matrix, any_axis=True)
