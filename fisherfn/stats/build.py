"""One trace of a model: find its layers, check by numbers that the taps give the gradients, let the rest fall back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Size, Tensor
from torch.func import vmap

from fisherfn import rows, tree
from fisherfn.errors import (
    CoverageError,
    EmptyBatchError,
    NoiseError,
    ShapeError,
    StructureError,
    UnusedParameterError,
    unknown,
)
from fisherfn.layers import COPIED
from fisherfn.stats.border import border, brief, listed, with_line
from fisherfn.stats.candidates import candidates
from fisherfn.stats.fallbacks import in_double, verify_fallbacks, with_fallbacks, without_fallbacks
from fisherfn.stats.functional import call, run
from fisherfn.stats.intercept import Intercept, Taps
from fisherfn.stats.layout import Block, Layout
from fisherfn.stats.numbers import close, cotangent_of, gradients
from fisherfn.stats.runs import tapped_run
from fisherfn.stats.scout import Scout
from fisherfn.stats.statistics import lazy
from fisherfn.taps import LazyTap
from fisherfn.types import Model, PyTree, Tree

FEW = 4
"""Examples that a build is made with, where they are enough: its cost then does not grow with the batch."""


@border()
def build(
    model: Model, params: Tree, x: PyTree, context: PyTree, *, unused: str = "raise", uncovered: str = "fallback"
) -> Layout:
    """The layout of `model`: every parameter in exactly one block, or unused where `unused` is "ignore".

    Where `uncovered` is "gradient", a parameter that no layer covers is in no block either.

    Raises:
        UnusedParameterError: a parameter does not reach the outputs.
        CoverageError: a parameter's per-example gradients do not add up to its gradient, in no layer and not alone.
    """
    if not callable(model):
        raise StructureError(f"model cannot be {type(model).__name__}: pass a function (params, x) -> outputs.")
    if unused not in ("raise", "ignore"):
        raise unknown("unused", unused, ("raise", "ignore"))
    if uncovered not in ("fallback", "gradient"):
        raise unknown("uncovered", uncovered, ("fallback", "gradient"))
    examples = _validate(params, x)
    if examples > FEW:
        try:
            return _build(model, params, *_few(x, context), unused, uncovered, whole=(x, context))
        except (RuntimeError, ValueError):  # what some examples do not show, or cannot do, all may
            pass
    return _build(model, params, x, context, unused, uncovered)


class _TooFewError(ValueError):
    """Some examples do not show what all do."""


def _few(x: PyTree, context: PyTree) -> tuple[PyTree, PyTree]:
    """A few examples with their dropout seeds: what a build costs need not grow with the batch.

    They lie all over it: a model may take another path where some are padded.
    """
    chosen = torch.linspace(0, tree.leaves(x)[0].shape[0] - 1, FEW).long()
    seeded = [path.partition("/")[0] == "dropout" for path in tree.flatten(context)]
    pairs = zip(tree.leaves(context), seeded, strict=True)
    return tree.map(lambda leaf: leaf[chosen], x), tree.replace_leaves(
        context, [leaf[chosen] if mine else leaf for leaf, mine in pairs]
    )


def _build(
    model: Model,
    params: Tree,
    x: PyTree,
    context: PyTree,
    unused: str,
    uncovered: str,
    whole: tuple[PyTree, PyTree] | None = None,
) -> Layout:
    """`build` with these examples; those of `whole` say what they leave unused."""
    examples = tree.leaves(x)[0].shape[0]
    outputs, mode = _trace(model, params, x, context, examples)
    scout, more, by_example = _trace_one_more(model, params, x, context, outputs, mode)
    left = _unused(model, params, x, context)
    if left and whole is not None and _unused(model, params, *whole) != left:
        raise _TooFewError("some parameters are used by other examples only")
    if len(left) == len(params):
        raise UnusedParameterError(
            "the model's outputs depend on none of the parameters: its forward runs under torch.no_grad() or "
            "torch.inference_mode(), detaches, or reads its parameters from elsewhere than the params argument. "
            "Remove that from the forward."
        )
    if left and unused == "raise":
        raise UnusedParameterError(
            f"the model's outputs do not depend on {listed(left)}: "
            "leave these out of params (they have no gradient and no curvature), build with "
            'unused="ignore", or check that the model reads them from its params argument.'
        )
    used = {name: p for name, p in params.items() if name not in left}
    found, why = candidates(mode, more, scout, used, examples)
    tolerance = _tolerance(mode, outputs)
    if any(by_example) and not more.couples:
        _stands_alone(model, params, x, context, outputs, by_example, tolerance)
    if examples == 1:  # a single one shows neither order nor coupling
        x, context = _and_another(x), _grown_context(context, by_example)
        outputs, _ = _trace(model, params, x, context, 2)
    cotangent = cotangent_of(outputs)
    truth = gradients(model, params, x, context, cotangent)

    def layout(blocks: tuple[Block, ...], plain: tuple[tuple[str, str], ...] = ()) -> Layout:
        return Layout(
            blocks,
            shapes=tuple((name, p.shape) for name, p in params.items()),
            input_shapes=tuple(leaf.shape[1:] for leaf in tree.leaves(x)),
            output_shape=outputs.shape[1:],
            dtypes=tuple(p.dtype for p in params.values()),
            output_dtype=outputs.dtype,
            has_context=not (isinstance(context, tuple) and context == ()),
            context_by_example=tuple(zip(tree.flatten(context), by_example, strict=True)),
            couples=more.couples,
            unused=tuple(left),
            uncovered=plain,
            steps=tuple(scout.steps),
        )

    kept, reasons = _verify(model, layout(tuple(found)), params, x, context, cotangent, truth, more.couples, tolerance)
    if uncovered == "gradient":
        return layout(*without_fallbacks(kept, used, why | reasons))
    complete = layout(with_fallbacks(kept, used, why | reasons))
    try:
        return verify_fallbacks(model, complete, params, x, context, cotangent, tolerance)
    except CoverageError:
        checked = in_double(model, complete, params, x, context, cotangent)
        if checked is None:
            raise
        return checked


def _validate(params: Tree, x: PyTree) -> int:
    if not isinstance(params, Mapping) or not params:
        raise StructureError("params must be a non-empty dict {name: tensor}, as from net.named_parameters().")
    for name, p in params.items():
        if not isinstance(p, Tensor) or not p.is_floating_point():
            raise StructureError(
                f"params[{name!r}] must be a real floating-point tensor, got {getattr(p, 'dtype', type(p))}. A complex "
                "one is written as two real ones, or as torch.view_as_complex of a real parameter."
            )
    leaves = tree.leaves(x)
    if not leaves or not all(isinstance(leaf, Tensor) and leaf.ndim > 0 for leaf in leaves):
        raise ShapeError("example inputs must be tensors with a leading axis of examples.")
    if leaves[0].shape[0] == 0:
        raise EmptyBatchError("the example inputs are empty: one trace needs at least one example.")
    return int(leaves[0].shape[0])


def _trace(
    model: Model, params: Tree, x: PyTree, context: PyTree, examples: int, scout: Scout | None = None
) -> tuple[Tensor, Intercept]:
    before = _global_generators(params)
    x = tree.map(torch.clone, x)  # a model that changes its inputs is refused, and they stay as they were
    with torch.no_grad(), Intercept(params, shared=scout) as mode:
        outputs, _ = call(model, params, x, context)
    after = _global_generators(params)
    if not all(torch.equal(before[device], after[device]) for device in before):
        _restore(before)
        raise NoiseError(
            "the model draws from the global generator: a gradient would not be a function of its arguments. Draw its "
            "noise outside, and pass it as an input like x or in the context."
        )
    if not isinstance(outputs, Tensor) or outputs.ndim == 0 or outputs.shape[0] != examples:
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ShapeError(
            f"the model must return one tensor [N, …] for N = {examples} examples, got {found}: return what the "
            "likelihood takes, or wrap the net in one that does (an object with .logits is taken as it is)."
        )
    if outputs.is_complex():
        raise ShapeError(
            f"the model's outputs are {outputs.dtype}, and gradients are taken of real numbers: return "
            "torch.view_as_real(outputs), and write the likelihood for real and imaginary parts."
        )
    return outputs, mode


def _global_generators(params: Tree) -> dict[torch.device, Tensor]:
    """States of the global generators that a model might draw from: the CPU's, and that of the parameters' GPU."""
    states = {torch.device("cpu"): torch.get_rng_state()}
    device = next(iter(params.values())).device
    return states | ({device: torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _restore(generators: dict[torch.device, Tensor]) -> None:
    for device, state in generators.items():
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)


def _trace_one_more(
    model: Model, params: Tree, x: PyTree, context: PyTree, outputs: Tensor, mode: Intercept
) -> tuple[Scout, Intercept, tuple[bool, ...]]:
    """A second trace with one example more shows where the examples are, also in the context, and what has none.

    What it has for each example (dropout noise) must grow with the batch, so the trace fails until it does.
    """
    leaves, examples = tree.leaves(context), outputs.shape[0]
    seeds = tuple(path.partition("/")[0] == "dropout" for path in tree.flatten(context))
    alike = tuple(isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == examples for leaf in leaves)
    more = tree.map(_one_more, x)
    first: Exception | None = None
    for grown in dict.fromkeys([seeds, alike]):
        scout = Scout(mode.trace, examples)
        try:
            longer, second = _trace(model, params, more, _grown_context(context, grown), examples + 1, scout)
            return scout, _of_examples(outputs, longer, second), grown
        except (RuntimeError, ShapeError) as error:
            first = first or error
    if isinstance(first, _Square):
        raise first
    assert first is not None
    text = (
        f"the model runs on {examples} examples and not on {examples + 1}: {brief(first)} It must take any number of "
        "examples: look for a batch size written into a reshape (write x.flatten(1), or -1 for it), or for a context "
        f"of which some entries only happen to be {examples}."
    )
    raise ShapeError(with_line(text, first)) from first


class _Square(ShapeError):
    """Outputs with a second axis that follows the batch."""


def _of_examples(outputs: Tensor, longer: Tensor, mode: Intercept) -> Intercept:
    """The trace, if the batch's size shows in the first axis of the outputs alone."""
    if longer.shape[1:] == outputs.shape[1:]:
        return mode
    raise _Square(
        f"the model's outputs are {list(outputs.shape)}, with one example more {list(longer.shape)}: they compare the "
        "examples of the batch (a similarity matrix?) and have no shape per example. Return an embedding for each and "
        'compare them in the likelihood, a function (outputs, targets) -> [N], with fisher="empirical".'
    )


def _tolerance(mode: Intercept, outputs: Tensor) -> float:
    """Of sums that rounding alone separates, for the coarsest precision that any layer computed in.

    Under autocast that is not the parameters'. In half precision a root would let a missing use pass.
    """
    records = [record.output for found in mode.records.values() for record in found]
    eps = max(torch.finfo(output.dtype).eps for output in [outputs, *records])
    return 16 * eps if eps > 1e-5 else 5 * eps**0.5


def _stands_alone(
    model: Model,
    params: Tree,
    x: PyTree,
    context: PyTree,
    outputs: Tensor,
    by_example: tuple[bool, ...],
    tolerance: float,
) -> None:
    """What the context has for the first example is all that this example needs of it."""
    pairs = zip(tree.leaves(context), by_example, strict=True)
    own = tree.replace_leaves(context, [leaf[:1] if mine else leaf for leaf, mine in pairs])
    alone, _ = run(model, params, tree.map(lambda leaf: leaf[:1], x), own)
    if not close(alone, outputs[:1], outputs[:1].abs(), tolerance):
        raise ShapeError(
            "an example's outputs change when it is alone with its part of the context: noise with an entry for each "
            "example (dropout seeds, masks) must be used along the examples' axis, the first one of what is dropped; "
            f"or a leaf of the context only happens to have {outputs.shape[0]} entries: build with another number."
        )


def _grown_context(context: PyTree, grown: tuple[bool, ...]) -> PyTree:
    pairs = zip(tree.leaves(context), grown, strict=True)
    return tree.replace_leaves(context, [_one_more(leaf) if own else leaf for leaf, own in pairs])


def _and_another(x: PyTree) -> PyTree:
    """One example, and another that differs from it: numbers scaled one by one, indices in another order."""

    def other(leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point():
            return leaf.roll(1, -1) if leaf.ndim > 1 else leaf
        generator = torch.Generator().manual_seed(1)
        return leaf * (0.5 + torch.rand(leaf.shape, generator=generator, dtype=torch.float64)).to(leaf)

    return tree.map(lambda leaf: torch.cat([leaf, other(leaf)]), x)


def _one_more(leaf: Tensor) -> Tensor:
    return torch.cat([leaf, leaf[:1]])


def _unused(model: Model, params: Tree, x: PyTree, context: PyTree) -> list[str]:
    """The parameters that the outputs do not depend on."""
    with torch.enable_grad():
        leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
        outputs, _ = run(model, leaves, x, context)
        grads: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if outputs.requires_grad:
            grads = torch.autograd.grad(outputs.sum(), list(leaves.values()), allow_unused=True)
    return [name for name, g in zip(leaves, grads, strict=True) if g is None]


def _verify(
    model: Model,
    layout: Layout,
    params: Tree,
    x: PyTree,
    context: PyTree,
    cotangent: Tensor,
    truth: Tree,
    couples: bool,
    tolerance: float,
) -> tuple[list[Block], dict[str, str]]:
    """Keep the blocks whose taps give autograd's gradients, example by example."""
    _, pull, inputs, _ = tapped_run(model, layout, params, x, context)
    grads = pull(cotangent)
    several = _wrong_together(layout, pull, cotangent, grads)
    if couples:  # what batch norm mixes by design must not hide another mixture
        pull = tapped_run(model, layout, params, x, context, uncoupled=True)[1]
    leaks = pull(_alone(cotangent, 0))
    rearranged = any(use.outer > 1 for block in layout.layers for use in block.uses)
    last = pull(_alone(cotangent, -1)) if rearranged else {}
    kept: list[Block] = []
    why: dict[str, str] = {}
    for block in layout.blocks:
        tap = lazy(block, inputs[block.weight], [g.unsqueeze(0) for g in grads[block.weight]])
        found, scale = (block.tensors(total) for total in _sums(tap))
        wrong = [n for n in block.names if not close(found[n], truth[n], scale[n], tolerance)]
        others = [g[use.repeats :] for use, g in zip(block.uses, leaks[block.weight], strict=True)]
        others += [g[: -use.repeats] for use, g in zip(block.uses, last.get(block.weight, ()), strict=bool(last))]
        leak = any(bool((g != 0).any()) for g in others)
        if block.key in several:
            why |= dict.fromkeys(block.names, "torch.vmap gives other gradients of its call")
        elif leak:
            why |= dict.fromkeys(block.names, f"{block.kind} layer whose rows mix examples")
        elif block.weight in wrong:
            why |= dict.fromkeys(block.names, f"{block.kind} layer of {block.weight!r} is used in other ways too")
        elif wrong:
            why[str(block.bias)] = f"bias of {block.weight!r} that is used in other ways too"
            uses = tuple(use._replace(biased=False) for use in block.uses)
            kept.append(replace(block, bias=None, bias_shape=Size(), uses=uses))
        else:
            kept.append(block)
    return kept, why


def _wrong_together(layout: Layout, pull: Callable[[Tensor], Taps], cotangent: Tensor, grads: Taps) -> set[str]:
    """Find blocks of calls that run once per example, and whose gradients are wrong for several draws at once.

    Some functions (`torch.cdist`) have a wrong derivative under two nested `torch.vmap`.
    """
    copied = [block for block in layout.layers if block.kind == COPIED.name]
    if not copied:
        return set()
    both, second = vmap(pull)(torch.stack([cotangent, cotangent.flip(-1)])), pull(cotangent.flip(-1))
    wrong = set()
    for block in copied:
        (found,), (one,), (two,) = both[block.weight], grads[block.weight], second[block.weight]
        expected = torch.stack([one, two])
        if not close(found, expected, expected, torch.finfo(found.dtype).eps ** 0.5):
            wrong.add(block.key)
    return wrong


def _alone(cotangent: Tensor, example: int) -> Tensor:
    """The part of a cotangent that is one example's."""
    alone = torch.zeros_like(cotangent)
    alone[example] = cotangent[example]
    return alone


def _sums(tap: LazyTap) -> tuple[Tensor, Tensor]:
    """`Σ g aᵀ`, and the same of absolute values: the size of what was added up."""
    sums = sizes = torch.zeros(())
    for part in tap.windows():
        g, a = part.g.squeeze(1), rows.cast(part.a, part.g.dtype)
        sums = sums + rows.outer(g, a)
        sizes = sizes + rows.outer(g.abs(), tree.map(torch.abs, a))
    return sums, sizes
