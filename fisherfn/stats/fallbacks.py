"""Parameters that no layer covers: blocks of per-example gradients, verified numerically, or the plain gradient."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Size, Tensor

from fisherfn import tree
from fisherfn.errors import CoverageError
from fisherfn.layers import FallbackConfig
from fisherfn.stats.blocks import Block, Use
from fisherfn.stats.border import brief, listed, with_line
from fisherfn.stats.chunks import window
from fisherfn.stats.layout import Layout
from fisherfn.stats.numbers import close, noise
from fisherfn.stats.probe import Probe
from fisherfn.stats.singles import example_gradients
from fisherfn.types import Tree

FALLBACK_EXAMPLES = 4
"""The number of examples on which the build checks the fallback's per-example gradients: enough to see a coupling."""


def with_fallbacks(layers: list[Block], params: Tree, why: dict[str, str]) -> tuple[Block, ...]:
    """Return blocks that contain every parameter, in params order; a parameter without a layer gets a fallback."""
    by_weight = {block.weight: block for block in layers}
    covered = {name for block in layers for name in block.names}
    blocks: list[Block] = []
    for name, p in params.items():
        if name in by_weight:
            blocks.append(by_weight[name])
        elif name not in covered:
            config = FallbackConfig(p.shape)
            reason = f"{why.get(name, 'no layer family claims it')}; {config.form}"
            blocks.append(
                Block(name, "fallback", name, p.shape, None, Size(), (Use(config, p.shape, False, p.dtype),), reason)
            )
    return _unique_keys(blocks)


def without_fallbacks(
    layers: list[Block], params: Tree, why: dict[str, str]
) -> tuple[tuple[Block, ...], tuple[tuple[str, str], ...]]:
    """Return the layers in params order, and the parameters that none of them covers, each with the reason."""
    by_weight = {block.weight: block for block in layers}
    covered = {name for block in layers for name in block.names}
    plain = tuple((name, why.get(name, "no layer family claims it")) for name in params if name not in covered)
    if not layers:
        raise CoverageError(
            f"no parameter is in a layer ({plain[0][0]!r}: {plain[0][1]}), so there is no curvature to use with "
            'uncovered="gradient". Leave that argument out, or train with a first-order optimizer.'
        )
    return _unique_keys([by_weight[name] for name in params if name in by_weight]), plain


def _unique_keys(blocks: list[Block]) -> tuple[Block, ...]:
    keys = [block.key for block in blocks]
    clash = {key for key in keys if keys.count(key) > 1}
    return tuple(replace(block, key=block.weight) if block.key in clash else block for block in blocks)


def verify_fallbacks(probe: Probe, layout: Layout, cotangent: Tensor, tolerance: float) -> Layout:
    """Verify the fallbacks' per-example gradients, and return the layout with the way in which they are computed.

    Per-example gradients that do not add up to the gradient show that the model couples the examples.
    """
    names = [block.weight for block in layout.fallbacks]
    if not names:
        return layout
    few = torch.zeros_like(cotangent)
    few[:FALLBACK_EXAMPLES] = cotangent[:FALLBACK_EXAMPLES]
    truth = probe.gradients(few)
    part = tree.map(lambda leaf: leaf[:FALLBACK_EXAMPLES], probe.x)
    own = window(layout, probe.context, slice(FALLBACK_EXAMPLES))
    some = cotangent[None, :FALLBACK_EXAMPLES]
    try:
        singles = example_gradients(probe.model, layout, probe.params, names, part, own, some)
    except Exception as error:  # vmap only adds speed: functions without a vmap rule may still run one by one
        layout = replace(layout, one_by_one=_cause(error))
        try:
            singles = example_gradients(probe.model, layout, probe.params, names, part, own, some)
        except (RuntimeError, ValueError) as alone:
            raise CoverageError(
                with_line(
                    f"{listed(names)} (cause: {layout.fallbacks[0].cause}) {'is' if len(names) == 1 else 'are'} in no "
                    "layer and so need the model to run on single examples, where it raises: "
                    f"{brief(alone)} If batch norm in training mode is the reason, call net.eval(), or build with "
                    'uncovered="gradient", which takes their plain gradient.',
                    alone,
                )
            ) from alone
    zero = noise(truth)
    for name in names:
        if not close(singles[name][0].sum(0), truth[name], singles[name][0].abs().sum(0), tolerance, zero):
            raise CoverageError(
                f"the per-example gradients of {name!r} do not add up to its gradient: the model couples the examples "
                "of a batch (batch norm in training mode? attention or a recurrent net without batch_first=True?). "
                "Call net.eval(), keep this parameter out of params, or let it take the plain gradient: "
                'uncovered="gradient".'
            )
    return layout


def in_double(probe: Probe, layout: Layout, cotangent: Tensor) -> Layout | None:
    """Verify the fallbacks in double precision, and return the layout; None if they fail there, too.

    Per-example gradients that cancel or are zero, such as those of a shift before a softmax, are numerical noise in
    single precision and may fail its check.
    """

    def double(leaf: Tensor) -> Tensor:
        return leaf.double() if leaf.is_floating_point() else leaf

    if all(dtype == torch.float64 for dtype in layout.dtypes):
        return None
    params, x, context = (tree.map(double, each) for each in (probe.params, probe.x, probe.context))
    tolerance = 5 * torch.finfo(torch.float64).eps ** 0.5
    try:
        return verify_fallbacks(Probe(probe.model, params, x, context), layout, cotangent.double(), tolerance)
    except (RuntimeError, ValueError):  # the check fails, or the model runs only in single precision
        return None


def _cause(error: Exception) -> str:
    """Return a short reason why the model does not run under `torch.vmap`."""
    said = str(error)
    for sign, cause in (
        ("data-dependent control flow", "the model branches on values"),
        (".item()", "the model branches on values"),
        ("in-place", "the model writes into a tensor of its own"),
        ("inplace", "the model writes into a tensor of its own"),
        ("randomness", "the model draws numbers"),
    ):
        if sign in said:
            return cause
    return f"torch.vmap raises {type(error).__name__}"
