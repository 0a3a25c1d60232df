"""The coverage report, as text or as a table: which block each parameter belongs to, and what the fallback costs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fisherfn.stats.layout import Layout

HEAD = ("block", "kind", "K×out×in", "parameters", "entries", "%", "why")

CAUSES = (
    ("mix examples", "mixed"),
    ("in other ways", "reused"),
    ("of different layers", "ambiguous"),
    ("first axis", "axis"),
    ("chosen by values", "selected"),
)
"""Phrases in the reason of a fallback, each with its one-word cause. If a function is the cause, it is its name."""


def cause(why: str) -> str:
    """Return one word for the reason of a fallback."""
    reader = re.search(r"read by ([^\s;,]+)", why)
    return reader[1] if reader else next((word for sign, word in CAUSES if sign in why), "unclaimed")


def text(layout: Layout) -> str:
    """Return the report as lines: one per block, a total, and what the fallback costs."""
    lines = [HEAD, *_rows(layout)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    rule = "  ".join("─" * width for width in widths)
    return "\n".join([rows[0], rule, *rows[1:], *_last(layout)])


def html(layout: Layout) -> str:
    """Return the report as a table, which a notebook shows."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in HEAD)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in _rows(layout))
    last = "".join(f"<p>{escape(line)}</p>" for line in _last(layout))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{last}"


def _rows(layout: Layout) -> list[Sequence[str]]:
    sizes = {name: math.prod(shape) for name, shape in layout.shapes}
    total = sum(size for name, size in sizes.items() if name not in layout.unused)
    rows: list[Sequence[str]] = []
    for block in layout.blocks:
        entries = sum(sizes[name] for name in block.names)
        shape = "×".join(map(str, block.shape))
        why = block.why
        if block.cause:
            why = f"{block.cause}: {why}, {entries:,} numbers per example and sample"
        rows.append((block.key, block.kind, shape, ", ".join(block.names), f"{entries:,}", _share(entries, total), why))
    for name, why in layout.uncovered:
        said = f"{cause(why)}: {why}; plain gradient, no curvature"
        rows.append((name, "gradient", "–", name, f"{sizes[name]:,}", _share(sizes[name], total), said))
    for name in layout.unused:
        rows.append((name, "unused", "–", name, f"{sizes[name]:,}", "–", "the outputs do not depend on it"))
    return rows


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}"


def _last(layout: Layout) -> list[str]:
    """Return the last lines: the total, which shows that nothing was left out, and the cost of the fallback."""
    sizes = {name: math.prod(shape) for name, shape in layout.shapes}
    covered = sum(sizes[name] for block in layout.layers for name in block.names)
    left = sum(sizes[name] for name in layout.unused)
    plain = sum(sizes[name] for name, _ in layout.uncovered)
    total = sum(sizes.values()) - left - plain
    layers = f"{len(layout.layers)} layer{'' if len(layout.layers) == 1 else 's'}"
    by_layers = f"{covered:,} by {layers}"
    if covered < total:
        share = _share(covered, total)
        by_layers = f"{covered:,} ({share} %) by {layers}, {total - covered:,} by the fallback"
    lines = [
        f"{'' if plain else 'all '}{total:,} entries covered: {by_layers}"
        + (f"; {plain:,} take the plain gradient" if plain else "")
        + (f"; {left:,} unused" if left else "")
    ]
    if layout.one_by_one:
        lines += [
            f"the fallback runs the model once per example, one after another ({layout.one_by_one}): statistics of N "
            "examples need N more forward and backward passes of one example"
        ]
    elif layout.fallbacks:
        lines += [
            "the fallback runs the model once more, on single examples under torch.vmap: statistics need one more "
            "forward pass, and one more backward pass for the loss and for each sample"
        ]
    return lines
