r"""Transposed convolutions: $s_u = W a_u + b$ at output position u, with $a_u$ the patch of the zero-inserted input.

Position u meets input j through kernel entry δ where $u = j \cdot \text{stride} - \text{padding} + \delta \cdot
\text{dilation}$. In the patch the kernel is flipped: columns run over `(C_in / G, *kernel)` with the last entry first.
Only one in stride^dimensions entries of the zero-inserted patch is nonzero. Positions of one phase,
$(u + \text{padding}) \bmod \text{stride}$, have these entries in the same columns, so rows are computed phase by phase,
without the zeros.

Shapes: input `[N, C_in, *space]`, output `[N, C_out, *space]`, weight `[C_in, C_out / G, *kernel]`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Size, Tensor
from torch.nn import functional as F

from fisherfn.calls import bind
from fisherfn.layers.base import Call, Family, Moments
from fisherfn.layers.conv import Axis, backward, each, overlaps, patch_moments, patches, unfold_order
from fisherfn.layers.conv import columns as columns
from fisherfn.rows import Phase, Phases

_DIMENSIONS = {F.conv_transpose1d: 1, F.conv_transpose2d: 2, F.conv_transpose3d: 3}
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


class Config(NamedTuple):
    """Configuration of a transposed convolution, without its tensors."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


Facts = Config
"""The name of `Config` in layouts saved before 0.1.0."""


class _Phase(NamedTuple):
    """One phase along one dimension: its output positions, entries of the flipped kernel, and inputs."""

    positions: range
    entries: range
    axis: Axis


def match(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    dimensions = _DIMENSIONS[function]
    given = bind(_ARGUMENTS, args, kwargs)
    if given["input"].ndim != dimensions + 2:  # torch also takes a single image, which has no examples
        return None
    numbers = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1}
    config = Config(
        kernel=tuple(given["weight"].shape[2:]),
        groups=int(given.get("groups", 1)),
        **{name: each(given.get(name, default), dimensions) for name, default in numbers.items()},
    )
    return Call(given["input"], given["weight"], given.get("bias"), config)


def moments(x: Float[Tensor, "n c *space"], config: Config) -> Moments | None:
    if any(stride > 1 for stride in config.stride):  # the patches of a phase have few entries and overlap little
        return None
    axes = [phase.axis for d, size in enumerate(x.shape[2:]) for phase in _phases(size, config, d)]
    entries = torch.arange(math.prod(config.kernel), device=x.device)
    order = unfold_order(entries, x.shape[1] // config.groups)
    return patch_moments(x, axes, config.groups).spread(order) if overlaps(axes) else None


def rows(x: Float[Tensor, "n c *space"], config: Config) -> Phases:
    dimensions = [_phases(size, config, d) for d, size in enumerate(x.shape[2:])]
    lengths = [_length(size, config, d) for d, size in enumerate(x.shape[2:])]
    channels, kernel = x.shape[1] // config.groups, math.prod(config.kernel)
    parts = []
    for phases in itertools.product(*dimensions):
        positions = _flat([phase.positions for phase in phases], lengths, x.device)
        entries = _flat([phase.entries for phase in phases], config.kernel, x.device)
        if len(entries):
            a = patches(x, [phase.axis for phase in phases], config.groups)
        else:  # where stride and dilation share a divisor, some positions meet no input
            a = x.new_zeros(config.groups, x.shape[0], len(positions), 0)
        parts.append(Phase(a, positions, unfold_order(entries, channels, kernel)))
    return Phases(tuple(parts), channels * kernel)


def _length(size: int, config: Config, d: int) -> int:
    """Return the number of output positions along dimension d."""
    reach = config.dilation[d] * (config.kernel[d] - 1) + config.output_padding[d] + 1
    return (size - 1) * config.stride[d] - 2 * config.padding[d] + reach


def _phases(size: int, config: Config, d: int) -> list[_Phase]:
    """Return the phases along dimension d that have an output position."""
    stride, padding, dilation, kernel = config.stride[d], config.padding[d], config.dilation[d], config.kernel[d]
    phases = []
    for first in range(min(stride, _length(size, config, d))):
        positions = range(first, _length(size, config, d), stride)
        # entry e of the flipped kernel is δ = kernel - 1 - e
        met = [e for e in range(kernel) if (first + padding - dilation * (kernel - 1 - e)) % stride == 0]
        between = stride // math.gcd(stride, dilation)
        entries = range(met[0], kernel, between) if met else range(0)
        start = (first + padding - dilation * (kernel - 1 - met[0])) // stride if met else 0
        axis = Axis(start, len(positions), 1, len(entries), dilation * between // stride)
        phases.append(_Phase(positions, entries, axis))
    return phases


def _flat(ranges: list[range], sizes: Any, device: torch.device) -> Tensor:
    """Return the row-major indices of the product of some ranges in an array of these sizes."""
    index = torch.zeros((), dtype=torch.int64, device=device)
    for chosen, size in zip(ranges, sizes, strict=True):
        index = index.unsqueeze(-1) * size + torch.tensor(list(chosen), dtype=torch.int64, device=device)
    return index.reshape(-1)


def to_matrix(weight: Float[Tensor, "c_in c_out *kernel"], config: Config) -> Float[Tensor, "k o i"]:
    flipped = weight.flip(tuple(range(2, weight.ndim)))
    return rearrange(flipped, "(k i) o ... -> k o (i ...)", k=config.groups)


def from_matrix(matrix: Float[Tensor, "k o i"], config: Config) -> Float[Tensor, "c_in c_out *kernel"]:
    flipped = rearrange(matrix.reshape(*matrix.shape[:2], -1, *config.kernel), "k o i ... -> (k i) o ...")
    return flipped.flip(tuple(range(2, flipped.ndim)))


def weight_gradient(
    x: Float[Tensor, "n c *space"], g: Float[Tensor, "n c_out *positions"], config: Config, shape: Size
) -> Float[Tensor, "*weight"]:
    """Compute the weight gradient by torch's own backward pass, which inserts no zeros."""
    return backward(x, g, shape, config.stride, config.padding, config.dilation, config.groups, config.output_padding)


CONV_TRANSPOSE = Family(
    "conv transpose", _DIMENSIONS, match, rows, columns, to_matrix, from_matrix, weight_gradient, moments
)
