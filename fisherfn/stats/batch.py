"""The arguments of `ng.stats`, checked once against the build: batch, context, noise, kind and number of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Size, Tensor

from fisherfn import tree
from fisherfn.errors import EmptyBatchError, ShapeError, StructureError, expect, expect_count, unknown
from fisherfn.stats.layout import Layout
from fisherfn.types import PyTree

Batch: TypeAlias = Sequence[Any] | Mapping[str, Any]
"""Inputs and targets: a tuple, or a list as data loaders return it; for a sum of terms, a dict of them by term."""

FISHERS = ("mc", "type2", "empirical")


class Checked(NamedTuple):
    """A batch that fits the build: inputs, targets, context (`()` for none) and the number of examples."""

    x: PyTree
    y: PyTree
    context: PyTree
    examples: int


def pair(batch: Batch) -> tuple[PyTree, PyTree]:
    """Split a batch into inputs and targets."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        found = f"{len(batch)} entries" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise StructureError(
            f"a batch is (inputs, targets), got {found}. Pass several inputs as ((x1, x2), y), or a dict and targets: "
            'labels = batch.pop("labels"), then (batch, labels).'
        )
    return tree.plain(batch[0]), batch[1]


def checked(layout: Layout, batch: Batch, context: PyTree) -> Checked:
    """Return the batch with the context of the build, or raise the error that says what does not fit."""
    x, y = pair(batch)
    context = checked_context(layout, context)
    return Checked(x, y, context, count_examples(layout, x, y, context))


def checked_context(layout: Layout, context: PyTree) -> PyTree:
    """Return the context, `()` for none; raise unless there is one exactly if the build had one."""
    if layout.has_context != (context is not None):
        given, expected = ("no context", "with one") if layout.has_context else ("a context", "without")
        raise StructureError(f"{given} was given, but the build was {expected}: pass context= to both or to neither.")
    return () if context is None else context


def count_examples(layout: Layout, x: PyTree, y: PyTree = (), context: PyTree = None) -> int:
    """Return the number of examples; raise unless inputs, targets and the context's entries per example fit."""
    inputs = tree.leaves(x)
    for leaf in inputs:
        expect(leaf, Tensor, "an input", "pass tensors with a leading axis of examples")
    shapes = tuple(leaf.shape[1:] for leaf in inputs)
    if shapes != layout.input_shapes or any(leaf.ndim == 0 for leaf in inputs):
        raise ShapeError(
            f"the batch's examples have shape {[tuple(s) for s in shapes]}, traced with "
            f"{[tuple(s) for s in layout.input_shapes]}. Reshape the inputs, or build with such inputs."
        )
    sizes = {
        leaf.shape[0] for leaf in [*inputs, *(leaf for leaf in tree.leaves(y) if isinstance(leaf, Tensor))] if leaf.ndim
    }
    if len(sizes) != 1:
        raise ShapeError(f"inputs and targets differ in their number of examples: {sorted(sizes)}.")
    examples = sizes.pop()
    if context is not None:
        check_entries(layout, context, examples)
    if examples == 0:
        raise EmptyBatchError("the batch has no examples: its mean does not exist. Skip empty batches.")
    return int(examples)


def check_entries(layout: Layout, context: PyTree, examples: int) -> None:
    """Raise unless the leaves of the context with one entry per example have as many as there are examples."""
    pairs = zip(tree.leaves(context), layout.by_example(context), strict=True)
    own = {leaf.shape[0] for leaf, mine in pairs if mine}
    for path in layout.context_unclear:
        entries = tree.flatten(context)[path].shape[:1]
        if entries != (1,):
            raise ShapeError(
                f"context[{path!r}] has {entries.numel()} entries. The build had one example and one entry, which does "
                "not show whether there is one per example: build with two or more examples."
            )
    if not own <= {examples}:
        raise ShapeError(
            f"the context has entries for {sorted(own)} examples (dropout noise?), the batch has [{examples}]: "
            "sample them for this batch."
        )


def check_noise(noise: Tensor, examples: int, samples: int | None, entries: Size | None) -> None:
    """Raise unless the noise is indexed by example, then by sample, and has the entries of one sample.

    There are as many samples as `samples`, or any number for None; `entries` is the shape of one, None if unknown.
    """
    expect(noise, Tensor, "noise", "make it with ng.noise(batch, generator)")
    fits = noise.ndim >= 2 and noise.shape[0] == examples and noise.shape[1] >= 1
    entries = noise.shape[2:] if entries is None else entries
    fits = fits and noise.shape[2:] == entries
    if not fits or (samples is not None and noise.shape[1] != samples):
        expected = ", ".join(map(str, [examples, "S" if samples is None else samples, *entries]))
        raise ShapeError(
            f"noise has shape {list(noise.shape)}, expected [{expected}]: random numbers for each example and sample. "
            "Make it with ng.noise(batch, generator) for this very batch, or take the matching slice."
        )


def check_fisher(fisher: str) -> None:
    """Raise unless there is a Fisher of this kind."""
    if fisher not in FISHERS:
        raise unknown("fisher", fisher, FISHERS)


def check_samples(samples: int) -> None:
    """Raise unless this is a number of samples."""
    expect_count("samples", samples)
