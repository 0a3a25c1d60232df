"""One trace of a model: find its layers, check by numbers that the taps give the gradients, let the rest fall back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import vjp

from fisherfn import tree
from fisherfn.errors import CoverageError, EmptyBatchError, ShapeError, StructureError, UnusedParameterError
from fisherfn.layers import FallbackFacts
from fisherfn.stats.collect import example_gradients, tapped_run
from fisherfn.stats.functional import run
from fisherfn.stats.intercept import Intercept
from fisherfn.stats.layout import Block, Layout, Use
from fisherfn.stats.statistics import gradient, make_tap
from fisherfn.types import Model, PyTree, Tap, Tree

FALLBACK_EXAMPLES = 4
"""Examples on which the fallback's per-example gradients are checked at build: enough to see a coupling."""


def build(model: Model, params: Tree, x: PyTree, context: PyTree) -> Layout:
    """The layout of `model`: every parameter in exactly one block.

    Raises:
        UnusedParameterError: a parameter does not reach the outputs.
        CoverageError: a parameter's per-example gradients do not add up to its gradient, in no layer and not alone.
    """
    examples = _validate(params, x)
    outputs, mode = _trace(model, params, x, context, examples)
    strange = _other_first_axes(model, params, x, context, examples)
    _all_used(model, params, x, context)
    cotangent = _cotangent(outputs)
    truth = _gradients(model, params, x, context, cotangent)
    candidates, why = _candidates(mode, params, strange)

    def layout(blocks: tuple[Block, ...]) -> Layout:
        shapes = tuple((name, p.shape) for name, p in params.items())
        inputs = tuple(leaf.shape[1:] for leaf in tree.leaves(x))
        has_context = not (isinstance(context, tuple) and context == ())
        dtypes = tuple(p.dtype for p in params.values())
        return Layout(blocks, shapes, inputs, outputs.shape[1:], dtypes, outputs.dtype, has_context)

    kept, reasons = _verify(model, layout(tuple(candidates)), params, x, context, cotangent, truth, mode.couples)
    blocks = _with_fallbacks(kept, params, why | reasons)
    complete = layout(blocks)
    _verify_fallbacks(model, complete, params, x, context, cotangent)
    return complete


def _validate(params: Tree, x: PyTree) -> int:
    if not isinstance(params, Mapping) or not params:
        raise StructureError("params must be a non-empty dict {name: tensor}, as from net.named_parameters().")
    for name, p in params.items():
        if not isinstance(p, Tensor) or not p.is_floating_point():
            raise StructureError(
                f"params[{name!r}] must be a floating-point tensor, got {getattr(p, 'dtype', type(p))}."
            )
    leaves = tree.leaves(x)
    if not leaves or not all(isinstance(leaf, Tensor) and leaf.ndim > 0 for leaf in leaves):
        raise ShapeError("example inputs must be tensors with a leading axis of examples.")
    if leaves[0].shape[0] == 0:
        raise EmptyBatchError("the example inputs are empty: one trace needs at least one example.")
    return int(leaves[0].shape[0])


def _trace(model: Model, params: Tree, x: PyTree, context: PyTree, examples: int) -> tuple[Tensor, Intercept]:
    with torch.no_grad(), Intercept(params) as mode:
        outputs, _ = run(model, params, x, context)
    if not isinstance(outputs, Tensor) or outputs.ndim == 0 or outputs.shape[0] != examples:
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ShapeError(f"the model must return one tensor [N, …] for N = {examples} examples, got {found}.")
    return outputs, mode


def _other_first_axes(model: Model, params: Tree, x: PyTree, context: PyTree, examples: int) -> set[str]:
    """Weights of layers whose first axis only happens to have size N: with one example more it does not grow by one."""
    more = tree.map(lambda leaf: torch.cat([leaf, leaf[:1]]), x)
    try:
        _, other = _trace(model, params, more, context, examples + 1)
    except RuntimeError as error:
        raise ShapeError(
            f"the model runs on {examples} examples and not on {examples + 1}: {str(error).splitlines()[0]} "
            "It must take any number of examples; look for a batch size written into a reshape."
        ) from error
    wanted = {examples + 1}
    return {
        name
        for name, records in other.records.items()
        if {r.call.input.shape[0] for r in records} | {r.output.shape[0] for r in records} != wanted
    }


def _all_used(model: Model, params: Tree, x: PyTree, context: PyTree) -> None:
    with torch.enable_grad():
        leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
        outputs, _ = run(model, leaves, x, context)
        grads: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if outputs.requires_grad:
            grads = torch.autograd.grad(outputs.sum(), list(leaves.values()), allow_unused=True)
    unused = [name for name, g in zip(leaves, grads, strict=True) if g is None]
    if unused:
        raise UnusedParameterError(
            f"the model's outputs do not depend on {', '.join(map(repr, unused))}: leave these out of params "
            "(they have no gradient and no curvature), or check that the model reads them from its params argument."
        )


def _cotangent(outputs: Tensor) -> Tensor:
    """A fixed generic cotangent: whatever agrees on it agrees."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)


def _gradients(model: Model, params: Tree, x: PyTree, context: PyTree, cotangent: Tensor) -> Tree:
    _, pull = vjp(lambda p: run(model, p, x, context)[0], dict(params))  # type: ignore[misc]
    grads: Tree = pull(cotangent)[0]
    return grads


def _candidates(mode: Intercept, params: Tree, strange: set[str]) -> tuple[list[Block], dict[str, str]]:
    """A block for each weight that some layer family saw, and why some of them cannot be one."""
    blocks: list[Block] = []
    why: dict[str, str] = {}
    claimed = set(mode.other_uses)
    for name in (n for n in params if n in mode.records):
        uses = mode.records[name]
        biases = {r.bias for r in uses if r.bias is not None}
        if name in strange:
            why |= dict.fromkeys({name, *biases}, f"{uses[0].kind} layer whose first axis is not the example's")
            continue
        if name in mode.other_uses:
            why |= dict.fromkeys({name, *biases}, f"{uses[0].kind} layer of {name!r} is used in other ways too")
            continue
        why |= dict.fromkeys(biases & mode.other_uses, f"bias of {name!r} that is used in other ways too")
        bias = next((r.bias for r in uses if r.bias is not None and r.bias not in claimed), None)
        claimed |= {bias} if bias is not None else set()
        block_uses = tuple(Use(r.call.facts, r.output.shape[1:], bias is not None and r.bias == bias) for r in uses)
        times = f", used {len(uses)} times" if len(uses) > 1 else ""
        shared = uses[0].output.shape[1:-1].numel()
        over = f", {shared} shared positions" if shared > 1 else ""
        key = name.rpartition(".")[0] or name
        blocks.append(
            Block(key, uses[0].kind, name, params[name].shape, bias, block_uses, f"seen in the trace{times}{over}")
        )
    return blocks, why


def _verify(
    model: Model,
    layout: Layout,
    params: Tree,
    x: PyTree,
    context: PyTree,
    cotangent: Tensor,
    truth: Tree,
    couples: bool,
) -> tuple[list[Block], dict[str, str]]:
    """Keep the blocks whose taps give autograd's gradients, example by example."""
    _, pull, inputs, _ = tapped_run(model, layout, params, x, context)
    grads = pull(cotangent)
    first = torch.zeros_like(cotangent)
    first[0] = cotangent[0]
    leaks = pull(first)
    kept: list[Block] = []
    why: dict[str, str] = {}
    for block in layout.blocks:
        tap = make_tap(block, inputs[block.weight], [g.unsqueeze(0) for g in grads[block.weight]])
        found = block.tensors(gradient(tap))
        scale = block.tensors(gradient(Tap(tap.a.abs(), tap.g.abs())))
        examples = tap.a.shape[1]
        wrong = [n for n in block.names if not _close(found[n] * examples, truth[n], scale[n] * examples)]
        leak = any(bool(g[1:].abs().max() > 0) for g in leaks[block.weight] if g.shape[0] > 1)
        if leak and not couples:  # batch norm in training mode mixes examples by design
            why |= dict.fromkeys(block.names, f"{block.kind} layer whose rows mix examples")
        elif block.weight in wrong:
            why |= dict.fromkeys(block.names, f"{block.kind} layer of {block.weight!r} is used in other ways too")
        elif wrong:
            why[str(block.bias)] = f"bias of {block.weight!r} that is used in other ways too"
            uses = tuple(use._replace(biased=False) for use in block.uses)
            kept.append(Block(block.key, block.kind, block.weight, block.weight_shape, None, uses, block.why))
        else:
            kept.append(block)
    return kept, why


def _close(found: Tensor, truth: Tensor, scale: Tensor) -> bool:
    """Agreement to the working precision of the sum's terms (`scale`: the sum of their sizes), far from a missing one.

    The sum itself may vanish: a bias before a batch norm has no gradient.
    """
    tolerance = 5 * torch.finfo(truth.dtype).eps ** 0.5
    return bool((found - truth).norm() <= tolerance * scale.norm())


def _with_fallbacks(layers: list[Block], params: Tree, why: dict[str, str]) -> tuple[Block, ...]:
    """Every parameter in one block, in params order; one that is in no layer falls back."""
    by_weight = {block.weight: block for block in layers}
    covered = {name for block in layers for name in block.names}
    blocks: list[Block] = []
    for name, p in params.items():
        if name in by_weight:
            blocks.append(by_weight[name])
        elif name not in covered:
            facts = FallbackFacts(p.shape)
            form = "one dense block" if facts.dense else "a block for each entry"
            reason = f"{why.get(name, 'no layer family claims it')}; {form}"
            blocks.append(Block(name, "fallback", name, p.shape, None, (Use(facts, p.shape, False),), reason))
    return _unique_keys(blocks)


def _unique_keys(blocks: list[Block]) -> tuple[Block, ...]:
    keys = [block.key for block in blocks]
    clash = {key for key in keys if keys.count(key) > 1}
    return tuple(
        Block(b.weight, b.kind, b.weight, b.weight_shape, b.bias, b.uses, b.why) if b.key in clash else b
        for b in blocks
    )


def _verify_fallbacks(
    model: Model, layout: Layout, params: Tree, x: PyTree, context: PyTree, cotangent: Tensor
) -> None:
    """Per-example gradients of the fallback must add up to the gradient, or the examples are coupled."""
    names = [block.weight for block in layout.fallbacks]
    if not names:
        return
    few = torch.zeros_like(cotangent)
    few[:FALLBACK_EXAMPLES] = cotangent[:FALLBACK_EXAMPLES]
    truth = _gradients(model, params, x, context, few)
    part = tree.map(lambda leaf: leaf[:FALLBACK_EXAMPLES], x)
    try:
        singles = example_gradients(model, params, names, part, context, cotangent[None, :FALLBACK_EXAMPLES])
    except (RuntimeError, ValueError) as error:
        listed = "; ".join(f"{block.weight!r} ({block.why})" for block in layout.fallbacks)
        raise CoverageError(
            f"{listed}: these need per-example gradients, and the model cannot run on single examples under vmap: "
            f"{str(error).splitlines()[0]} Common causes: batch norm in training mode (call net.eval(), or pass its "
            "buffers as context), dropout (draw its noise outside), branches on values."
        ) from error
    for name in names:
        if not _close(singles[name][0].sum(0), truth[name], singles[name][0].abs().sum(0)):
            raise CoverageError(
                f"the per-example gradients of {name!r} do not add up to its gradient: the model couples the examples "
                "of a batch (batch norm in training mode?). Call net.eval(), or keep this parameter out of params."
            )
