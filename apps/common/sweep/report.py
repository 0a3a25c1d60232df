"""The results of a sweep: a table of all runs, the best of them as configurations, and a picture."""

from __future__ import annotations

import collections
import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator

from common.atomic import replace_text
from common.config import as_yaml
from common.plots import INK, PALETTE, PLAIN, log_ticks, new_figure, save_figure, scale
from common.sweep.grid import Values, described
from common.sweep.stages import score
from common.train_config import TrainConfig

Line = Mapping[str, Any]

BESTS = {"train_loss": "best.yml", "test_loss": "best_test.yml"}
"""Files with the configuration of the best run, by metric."""

SHOWN = 10
"""Rows of the table that are printed."""


def last_lines(lines: Sequence[Line]) -> dict[int, Line]:
    """Return the last metrics of each run."""
    found: dict[int, Line] = {}
    for line in lines:
        if line["run"] not in found or line["epoch"] >= found[line["run"]]["epoch"]:
            found[line["run"]] = line
    return found


def ranked(lines: Sequence[Line], by: str) -> list[Line]:
    """Return the last metrics of all runs: sound ones first, then those that trained longest, then by loss."""

    def place(line: Line) -> tuple[bool, int, float, int]:
        loss = score(line, by)
        return not math.isfinite(loss), -line["epoch"], loss, line["run"]

    return sorted(last_lines(lines).values(), key=place)


def best(lines: Sequence[Line], by: str) -> Line | None:
    """Return the best run that was not stopped, or None."""
    first = ranked(lines, by)[:1]
    return first[0] if first and math.isfinite(score(first[0], by)) else None


def write(
    folder: Path, config: TrainConfig, values: Values, rows: Sequence[Line], lines: Sequence[Line], by: str
) -> str:
    """Write table, best configurations and picture; return the head of the table as text."""
    folder.mkdir(parents=True, exist_ok=True)
    order = ranked(lines, by)
    columns = [
        "run",
        *values,
        "epoch",
        "train_loss",
        "test_loss",
        "train_accuracy",
        "test_accuracy",
        "skipped",
        "seconds",
    ]
    columns = [c for c in columns if c == "run" or c in values or any(c in line for line in order)] + ["stopped"]
    failed = collections.Counter[int]()
    for line in lines:
        failed[line["run"]] += line.get("skipped", 0)
    order = [{**line, "skipped": failed[line["run"]]} for line in order]
    table = [[_cell(name, line, rows[line["run"]]) for name in columns] for line in order]
    text = io.StringIO()
    csv.writer(text).writerows([columns, *table])
    replace_text(folder / "table.csv", text.getvalue())
    for metric, name in BESTS.items():
        winner = best(lines, metric)
        if winner is None:
            (folder / name).unlink(missing_ok=True)
        else:
            replace_text(folder / name, _best_yaml(config, rows[winner["run"]], winner))
    draw(folder / "sweep.png", values, rows, lines, by)
    return _printed(columns, table[:SHOWN], len(table))


def _best_yaml(config: TrainConfig, row: Line, line: Line) -> str:
    # numbers as population-based training left them; without it they are those of the row, to the last digit
    moved = {
        name: line[name]
        for name, value in row.items()
        if isinstance(value, float) and name in line and not math.isclose(line[name], value, rel_tol=1e-5)
    }
    return as_yaml(dataclasses.replace(config, **{**row, **moved}, overwrite=False, resume=False))


def _cell(name: str, line: Line, row: Line) -> str:
    value = line.get(name, row.get(name, ""))
    value = row[name] if name in row and name not in line else value
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _printed(columns: Sequence[str], table: Sequence[Sequence[str]], count: int) -> str:
    short = [[cell if len(cell) < 40 else f"{cell[:37]}..." for cell in line] for line in [columns, *table]]
    widths = [max(len(line[place]) for line in short) for place in range(len(columns))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in short]
    return "\n".join([*lines, *([f"… and {count - len(table)} more"] if count > len(table) else [])])


# ------------------------------------------------------------------------------------------------------- the picture


def draw(path: Path, values: Values, rows: Sequence[Line], lines: Sequence[Line], by: str) -> None:
    """Draw a heat map over the first two swept options besides the seed, and the losses by epoch with their spread."""
    axes = [name for name in values if name != "seed"][:2]
    figure = new_figure(width=11.5, height=4.6)
    left, right = figure.subplots(1, 2)
    last = last_lines(lines)
    if len(axes) == 2:
        _heat(figure, left, axes, values, rows, last, by)
    else:
        _scatter(left, (axes or list(values))[0], rows, last, by)
    _curves(right, [name for name in values if name != "seed"], rows, lines, by)
    save_figure(figure, path)


def _heat(figure: Any, axes: Axes, names: Sequence[str], values: Values, rows: Any, last: Any, by: str) -> None:
    table = []
    for a in values[names[0]]:
        cells = []
        for b in values[names[1]]:
            here = [score(last[r], by) for r in last if rows[r][names[0]] == a and rows[r][names[1]] == b]
            there = [v for v in here if math.isfinite(v)]
            cells.append(statistics.median(there) if there else math.nan)  # over everything else
        table.append(cells)
    finite = [v for line in table for v in line if math.isfinite(v)]
    norm = LogNorm(min(finite), max(finite)) if finite and 0 < min(finite) < max(finite) else None
    image = axes.imshow(table, cmap="viridis_r", norm=norm, aspect="auto")
    axes.set_facecolor("0.8")
    for i, line in enumerate(table):
        for j, value in enumerate(line):
            if math.isfinite(value) and len(table) * len(line) <= 100:
                red, green, blue, _ = image.to_rgba(np.array(value))
                dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
                axes.text(j, i, f"{value:.3g}", ha="center", va="center", color="white" if dark else INK, fontsize=8)
    for ticks, name in ((axes.set_yticks, names[0]), (axes.set_xticks, names[1])):
        ticks(range(len(values[name])), [_short(value) for value in values[name]])
    axes.set_ylabel(names[0], color=INK)
    axes.set_xlabel(names[1], color=INK)
    axes.set_title(
        f"{by.replace('_', ' ')} at the end of each run; grey: none, or diverged", color=INK, fontsize=11, loc="left"
    )
    bar = figure.colorbar(image, ax=axes, format=PLAIN)
    if norm is not None:
        log_ticks(bar.ax.yaxis, min(finite), max(finite))


def _scatter(axes: Axes, name: str, rows: Any, last: Any, by: str) -> None:
    places = list(dict.fromkeys(row[name] for row in rows))
    points = [(places.index(rows[r][name]), score(line, by)) for r, line in last.items()]
    good = [point for point in points if math.isfinite(point[1])]
    axes.scatter(*zip(*good, strict=True) if good else ([], []), color=PALETTE[0])
    axes.set_xticks(range(len(places)), [_short(value) for value in places])
    scale(axes, [v for _, v in good])
    axes.set_xlabel(name, color=INK)
    axes.set_title(f"{by.replace('_', ' ')} at the end of each run", color=INK, fontsize=11, loc="left")


def _curves(axes: Axes, names: Sequence[str], rows: Any, lines: Any, by: str, most: int = 6) -> None:
    """Draw the mean over seeds and the range between them, for the best settings; the others are grey."""
    settings: dict[str, dict[int, list[float]]] = {}
    for line in lines:
        key = described({name: rows[line["run"]][name] for name in names}) or "all seeds"
        settings.setdefault(key, {}).setdefault(line["epoch"], []).append(score(line, by))
    good = {
        key: {epoch: [v for v in found if math.isfinite(v)] for epoch, found in epochs.items()}
        for key, epochs in settings.items()
    }
    good = {key: {e: v for e, v in epochs.items() if v} for key, epochs in good.items()}
    order = sorted((k for k in good if good[k]), key=lambda k: (-max(good[k]), statistics.fmean(good[k][max(good[k])])))
    for place, key in reversed(list(enumerate(order))):
        epochs = sorted(good[key])
        mean = [statistics.fmean(good[key][epoch]) for epoch in epochs]
        if place >= most:
            axes.plot(epochs, mean, color="#BBBBBB", linewidth=0.7, zorder=1)
            continue
        colour = PALETTE[place % len(PALETTE)]
        low, high = ([f(good[key][epoch]) for epoch in epochs] for f in (min, max))
        axes.fill_between(epochs, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(epochs, mean, color=colour, label=key, zorder=3)
    scale(axes, [v for found in good.values() for each in found.values() for v in each])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if order:
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], fontsize=8, frameon=False, labelcolor=INK)
    axes.set_xlabel("epoch", color=INK)
    axes.set_title(f"{by.replace('_', ' ')}: mean and range over seeds", color=INK, fontsize=11, loc="left")


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
