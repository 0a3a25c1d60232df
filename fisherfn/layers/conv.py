r"""Convolutions in one, two and three dimensions: $s_t = W a_t + b$, with the patch under output position t as $a_t$.

A patch is in unfold order `(C_in / G, *kernel)`, so that `d_in = C_in / G · K`; each of the G groups is a block of its
own. Grosse & Martens 2016, section 2.

Shapes: input `[N, C_in, *space]`, output `[N, C_out, *space]`, weight `[C_out, C_in / G, *kernel]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Size, Tensor
from torch.nn import functional as F

from fisherfn.calls import bind
from fisherfn.layers.base import Call, Family, Moments
from fisherfn.rows import Phase, Phases

_DIMENSIONS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


class Config(NamedTuple):
    """Configuration of a convolution, without its tensors; padding is (before, after) for each dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int


Facts = Config
"""The name of `Config` in layouts saved before 0.1.0."""


class Axis(NamedTuple):
    """Inputs that the output positions meet along one dimension: `start + stride · position + step · entry`."""

    start: int
    positions: int
    stride: int
    entries: int
    step: int


def match(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    dimensions = _DIMENSIONS[function]
    given = bind(_ARGUMENTS, args, kwargs)
    kernel = tuple(given["weight"].shape[2:])
    if given["input"].ndim != dimensions + 2:  # torch also takes a single image, which has no examples
        return None
    stride, dilation = (each(given.get(name, 1), dimensions) for name in ("stride", "dilation"))
    padding = _padding(given.get("padding", 0), kernel, dilation)
    config = Config(kernel, stride, padding, dilation, int(given.get("groups", 1)))
    return Call(given["input"], given["weight"], given.get("bias"), config)


def each(value: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    """Return one number per dimension."""
    if isinstance(value, int):
        return (value,) * dimensions
    values = tuple(value)
    return values * dimensions if len(values) == 1 else values


def _padding(value: str | int | Sequence[int], kernel: tuple[int, ...], dilation: tuple[int, ...]) -> Any:
    if value == "valid":
        value = 0
    if value == "same":  # an odd total has the larger half behind
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((p, p) for p in each(value, len(kernel)))  # type: ignore[arg-type]


def rows(x: Float[Tensor, "n c *space"], config: Config) -> Phases:
    order = _unfold_order(x, config)
    return Phases((Phase(patches(x, _axes(x, config), config.groups), (), order),), len(order))


def moments(x: Float[Tensor, "n c *space"], config: Config) -> Moments | None:
    axes = _axes(x, config)
    return patch_moments(x, axes, config.groups).spread(_unfold_order(x, config)) if overlaps(axes) else None


def _axes(x: Float[Tensor, "n c *space"], config: Config) -> list[Axis]:
    axes = []
    spans = zip(x.shape[2:], config.kernel, config.stride, config.padding, config.dilation, strict=True)
    for size, k, stride, (before, after), dilation in spans:
        positions = (size + before + after - dilation * (k - 1) - 1) // stride + 1
        axes.append(Axis(-before, positions, stride, k, dilation))
    return axes


def _unfold_order(x: Float[Tensor, "n c *space"], config: Config) -> Tensor:
    return unfold_order(torch.arange(math.prod(config.kernel), device=x.device), x.shape[1] // config.groups)


def unfold_order(entries: Tensor, channels: int, kernel_size: int | None = None) -> Tensor:
    """Return the unfold-order indices of the columns of channels-last patches, for some entries of the kernel."""
    size = len(entries) if kernel_size is None else kernel_size
    return (entries[:, None] + size * torch.arange(channels, device=entries.device)).reshape(-1)


def patches(x: Float[Tensor, "n c *space"], axes: Sequence[Axis], groups: int) -> Float[Tensor, "g n t i"]:
    """Return the inputs under each output position, zero outside: `i` runs over kernel entries, then channels.

    Channels come last so that memory is read contiguously. In unfold order the copy would take half as long as the
    product that follows.
    """
    x = _unfolded(_cover(x, axes).movedim(1, -1).contiguous(), axes, groups)
    return rearrange(x, "n t entries g c -> g n t (entries c)")


def _unfolded(
    x: Float[Tensor, "first *space c"], axes: Sequence[Axis], groups: int
) -> Float[Tensor, "first t entries g c_in"]:
    for dimension, axis in enumerate(axes, start=1):
        x = x.unfold(dimension, axis.step * (axis.entries - 1) + 1, axis.stride)[..., :: axis.step]
    d = len(axes)  # first, positions, c, entries
    x = x.permute(0, *range(1, d + 1), *range(d + 2, 2 * d + 2), d + 1)
    t, entries = math.prod(x.shape[1 : d + 1]), math.prod(x.shape[d + 1 : -1])
    return x.reshape(x.shape[0], t, entries, groups, x.shape[-1] // groups)


def overlaps(axes: Sequence[Axis]) -> bool:
    """Return True if patches overlap so much that `patch_moments` costs less than a product of patches.

    Along the first axis, `patch_moments` multiplies every line of the input by its neighbours (entries · lines
    products). The product of patches multiplies every pair of entries at every position; symmetry saves three eighths.
    """
    first = axes[0]
    lines = first.positions + first.step * (first.entries - 1)
    return first.stride == 1 and 8 * lines < 5 * first.positions * first.entries


def patch_moments(x: Float[Tensor, "n c *space"], axes: Sequence[Axis], groups: int) -> Moments:
    """Compute `Σ_nt a` and `Σ_nt a aᵀ` of `patches` without forming them; the stride is 1 along the first axis."""
    everywhere = all(
        axis.stride == 1 and axis.start + axis.step * (axis.entries - 1) <= 0 and axis.start + axis.positions >= size
        for size, axis in zip(x.shape[2:], axes, strict=True)
    )
    return _correlations(x, axes, groups) if everywhere else _by_lines(x, axes, groups)


def _correlations(x: Float[Tensor, "n c *space"], axes: Sequence[Axis], groups: int) -> Moments:
    r"""Compute `patch_moments` for padding so wide that each kernel entry meets the whole input.

    The block of the entries e and f then depends only on f − e. It is the autocorrelation of the input at that
    distance, $\sum_q x_q x_{q + f - e}^\top$, which is the weight gradient of a convolution with x both as input and as
    output-gradient. Along the first axis d ≥ 0 is enough: the block of $-d$ is the transpose of the block of d.
    """
    n, channels, d = x.shape[0], x.shape[1] // groups, len(axes)
    reach, distances = [axis.step * (axis.entries - 1) for axis in axes], [2 * axis.entries - 1 for axis in axes]
    shape = Size([x.shape[1], channels, axes[0].entries, *distances[1:]])
    padded, steps = F.pad(x, (0, 0) * (d - 1) + (0, reach[0])), [axis.step for axis in axes]
    ahead = backward(padded, x, shape, (1,) * d, [0, *reach[1:]], steps, groups).unflatten(0, (groups, channels))
    behind = ahead.transpose(1, 2).flip(tuple(range(3, d + 3)))[:, :, :, :-1]
    index = torch.zeros((1, 1), dtype=torch.int64, device=x.device)  # of the distance f − e, for each pair of entries
    for axis, count in zip(axes, distances, strict=True):
        e = torch.arange(axis.entries, device=x.device)
        between = e - e[:, None] + axis.entries - 1
        index = (index[:, None, :, None] * count + between[:, None, :]).flatten(2).flatten(0, 1)
    blocks = torch.cat([behind, ahead], 3).flatten(3)[..., index]  # g, c, c, e, f
    first = x.reshape(n, groups, 1, channels, -1).sum((0, 4)).expand(-1, len(index), -1)
    return Moments(first.flatten(1), rearrange(blocks, "g c d e f -> g (e c) (f d)"))


def _by_lines(x: Float[Tensor, "n c *space"], axes: Sequence[Axis], groups: int) -> Moments:
    r"""Compute `patch_moments` one line of the first axis at a time.

    The second moment has a block for each pair of kernel entries e, f along the first axis. With $u_y$ the patches
    along the other axes of line y, it is $\sum_p u_{p + e}^\top u_{p + f}$. Its terms are products of lines at distance
    f − e, which all pairs of entries with that distance share.
    """
    first, others = axes[0], axes[1:]
    lines = _cover(x, axes).movedim(2, 0).movedim(2, -1).contiguous()  # y, n, *space, c
    y, n = lines.shape[:2]
    u = _unfolded(lines.flatten(0, 1), others, groups).unflatten(0, (y, n))
    u = rearrange(u, "y n t entries g c -> y g (n t) (entries c)")
    starts = [first.step * e for e in range(first.entries)]
    blocks: dict[tuple[int, int], Tensor] = {}
    for distance in range(first.entries):
        shift = first.step * distance
        products = u[: y - shift].mT @ u[shift:]
        for e in range(first.entries - distance):
            block = products[starts[e] : starts[e] + first.positions].sum(0)
            blocks[e, e + distance], blocks[e + distance, e] = block, block.mT
    second = torch.cat([torch.cat([blocks[e, f] for f in range(first.entries)], -1) for e in range(first.entries)], -2)
    by_line = u.sum(2)
    sums = [by_line[start : start + first.positions].sum(0) for start in starts]
    return Moments(torch.cat(sums, -1), second)


def _cover(x: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Pad the input with zeros, or crop it, to exactly the range that the output positions meet."""
    pads: list[int] = []
    for size, axis in zip(reversed(x.shape[2:]), reversed(axes), strict=True):
        last = axis.start + axis.stride * (axis.positions - 1) + axis.step * (axis.entries - 1)
        pads += [max(-axis.start, 0), max(last + 1 - size, 0)]
    x = F.pad(x, pads) if any(pads) else x
    for dimension, axis in enumerate(axes, start=2):
        length = axis.stride * (axis.positions - 1) + axis.step * (axis.entries - 1) + 1
        x = x.narrow(dimension, max(axis.start, 0), length)
    return x


def columns(g: Float[Tensor, "s n c *space"], config: Any) -> Float[Tensor, "k s n t o"]:
    return rearrange(g, "s n (k o) ... -> k s n (...) o", k=config.groups)


def to_matrix(weight: Float[Tensor, "c_out c_in *kernel"], config: Config) -> Float[Tensor, "k o i"]:
    return rearrange(weight, "(k o) c ... -> k o (c ...)", k=config.groups)


def from_matrix(matrix: Float[Tensor, "k o i"], config: Config) -> Float[Tensor, "c_out c_in *kernel"]:
    return matrix.reshape(matrix.shape[0] * matrix.shape[1], -1, *config.kernel)


def weight_gradient(
    x: Float[Tensor, "n c *space"], g: Float[Tensor, "n c_out *positions"], config: Config, shape: Size
) -> Float[Tensor, "*weight"]:
    """Compute the weight gradient by torch's own backward pass, which stores no patches."""
    pads = [p for pair in reversed(config.padding) for p in pair]
    x = F.pad(x, pads) if any(pads) else x
    return backward(x, g, shape, config.stride, (0,) * len(config.kernel), config.dilation, config.groups)


def backward(
    x: Tensor, g: Tensor, shape: Size, stride: Any, padding: Any, dilation: Any, groups: int, output_padding: Any = None
) -> Tensor:
    """Compute the weight gradient of a convolution, or of a transposed one if an output padding is given."""
    weight = x.new_empty(1).expand(shape)  # read for its shape only
    found = torch.ops.aten.convolution_backward(
        g, x, weight, None, stride, padding, dilation, output_padding is not None,
        output_padding or [0] * len(stride), groups, (False, True, False),
    )  # fmt: skip
    return found[1]  # type: ignore[no-any-return]


CONV = Family("conv", _DIMENSIONS, match, rows, columns, to_matrix, from_matrix, weight_gradient, moments)
