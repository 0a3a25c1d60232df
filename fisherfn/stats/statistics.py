"""The statistics of one batch as a value: raw tensors of each layer, converted to one tap at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import tree
from fisherfn.errors import StructureError
from fisherfn.stats.block_taps import lazy
from fisherfn.stats.blocks import Block
from fisherfn.stats.layout import Layout
from fisherfn.stats.processes import OneProcess
from fisherfn.taps import AnyTap, Tap
from fisherfn.types import Matrix, PyTree, Tree, at_least_single
from fisherfn.which import Which


class LayerStats(NamedTuple):
    """A layer's raw statistics: one tensor per use, with the examples first; `()` for those not requested."""

    inputs: tuple[Tensor, ...]
    """Inputs of the layer, `[N, …]`, as it received them (those of a convolution are not unfolded)."""
    grads: tuple[Tensor, ...]
    """Output-gradients of the sampled labels, `[S, N, …]`."""
    loss_grads: tuple[Tensor, ...]
    """Output-gradients of the loss on the data, `[N, …]`: `N · ∂(mean loss)/∂output`."""


@dataclass(frozen=True)
class Stats(OneProcess):
    """Loss, gradient and curvature statistics of one batch. A pytree; the layout is its static part."""

    loss: Float[Tensor, ""]
    """The mean negative log-likelihood over the batch."""
    outputs: Tensor
    context: PyTree
    layers: dict[str, LayerStats]
    checks: dict[str, Tensor]
    layout: Layout
    plain: Tree = field(default_factory=dict)
    """The gradient of the mean loss for the parameters that are in no block and take the plain gradient."""
    losses: Tensor = field(default_factory=lambda: torch.full((1,), torch.nan))
    """The negative log-likelihood of each example; NaN in a watched pass, whose loss is not known."""
    empirical: bool = False
    """True if the Fisher is made of the gradients of the loss on the data."""
    residuals: Float[Tensor, "s n"] | tuple[()] = ()
    """The gradient of the loss in the columns of the Fisher of "type2", if the likelihood knows it."""

    @property
    def examples(self) -> int:
        """The number of examples, N."""
        block = self.layout.blocks[0]
        return self.layers[block.key].inputs[0].shape[0] // block.uses[0].repeats

    @property
    def sampled(self) -> Which:
        """The blocks with Fisher samples: all, none, or those with these keys."""
        keys = frozenset(key for key, stats in self.layers.items() if stats.grads)
        return len(keys) > 0 if len(keys) in (0, len(self.layers)) else keys

    @property
    def coefficients(self) -> Float[Tensor, "s n"] | None:
        """The c of the gradient `1/N Σ c_sn W_sn` in the per-example gradients of `taps`; None if it is not known."""
        if self.empirical:
            return self.losses.new_ones(1, self.examples, dtype=torch.float64)
        return self.residuals if isinstance(self.residuals, Tensor) else None

    @property
    def taps(self) -> dict[str, Tap]:
        """The tap of every block for the sampled labels. `lazy_tap(key)` needs less memory: one block at a time."""
        return {block.key: self.tap(block.key) for block in self.layout.blocks}

    @property
    def grads(self) -> Tree:
        """The gradient of the mean loss, a tree like params. It is computed at each access, so keep the result."""
        matrices = {block.key: self.gradient(block.key) for block in self.layout.blocks}
        return self.layout.cast(self.layout.tree(matrices) | self.plain)

    def tap(self, key: str) -> Tap:
        """Return the block's tap for the sampled labels, with `a` as a tensor (an index for an embedding).

        Raises:
            StructureError: these statistics were made with `curvature=False`.
        """
        return self.lazy_tap(key).whole().plain()

    def loss_tap(self, key: str) -> Tap:
        """Return the block's tap for the data's targets: one sample, whose mean over examples is the gradient."""
        return self.lazy_loss_tap(key).whole().plain()

    def lazy_tap(self, key: str) -> AnyTap:
        """Return `tap(key)` computed on demand for a slice of examples, with `a` in its structured form."""
        stats = self.layers[key]
        if not stats.grads:
            raise StructureError(
                f"block {key!r} has no Fisher samples: these statistics were made with curvature=False or for other "
                "blocks. Call ng.stats without it to update the curvature."
            )
        return lazy(self.layout.block(key), stats.inputs, stats.grads)

    @property
    def lazy_taps(self) -> dict[str, AnyTap]:
        """The lazy tap of every block for the sampled labels, computed on demand for a slice of examples."""
        return {block.key: self.lazy_tap(block.key) for block in self.layout.blocks}

    def lazy_loss_tap(self, key: str) -> AnyTap:
        """Return `loss_tap(key)` computed on demand for a slice of examples."""
        stats = self.layers[key]
        return lazy(self.layout.block(key), stats.inputs, tuple(g.unsqueeze(0) for g in stats.loss_grads))

    def gradient(self, key: str) -> Matrix:
        """Return the gradient of the mean loss for one block, as its matrix."""
        stats = self.layers[key]
        return gradient(self.layout.block(key), stats.inputs, stats.loss_grads)


def _flatten(stats: Stats) -> tuple[list[Any], tuple[Layout, bool]]:
    fields = [
        stats.loss, stats.outputs, stats.context, stats.layers, stats.checks, stats.plain, stats.losses, stats.residuals
    ]  # fmt: skip
    return fields, (stats.layout, stats.empirical)


def _unflatten(children: list[Any], config: tuple[Layout, bool]) -> Stats:
    loss, outputs, context, layers, checks, plain, losses, residuals = children
    return Stats(loss, outputs, context, layers, checks, config[0], plain, losses, config[1], residuals)


tree.register(Stats, _flatten, _unflatten)


def gradient(block: Block, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> Matrix:
    """Compute `1/N Σ_n Σ_t g aᵀ` for one sample, in the fastest way the layer has, at least in float32."""
    dtype = at_least_single(grads[0].dtype)
    grads = [g.to(dtype) for g in grads]
    backward = block.family.weight_gradient
    if backward is None:
        return lazy(block, inputs, [g.unsqueeze(0) for g in grads]).mean_gradient()
    total: Matrix | None = None
    for use, x, g in zip(block.uses, inputs, grads, strict=True):
        x = x.to(dtype) if x.is_floating_point() else x  # indices stay indices
        weight = block.family.to_matrix(backward(x, g, use.config, block.weight_shape), use.config)
        if block.bias is not None:
            bias = block.family.columns(g.unsqueeze(0), use.config).sum((1, 2, 3)) * float(use.biased)
            weight = torch.cat([weight, bias.unsqueeze(-1)], -1)
        total = weight if total is None else total + weight
    assert total is not None
    return total / (inputs[0].shape[0] // block.uses[0].repeats)
