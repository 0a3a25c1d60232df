"""Statistics of a batch in chunks of a few examples, to limit memory; joined, they equal those of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from fisherfn import masked, tree
from fisherfn.errors import BATCH_CHECKS, EmptyBatchError, StructureError, expect
from fisherfn.stats.layout import Layout
from fisherfn.stats.statistics import LayerStats, Stats
from fisherfn.types import PyTree


def in_chunks(
    part: Callable[[PyTree, Any, Tensor | None, PyTree], Stats],
    layout: Layout,
    x: PyTree,
    y: Any,
    noise: Tensor | None,
    context: PyTree,
    size: int,
    likelihood: Any,
) -> Stats:
    """Compute `part(x, y, noise, context)` for consecutive chunks of `size` examples, and join the results.

    Raises:
        LikelihoodError: the loss couples the examples of different chunks.
    """
    examples = tree.leaves(x)[0].shape[0]
    parts: list[Stats] = []
    for start in range(0, examples, size):
        chunk = slice(start, start + size)
        x_c, y_c = _part((x, y), chunk)
        noise_c = None if noise is None else noise[chunk]
        stats = part(x_c, y_c, noise_c, window(layout, context, chunk))
        parts.append(stats)
        # running statistics continue from chunk to chunk; noise per example keeps its place
        context = _carry(layout, context, stats.context)
    joined = join(parts)
    joined.checks["chunks"] = _separate(likelihood, joined.outputs, y, size)
    return replace(joined, context=_join_contexts(layout, [stats.context for stats in parts]))


def _separate(likelihood: Any, outputs: Tensor, y: Any, size: int) -> Bool[Tensor, ""]:
    """Return `independent`, and raise if it is false.

    Raises:
        LikelihoodError: the losses differ. Under `torch.vmap` or in a trace, where values cannot be read, the returned
            mask is false instead.
    """
    mask = independent(likelihood, outputs, y, size)
    if masked.is_concrete(mask) and not mask:
        error, text = BATCH_CHECKS["chunks"]
        raise error(f"{text}.")
    return mask


def independent(likelihood: Any, outputs: Tensor, y: Any, size: int) -> Bool[Tensor, ""]:
    """Return True if examples have the same loss in two chunks as in both joined; the model is not run for this."""

    def nll(part: slice) -> Tensor:
        found: Tensor = likelihood.nll(outputs[part], _part(y, part))
        return found

    with torch.no_grad():
        joined, alone = nll(slice(2 * size)), torch.cat([nll(slice(size)), nll(slice(size, 2 * size))])
    finite = torch.isfinite(joined) & torch.isfinite(alone)  # another check reports losses that are not finite
    sizes = torch.where(finite, joined.abs() + alone.abs(), 0.0)
    same = ~finite | ((joined - alone).abs() <= torch.finfo(joined.dtype).eps ** 0.5 * sizes.amax())
    mask: Tensor = same.all()
    return mask


def _part(leaves: PyTree, examples: slice) -> PyTree:
    """Return a slice of examples; numbers and 0-d tensors, which all examples share, stay."""
    return tree.map(lambda leaf: leaf[examples] if isinstance(leaf, Tensor) and leaf.ndim else leaf, leaves)


def window(layout: Layout, context: PyTree, examples: slice | Tensor) -> PyTree:
    """Return the context of some examples, a slice or positions: leaves with one entry per example are indexed."""
    pairs = zip(tree.leaves(context), layout.by_example(context), strict=True)
    return tree.replace_leaves(context, [leaf[examples] if mine else leaf for leaf, mine in pairs])


def _carry(layout: Layout, whole: PyTree, new: PyTree) -> PyTree:
    """Return the context for the next chunk: leaves as this chunk left them, except those with entries per example."""
    moved = tree.flatten(new)
    pairs = zip(tree.flatten(whole).items(), layout.by_example(whole), strict=True)
    return tree.replace_leaves(whole, [old if mine else moved.get(path, old) for (path, old), mine in pairs])


def _join_contexts(layout: Layout, parts: Sequence[PyTree]) -> PyTree:
    """Join the contexts of consecutive chunks: the last one, with entries per example concatenated."""
    mine = dict(layout.context_by_example)
    flat = [tree.flatten(part) for part in parts]
    leaves = [torch.cat([part[path] for part in flat]) if mine.get(path) else last for path, last in flat[-1].items()]
    return tree.replace_leaves(parts[-1], leaves)


def join(chunks: Iterable[Stats]) -> Stats:
    """Join the statistics of parts of a batch, of any sizes, into those of the whole batch.

    The context is that of the last part.

    Raises:
        EmptyBatchError: there is no part.
        StructureError: the parts are of different nets or kinds, or have different numbers of samples.
    """
    wanted = "pass a list with what ng.stats returned for each microbatch"
    if isinstance(chunks, Stats):
        raise StructureError(f"one Stats is no list of parts: {wanted}.")
    expect(chunks, Iterable, "the statistics to join", wanted)
    chunks = list(chunks)
    for chunk in chunks:
        expect(chunk, Stats, "statistics", wanted)
    if not chunks:
        raise EmptyBatchError("there are no statistics to join: pass what ng.stats returned for each microbatch.")
    first = chunks[0]
    kinds = {(type(chunk), chunk.layout.shapes, tuple(chunk.plain), chunk.empirical, chunk.sampled) for chunk in chunks}
    samples = {tuple(tuple(len(g) for g in layer.grads) for layer in chunk.layers.values()) for chunk in chunks}
    if len(samples) > 1 and len(kinds) == 1:
        raise StructureError(
            "the statistics have different numbers of samples per example: collect all with one fisher and one samples."
        )
    if kinds - {(Stats, first.layout.shapes, tuple(first.plain), first.empirical, first.sampled)}:
        raise StructureError(
            "the statistics are of different nets or kinds, or reduced over ranks already: join what one ng.stats "
            "returned; on several ranks ng.local.stats, and then pass the result to ng.reduced."
        )
    parts = [(chunk.examples, chunk) for chunk in chunks]
    total = sum(size for size, _ in parts)
    loss = torch.stack([size / total * chunk.loss for size, chunk in parts]).sum()
    layers = {}
    for key in first.layers:
        inputs, grads, loss_grads = zip(*(chunk.layers[key] for chunk in chunks), strict=True)
        layers[key] = LayerStats(_cat(inputs, 0), _cat(grads, 1), _cat(loss_grads, 0))
    checks: dict[str, Tensor] = {}
    for chunk in chunks:
        checks = masked.all_true(checks, chunk.checks)
    outputs = torch.cat([chunk.outputs for chunk in chunks])
    plain = {
        name: torch.stack([size / total * chunk.plain[name] for size, chunk in parts]).sum(0) for name in first.plain
    }
    losses = torch.cat([chunk.losses for chunk in chunks])
    known = [chunk.residuals for chunk in chunks if isinstance(chunk.residuals, Tensor)]
    residuals = torch.cat(known, 1) if len(known) == len(chunks) else ()
    own = first.empirical, residuals
    return Stats(loss, outputs, chunks[-1].context, layers, checks, first.layout, plain, losses, *own)


def _cat(parts: Sequence[tuple[Tensor, ...]], axis: int) -> tuple[Tensor, ...]:
    return tuple(torch.cat(use, axis) for use in zip(*parts, strict=True))
