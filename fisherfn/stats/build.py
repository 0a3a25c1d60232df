"""Build a layout: trace the model, verify the layers numerically, and give every other parameter a fallback."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fisherfn import tree
from fisherfn.errors import CoverageError, ShapeError, UnusedParameterError, unknown
from fisherfn.stats.blocks import Block, Use
from fisherfn.stats.border import border, brief, listed, with_line
from fisherfn.stats.candidates import candidates
from fisherfn.stats.fallbacks import in_double, verify_fallbacks, with_fallbacks, without_fallbacks
from fisherfn.stats.functional import check_model
from fisherfn.stats.intercept import Intercept
from fisherfn.stats.layout import Layout
from fisherfn.stats.numbers import close, cotangent_of
from fisherfn.stats.probe import FEW, Probe
from fisherfn.stats.scout import Scout
from fisherfn.stats.verify import verify
from fisherfn.stats.whole import check_whole
from fisherfn.types import Model, PyTree, Tree, at_least_single


@border()
def build(
    model: Model, params: Tree, x: PyTree, context: PyTree, *, unused: str = "raise", uncovered: str = "fallback"
) -> Layout:
    """Return the layout of a model: every parameter in exactly one block, or unused if `unused` is "ignore".

    If `uncovered` is "gradient", a parameter that no layer covers is in no block either.

    Raises:
        UnusedParameterError: a parameter does not reach the outputs.
        CoverageError: a parameter is in no layer, and its per-example gradients do not add up to its gradient.
        NonFiniteError: the same because of NaN or infinity in parameters or inputs.
    """
    check_model(model, context)
    if unused not in ("raise", "ignore"):
        raise unknown("unused", unused, ("raise", "ignore"))
    if uncovered not in ("fallback", "gradient"):
        raise unknown("uncovered", uncovered, ("fallback", "gradient"))
    if isinstance(params, Mapping):
        check_whole(params)
    whole = Probe(model, params, x, context)
    whole.check()
    whole = whole.apart()
    if whole.examples > FEW:
        try:
            return _in_one_precision(_build(whole.few(), unused, uncovered, whole))
        except (RuntimeError, ValueError):  # all examples may show, or allow, what a few do not
            pass
    try:
        return _in_one_precision(_build(whole, unused, uncovered))
    except CoverageError:
        whole.check_numbers()
        raise


def _in_one_precision(layout: Layout) -> Layout:
    """Give the output-gradients of all layers one type, half precision aside, since methods combine layers."""

    def common(use: Use) -> Use:
        return use if at_least_single(use.dtype) == layout.precision else use._replace(dtype=layout.precision)

    blocks = tuple(replace(block, uses=tuple(common(use) for use in block.uses)) for block in layout.blocks)
    return replace(layout, blocks=blocks)


class _TooFewError(ValueError):
    """A few examples do not show what the whole batch shows."""


def _build(probe: Probe, unused: str, uncovered: str, whole: Probe | None = None) -> Layout:
    """Build a layout from these examples; those of `whole` show which parameters the few leave unused."""
    outputs, first = probe.trace()
    scout, second, by_example = _trace_one_more(probe, outputs, first)
    if not scout.saw_the_same_calls:
        del outputs, first, second, scout  # they hold the activations of two runs
        outputs, first = probe.trace()
        scout, second, by_example = _trace_one_more(probe, outputs, first)
    left = _unused(probe, unused, whole)
    used = {name: p for name, p in probe.params.items() if name not in left}
    blocks, why = candidates(first, second, scout, used, probe.examples)
    tolerance = _tolerance(first, outputs)
    if any(by_example) and not second.couples:
        _check_alone(probe, outputs, by_example, tolerance)
    unclear: tuple[str, ...] = ()
    if probe.examples == 1:  # a single example shows neither order nor coupling
        entries = zip(tree.flatten(probe.context), probe.lengths, by_example, strict=True)
        unclear = tuple(path for path, one, own in entries if one and not own)
        probe = probe.with_another(by_example)
        outputs, _ = probe.trace()
    cotangent = cotangent_of(outputs)
    layout = _layout(probe, outputs, blocks, by_example, second.couples, left, scout)
    unread = tuple(name for name in left if not first.reads(name))
    layout = replace(layout, unread=unread, context_unclear=unclear)
    del first, second, scout  # they hold the activations of two runs
    kept, reasons = verify(probe, layout, cotangent, tolerance)
    if uncovered == "gradient":
        layers, plain = without_fallbacks(kept, used, why | reasons)
        return replace(layout, blocks=layers, uncovered=plain)
    layout = replace(layout, blocks=with_fallbacks(kept, used, why | reasons))
    try:
        return verify_fallbacks(probe, layout, cotangent, tolerance)
    except CoverageError:
        checked = in_double(probe, layout, cotangent)
        if checked is None:
            raise
        return checked


def _layout(
    probe: Probe,
    outputs: Tensor,
    blocks: list[Block],
    by_example: tuple[bool, ...],
    couples: bool,
    unused: list[str],
    scout: Scout,
) -> Layout:
    return Layout(
        tuple(blocks),
        shapes=tuple((name, p.shape) for name, p in probe.params.items()),
        input_shapes=tuple(leaf.shape[1:] for leaf in tree.leaves(probe.x)),
        output_shape=outputs.shape[1:],
        dtypes=tuple(p.dtype for p in probe.params.values()),
        output_dtype=outputs.dtype,
        has_context=not (isinstance(probe.context, tuple) and probe.context == ()),
        context_by_example=tuple(zip(tree.flatten(probe.context), by_example, strict=True)),
        couples=couples,
        unused=tuple(unused),
        steps=tuple(scout.steps),
    )


def _unused(probe: Probe, unused: str, whole: Probe | None) -> list[str]:
    """Return the parameters that the outputs do not depend on; raise if that is an error."""
    left = probe.unused()
    if left and whole is not None and whole.unused() != left:
        raise _TooFewError("some parameters are used by other examples only")
    if len(left) == len(probe.params):
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
    return left


def _trace_one_more(probe: Probe, outputs: Tensor, mode: Intercept) -> tuple[Scout, Intercept, tuple[bool, ...]]:
    """Trace with one example more, to find the axis of the examples in every call and in the context.

    Entries of the context per example (dropout noise) must grow with the batch, so the trace fails until they do.
    """
    examples = probe.examples
    first: Exception | None = None
    for grown in dict.fromkeys([probe.seeds, probe.lengths]):
        scout = Scout(mode.trace, examples)
        try:
            longer, second = probe.one_more(grown).trace(scout)
            return scout, _of_examples(outputs, longer, second), grown
        except (RuntimeError, ShapeError) as error:
            first = first or error
    if isinstance(first, _Square):
        raise first
    assert first is not None
    text = (
        f"the model runs on {examples} examples and not on {examples + 1}: {brief(first)} It must take any number of "
        "examples: look for a batch size written into a reshape (write x.flatten(1), or -1 for it), or for a context "
        f"of which some leaf only happens to have {examples} entries."
    )
    raise ShapeError(with_line(text, first)) from first


class _Square(ShapeError):
    """The outputs have a second axis whose length follows the batch."""


def _of_examples(outputs: Tensor, longer: Tensor, mode: Intercept) -> Intercept:
    """Return the trace, if only the first axis of the outputs depends on the number of examples."""
    if longer.shape[1:] == outputs.shape[1:]:
        return mode
    raise _Square(
        f"the model's outputs are {list(outputs.shape)}, with one example more {list(longer.shape)}: they compare the "
        "examples of the batch (a similarity matrix?) and have no shape per example. Return one embedding each and "
        'compare them in the likelihood, a function (outputs, targets) -> [N], with fisher="empirical".'
    )


def _tolerance(mode: Intercept, outputs: Tensor) -> float:
    """Return the tolerance for sums that differ by numerical noise, for the lowest precision of any layer.

    Under autocast this precision is below that of the parameters. In half precision the square root of machine epsilon
    is so large that a missing use would pass.
    """
    records = [record.output for found in mode.records.values() for record in found]
    eps = max(torch.finfo(output.dtype).eps for output in [outputs, *records])
    return 16 * eps if eps > 1e-5 else 5 * eps**0.5


def _check_alone(probe: Probe, outputs: Tensor, by_example: tuple[bool, ...], tolerance: float) -> None:
    """Raise unless the first example needs only its own part of the context."""
    alone = probe.alone(by_example).run()
    if not close(alone, outputs[:1], outputs[:1].abs(), tolerance):
        raise ShapeError(
            "an example's outputs change when it is run alone with its part of the context: noise with one entry per "
            "example (dropout seeds, masks) must be used along the axis of the examples, the first axis of the input; "
            f"or a leaf of the context only happens to have {outputs.shape[0]} entries: build with another number."
        )
