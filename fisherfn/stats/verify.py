"""Numerical verification at build: the taps of every layer must reproduce autograd's gradients, example by example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Size, Tensor
from torch.func import vmap

from fisherfn import rows, tree
from fisherfn.layers import COPIED
from fisherfn.stats.block_taps import lazy
from fisherfn.stats.blocks import Block
from fisherfn.stats.intercept import Taps
from fisherfn.stats.layout import Layout
from fisherfn.stats.numbers import close
from fisherfn.stats.passes import tapped_run
from fisherfn.stats.probe import Probe
from fisherfn.taps import LazyTap


def verify(probe: Probe, layout: Layout, cotangent: Tensor, tolerance: float) -> tuple[list[Block], dict[str, str]]:
    """Return the blocks whose taps reproduce autograd's gradients, and why the other parameters are in none."""
    truth = probe.gradients(cotangent)
    given = probe.model, layout, probe.params, probe.x, probe.context
    # one run at a time: each holds the activations of all layers
    if layout.couples:  # the mixing by batch norm must not hide another one
        leaking = _leaking(layout, tapped_run(*given, uncoupled=True)[1], cotangent)
    _, pull, inputs, _ = tapped_run(*given)
    if not layout.couples:
        leaking = _leaking(layout, pull, cotangent)
    grads = pull(cotangent)
    several = _wrong_together(layout, pull, cotangent, grads)
    kept: list[Block] = []
    why: dict[str, str] = {}
    for block in layout.blocks:
        tap = lazy(block, inputs[block.weight], [g.unsqueeze(0) for g in grads[block.weight]])
        found, scale = (block.tensors(total) for total in _sums(tap))
        wrong = [n for n in block.names if not close(found[n], truth[n], scale[n], tolerance)]
        if block.key in several:
            why |= dict.fromkeys(block.names, "torch.vmap gives other gradients of its call")
        elif block.key in leaking:
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


def _leaking(layout: Layout, pull: Callable[[Tensor], Taps], cotangent: Tensor) -> set[str]:
    """Find blocks in which one example's cotangent reaches the output-gradients of other examples.

    Both ends of the batch are tried: where an example reads only earlier ones (a causal mask, a cumulative sum along
    the batch), nothing flows back from the first, and where it reads only later ones, nothing from the last.
    """
    first, last = pull(_alone(cotangent, 0)), pull(_alone(cotangent, -1))
    found = set()
    for block in layout.blocks:
        ends = zip(block.uses, first[block.weight], last[block.weight], strict=True)
        others = [rest for use, head, tail in ends for rest in (head[use.repeats :], tail[: -use.repeats])]
        if any(bool((g != 0).any()) for g in others):
            found.add(block.key)
    return found


def _wrong_together(layout: Layout, pull: Callable[[Tensor], Taps], cotangent: Tensor, grads: Taps) -> set[str]:
    """Find blocks of calls that run once per example, and whose gradients are wrong for several samples at once.

    Some functions (the kernel of `torch.cdist`) have a wrong derivative under two nested `torch.vmap`.
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
    """Return the cotangent of one example, zero for all others."""
    alone = torch.zeros_like(cotangent)
    alone[example] = cotangent[example]
    return alone


def _sums(tap: LazyTap) -> tuple[Tensor, Tensor]:
    """Return `Σ g aᵀ`, and the same sum of absolute values: the scale of its numerical noise."""
    sums = sizes = torch.zeros(())
    for part in tap.windows():
        g, a = part.g.squeeze(1), rows.cast(part.a, part.g.dtype)
        sums = sums + rows.outer(g, a)
        sizes = sizes + rows.outer(g.abs(), tree.map(torch.abs, a))
    return sums, sizes
