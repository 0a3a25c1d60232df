"""Terms over the same parameters as one net: common blocks, and the statistics of all terms together.

The terms are traced separately, so the same weight may be a layer with a bias in one, a layer without in another, and
in no layer in a third. A common block is the largest one of any term if it serves all terms. Otherwise its parameters
become fallbacks, each a block of its per-example gradients. `ng.layout` says which.

k group, s sample, n example, o output, i input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Size, Tensor

from fisherfn import masked, rows, tree
from fisherfn.errors import UnusedParameterError
from fisherfn.joined import JoinedTap, silent_tap
from fisherfn.layers import FallbackConfig
from fisherfn.per_example import example_matrices
from fisherfn.stats import Block, Layout, Stats
from fisherfn.stats.block_taps import lazy
from fisherfn.stats.blocks import Use
from fisherfn.taps import AnyTap, Tap
from fisherfn.types import Matrix, Shape, Tree
from fisherfn.which import Which

Layouts = Mapping[str, Layout]


# the common blocks -----------------------------------------------------------------------------------------------


def merged(layouts: Layouts, params: Tree, unused: str) -> Layout:
    """Return the layout of the sum of some terms.

    Raises:
        UnusedParameterError: no term depends on a parameter, and `unused` is "raise".
    """
    first = next(iter(layouts.values()))
    blocks = tuple(block for names in _coupled(layouts, params) for block in _common(layouts, params, names))
    covered = {name for block in blocks for name in block.names}
    left = tuple(name for name in params if name not in covered)
    if left and unused == "raise":
        raise UnusedParameterError(
            f"no term depends on {', '.join(map(repr, left[:4]))}. Remove such parameters from params, or build with "
            'unused="ignore": their gradients and steps are zero.'
        )
    return replace(
        first,
        blocks=blocks,
        input_shapes=(),
        output_shape=Size(),
        output_dtype=reduce(torch.promote_types, [layout.output_dtype for layout in layouts.values()]),
        has_context=any(layout.has_context for layout in layouts.values()),
        context_by_example=(),
        couples=any(layout.couples for layout in layouts.values()),
        unused=left,
        one_by_one="",
        steps=(),
    )


def _coupled(layouts: Layouts, params: Tree) -> list[tuple[str, ...]]:
    """Return sets of parameters that share a block in some term, in params order; unused ones are left out."""
    sets: list[set[str]] = []
    for block in (block for layout in layouts.values() for block in layout.blocks):
        mine = set(block.names)
        touching = [names for names in sets if names & mine]
        sets = [names for names in sets if not names & mine] + [mine.union(*touching)]
    order = {name: at for at, name in enumerate(params)}
    return sorted((tuple(sorted(names, key=order.__getitem__)) for names in sets), key=lambda names: order[names[0]])


def _common(layouts: Layouts, params: Tree, names: tuple[str, ...]) -> list[Block]:
    """Return the common block of these parameters, or one fallback for each."""
    parts = {term: _touching(layout, names) for term, layout in layouts.items()}
    parts = {term: blocks for term, blocks in parts.items() if blocks}
    for blocks in parts.values():
        whole = blocks[0]
        if set(whole.names) == set(names) and all(_serves(whole, its) for its in parts.values()):
            return [replace(whole, why=f"{whole.why}; in {', '.join(parts)}")]
    kinds = sorted({block.kind for blocks in parts.values() for block in blocks})
    fallbacks = []
    for name in names:
        shape = params[name].shape
        config = FallbackConfig(shape)
        use, why = Use(config, shape, False, params[name].dtype), f"{' and '.join(kinds)} in different terms"
        fallbacks.append(Block(name, "fallback", name, shape, None, Size(), (use,), f"{why}; {config.form}"))
    return fallbacks


def _touching(layout: Layout, names: tuple[str, ...]) -> tuple[Block, ...]:
    return tuple(block for block in layout.blocks if set(block.names) & set(names))


def blocks_of(term: Layout, whole: Layout, which: Which) -> Which:
    """Return the blocks of a term that the chosen common blocks consist of."""
    if isinstance(which, bool):
        return which
    names = {name for key in which for name in whole.block(key).names}
    return frozenset(block.key for block in term.blocks if names & set(block.names))


@lru_cache(maxsize=4096)  # asked for each tap of each step
def _serves(whole: Block, blocks: tuple[Block, ...]) -> bool:
    """Return True if the taps of a term's blocks are taps of this one, or are so with a column of zeros."""
    if len(blocks) != 1 or blocks[0].weight != whole.weight:
        return False
    block = blocks[0]
    fits = block.shape[:2] == whole.shape[:2] and block.family.one_hot == whole.family.one_hot
    if block.bias == whole.bias:
        return fits and block.shape == whole.shape and _same_order(block, whole)
    return fits and block.bias is None and block.shape[2] + 1 == whole.shape[2] and _same_order(block, whole)


def _same_order(block: Block, whole: Block) -> bool:
    """Return True if two blocks read the weight as the same matrix."""
    numbers = torch.arange(whole.weight_shape.numel(), dtype=torch.float64).reshape(whole.weight_shape)
    return torch.equal(block.family.to_matrix(numbers, block.config), whole.family.to_matrix(numbers, whole.config))


# the statistics --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SumStats(Stats):
    """Statistics of all terms: those of each, and their sum in the common blocks. A pytree, as `Stats` is."""

    terms: dict[str, Stats] = field(default_factory=dict)
    """The statistics of each term."""
    weights: dict[str, float] = field(default_factory=dict)
    """The weight of each term in the loss."""
    which: Which = True
    """The common blocks with Fisher samples."""

    @classmethod
    def of(cls, terms: dict[str, Stats], weights: dict[str, float], layout: Layout, which: Which = True) -> SumStats:
        """Add the statistics of the terms."""
        loss = torch.stack([weights[name] * stats.loss for name, stats in terms.items()]).sum()
        outputs = torch.cat([stats.outputs.flatten() for stats in terms.values()])
        checks: dict[str, Tensor] = {}
        for stats in terms.values():
            checks = masked.all_true(checks, stats.checks)
        context = {name: stats.context for name, stats in terms.items()} if layout.has_context else ()
        n = sum(stats.examples for stats in terms.values())
        losses = torch.cat([weights[name] * n / stats.examples * stats.losses for name, stats in terms.items()])
        return cls(loss, outputs, context, {}, checks, layout, {}, losses, terms=terms, weights=weights, which=which)

    @property
    def examples(self) -> int:
        """The number of examples of all terms."""
        return sum(stats.examples for stats in self.terms.values())

    @property
    def sampled(self) -> Which:
        """The common blocks with Fisher samples: all, none, or those with these keys."""
        return self.which

    @property
    def coefficients(self) -> Float[Tensor, "s n"] | None:
        """The c of the gradient `1/N Σ c_sn W_sn` in the per-example gradients of `taps`; None if it is not known."""
        parts: list[Tensor] = []
        for name, stats in self.terms.items():
            own = stats.coefficients
            if own is None or len(own) != len(parts[0] if parts else own):  # terms with other numbers of columns
                return None
            parts.append(own * self._share(name) ** 0.5)  # the loss tap has the whole factor, `lazy_tap` its root
        return torch.cat(parts, 1)

    def lazy_tap(self, key: str) -> AnyTap:
        """Return the block's tap: the examples of all terms, scaled so that its Fisher is the weighted sum."""
        taps = {name: self._term_tap(name, key, Stats.lazy_tap) for name in self.terms}
        layers = (layer for stats in self.terms.values() for layer in stats.layers.values())
        samples = max(layer.grads[0].shape[0] for layer in layers if layer.grads)
        return JoinedTap(tuple(taps.values()), tuple(self._share(name) ** 0.5 for name in taps), samples)

    def lazy_loss_tap(self, key: str) -> AnyTap:
        """Return the block's tap for the targets of all terms, whose mean over examples is the gradient."""
        taps = {name: self._term_tap(name, key, Stats.lazy_loss_tap) for name in self.terms}
        return JoinedTap(tuple(taps.values()), tuple(self._share(name) for name in taps), 1)

    def gradient(self, key: str) -> Matrix:
        """Return the gradient of the loss for one block, as its matrix."""
        whole = self.layout.block(key)
        values: Tree = {}
        for name, stats in self.terms.items():
            for block in _touching(stats.layout, whole.names):
                for parameter, grad in block.tensors(stats.gradient(block.key)).items():
                    grad = self.weights[name] * grad
                    values[parameter] = values[parameter] + grad if parameter in values else grad
        like, shapes = next(iter(values.values())), dict(self.layout.shapes)
        return whole.matrix({name: values.get(name, like.new_zeros(shapes[name])) for name in whole.names})

    def _share(self, name: str) -> float:
        """Return w N / N_i, the factor of a term's examples in the mean over the N of all terms."""
        return self.weights[name] * self.examples / self.terms[name].examples

    def _term_tap(self, name: str, key: str, tap_of: Any) -> AnyTap:
        """Return the tap of a term for a common block."""
        stats, whole = self.terms[name], self.layout.block(key)
        blocks = _touching(stats.layout, whole.names)
        if not blocks:
            return silent_tap(Shape(*whole.shape, whole.family.one_hot), stats.examples, stats.outputs)
        block = blocks[0]
        tap: AnyTap = tap_of(stats, block.key)
        if _serves(whole, blocks):
            if block.bias == whole.bias:
                return tap
            own = tap.whole()
            return Tap(rows.with_column(own.a, 0.0), own.g)  # a bias that this term does not have
        # a fallback: its part of the block's per-example gradients
        g = torch.vmap(torch.vmap(lambda one: block.tensors(one)[whole.weight]))(example_matrices(tap))
        return lazy(whole, (g.new_ones(g.shape[1]),), (g,))


def _flatten(stats: SumStats) -> tuple[list[Any], Any]:
    leaves = [stats.loss, stats.outputs, stats.context, stats.layers, stats.checks, stats.plain, stats.losses]
    return [*leaves, stats.terms], (stats.layout, tuple(stats.weights.items()), stats.which)


def _unflatten(children: list[Any], facts: Any) -> SumStats:
    loss, outputs, context, layers, checks, plain, losses, terms = children
    return SumStats(
        loss,
        outputs,
        context,
        layers,
        checks,
        facts[0],
        plain,
        losses,
        terms=terms,
        weights=dict(facts[1]),
        which=facts[2],
    )


tree.register(SumStats, _flatten, _unflatten)
