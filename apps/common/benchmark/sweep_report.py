"""Tables and pictures of the benchmark of sweeps, and the place of a table in a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from common.atomic import replace_text
from common.benchmark.sweeps import CADENCES, NETS, TOGETHER, Case, net_of
from common.config import ConfigError
from common.plots import INK, PALETTE, new_figure, save_figure


def cells_of(row: str) -> list[str]:
    """Return the cells of a row of a table."""
    return [cell.strip() for cell in row.strip("|").split("|")]


def rows_of(page: str | None, name: str) -> list[str]:
    """Return the rows of the table of this name on a page, without its head; none without a page.

    Raises:
        ConfigError: the page has no place for this table.
    """
    if page is None:
        return []
    text, marks = Path(page).read_text(), [f"<!-- sweep {name}: {what} -->" for what in ("begin", "end")]
    if not all(mark in text for mark in marks):
        raise ConfigError(f"{page} has no place for the table: write the lines {' and '.join(marks)} where it belongs")
    return text.partition(marks[0])[2].partition(marks[1])[0].strip().splitlines()[2:]


def table(
    head: Sequence[str], order: Sequence[tuple[str, ...]], rows: Sequence[str], older: Sequence[str] = ()
) -> list[str]:
    """Return the lines of a table of new rows, and of older ones whose cases have no new row.

    Args:
        head: titles of the columns.
        order: the first cells of all possible rows, in their order.
        rows: the new rows.
        older: the rows so far.
    """
    found = {tuple(cells_of(row)[: len(order[0])]): row for row in [*older, *rows]}
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(found[key] for key in order if key in found)]


def draw_compiled(rows: Sequence[str], path: Path) -> Figure:
    """Draw the speed-up over a plain loop against the size of the net: a panel per batch size and cadence."""
    found = {tuple(cells_of(row)[:2]): [float(cell) for cell in cells_of(row)[2:8]] for row in rows}
    sizes = {net: sum(leaf.numel() for leaf in net_of(Case(net, 32))[0].parameters()) for net in NETS}
    nets = sorted(sizes, key=lambda net: sizes[net])
    lines = [("loop, compiled", TOGETHER[0], 1)]  # name, models, column of the time
    lines += [(f"group of {m}{word}", m, column) for m in TOGETHER for word, column in (("", 4), (", compiled", 5))]
    figure = new_figure(width=10, height=8)
    for place, (batch, cadence) in enumerate((batch, cadence) for cadence in CADENCES for batch in (32, 256)):
        axes = figure.add_subplot(2, 2, place + 1)
        for (label, members, column), color in zip(lines, PALETTE, strict=False):
            times = [found.get((Case(net, batch, cadence).title, str(members))) for net in nets]
            points = [(x, each[0] / each[column]) for x, each in enumerate(times) if each]
            style = "o-" if "compiled" in label else "o--"
            axes.plot(*np.array(points).reshape(-1, 2).T, style, markersize=3, color=color, label=label)
        axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
        axes.set(yscale="log", ylim=(0.4, 60), xlim=(-0.3, len(nets) - 0.7))
        axes.set_xticks(range(len(nets)), [f"{net}\n{sizes[net]:,}" for net in nets], fontsize=7)
        axes.set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
        axes.minorticks_off()
        axes.set_title(f"batch {batch}, statistics and inverses every {cadence[0]}/{cadence[1]} steps", fontsize=10)
        axes.set_xlabel("net and its number of parameters")
        axes.set_ylabel("speed-up over a plain loop")
    figure.axes[0].legend(fontsize=8, frameon=False, labelcolor=INK)
    return save_figure(figure, path)


def put(lines: Sequence[str], page: str | None, name: str) -> None:
    """Replace the table of this name in a page, or print it."""
    if page is None:
        print("\n".join(lines))
        return
    before, start, rest = Path(page).read_text().partition(f"<!-- sweep {name}: begin -->")
    _, end, after = rest.partition(f"<!-- sweep {name}: end -->")
    replace_text(Path(page), before + start + "\n" + "\n".join(lines) + "\n" + end + after)


def draw(speed_ups: Mapping[Case, list[float]], sizes: Sequence[int], path: Path) -> None:
    """Draw the speed-up over a loop against the models at once: a panel per batch size and cadence, a line per net."""
    panels = [(batch, cadence) for cadence in CADENCES for batch in (32, 256)]
    figure = new_figure(width=9, height=7)
    for place, (batch, cadence) in enumerate(panels):
        axes = figure.add_subplot(2, 2, place + 1)
        for color, net in zip(PALETTE, NETS, strict=False):
            axes.plot(sizes, speed_ups[Case(net, batch, cadence)], "o-", markersize=3, color=color, label=net)
        axes.axhline(1, color=INK, linewidth=0.8, linestyle="--")
        axes.set(xscale="log", yscale="log", xticks=sizes, xticklabels=sizes, ylim=(0.4, 40))
        axes.set_yticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
        axes.set_title(f"batch {batch}, statistics and inverses every {cadence[0]}/{cadence[1]} steps", fontsize=10)
        axes.minorticks_off()
        axes.set_xlabel("models at once")
        axes.set_ylabel("speed-up over a loop")
    figure.axes[0].legend(fontsize=8, frameon=False, labelcolor=INK)
    save_figure(figure, path)
