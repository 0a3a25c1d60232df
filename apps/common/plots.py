"""Pictures of runs, drawn on separate figures, without global state of matplotlib.

metrics   the result of results.read_metrics: one dict per epoch with `epoch`, `seconds`, `train_loss`, `test_loss`
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from common.atomic import replace

Metrics = Sequence[Mapping[str, float]]
Points = Sequence[tuple[float, float]]

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, which colour-blind readers can distinguish; without yellow, which is faint on white."""

MARKERS = ("", "o", "s", "^", "D", "v")
"""Markers; a second round of the palette uses the next one."""

PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
"""Numbers on a logarithmic axis as 0.05, not as 5 × 10⁻²."""

INK, GRID = "#333333", "#DDDDDD"
DPI = 150


def loss_curves(runs: Mapping[str, Metrics], path: Path) -> Figure:
    """Draw training loss (solid) and test loss (dashed) of each run, over epochs and over seconds of training.

    If any run has accuracies, they are drawn next to the losses, over epochs.

    Args:
        runs: metrics by the name in the legend, in the order of the colours. A name that ends in ", seed k" shares the
            colour and legend entry of the other seeds.
        path: the PNG to write.
    """
    classifiers = any("train_accuracy" in m for metrics in runs.values() for m in metrics)
    figure = new_figure(width=15.0 if classifiers else 10.0, height=4.6)
    axes = figure.subplots(1, 3 if classifiers else 2)
    axes[1].sharey(axes[0])
    axes[1].tick_params(labelleft=False)
    panels = (("loss", "epoch", "by epoch"), ("loss", "seconds", "by time"), ("accuracy", "epoch", "accuracy by epoch"))
    groups = list(dict.fromkeys(_group(name) for name in runs))
    for panel, (quantity, x, title) in zip(axes, panels, strict=False):
        for name, metrics in runs.items():
            _curves(panel, metrics, (x, quantity), groups.index(_group(name)))
        dress(panel, title, "epoch" if x == "epoch" else "seconds of training")
        if x == "epoch":
            panel.set_ylabel(quantity, color=INK)
            panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    _scale_losses(axes[0], runs)
    _legend(figure, groups)
    return save_figure(figure, path)


def reconstructions(inputs: Tensor, outputs: Tensor, path: Path, columns: int = 10) -> Figure:
    """Draw images and their reconstructions, row under row.

    Args:
        inputs: images [N, C, H, W] of one or three channels.
        outputs: the same shape.
        path: the PNG to write.
        columns: images per row.
    """
    if inputs.shape != outputs.shape or inputs.ndim != 4:
        raise ValueError(f"two equal shapes [N, C, H, W] wanted, got {list(inputs.shape)} and {list(outputs.shape)}")
    pairs = list(zip(inputs.split(columns), outputs.split(columns), strict=True))
    rows = [(name, images) for pair in pairs for name, images in zip(("input", "output"), pair, strict=True)]
    columns = min(columns, len(inputs))
    shape = inputs.shape[-2] / inputs.shape[-1]
    figure = new_figure(width=0.9 + 0.85 * columns, height=0.25 + 0.85 * shape * len(rows))
    grid = figure.subplots(len(rows), columns, squeeze=False)
    limits = float(inputs.min()), float(inputs.max())
    for line, (name, images) in zip(grid, rows, strict=True):
        _image_row(line, images, name, limits)
    return save_figure(figure, path)


def heatmap(
    panels: Sequence[tuple[str, Sequence[Sequence[float]], str]],
    rows: Sequence[str],
    columns: Sequence[str],
    axes: tuple[str, str],
    path: Path,
) -> Figure:
    """Draw tables as coloured cells with numbers, side by side.

    Args:
        panels: title, values [rows][columns] and number format of each.
        rows: labels of the rows.
        columns: labels of the columns.
        axes: names of rows and columns.
        path: the PNG to write.
    """
    figure = new_figure(width=4.6 * len(panels), height=0.6 * len(rows) + 1.2)
    for plot, (title, values, form) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        plot.imshow(values, cmap="cividis_r", aspect="auto")
        low, high = min(map(min, values)), max(map(max, values))
        for i, line in enumerate(values):
            for j, value in enumerate(line):
                dark = value > (low + high) / 2
                plot.text(j, i, form.format(value), ha="center", va="center", color="white" if dark else INK)
        plot.set_xticks(range(len(columns)), columns)
        plot.set_yticks(range(len(rows)), rows)
        plot.set_title(title, color=INK, fontsize=11, loc="left")
        plot.set_ylabel(axes[0], color=INK)
        plot.set_xlabel(axes[1], color=INK)
    return save_figure(figure, path)


def curve_grid(
    groups: Sequence[tuple[str, Mapping[str, Mapping[str, Points]]]],
    path: Path,
    log: Sequence[bool],
    strokes: Mapping[str, Any],
    columns: int = 4,
) -> Figure:
    """Draw groups of small panels over training steps with the same curves, for example one panel per layer.

    Args:
        groups: title of each group, and points (step, value) by panel and name; NaN leaves a gap.
        path: the PNG to write.
        log: for each group, True for logarithmic axes where useful; otherwise shared axes that start at zero.
        strokes: line styles by name, if not solid.
        columns: panels per row.
    """
    names = list(dict.fromkeys(name for _, panels in groups for curves in panels.values() for name in curves))
    looks = {name: look(index) | {"linestyle": strokes.get(name, "-")} for index, name in enumerate(names)}
    lines = [math.ceil(len(panels) / columns) for _, panels in groups]
    figure = new_figure(width=3.1 * columns, height=2.15 * sum(lines) + 0.6 * len(groups) + 0.4)
    parts = figure.subfigures(len(groups), 1, height_ratios=[count + 0.25 for count in lines], squeeze=False)[:, 0]
    for part, (title, panels), logarithmic, count in zip(parts, groups, log, lines, strict=False):
        part.suptitle(title, color=INK, fontsize=12, fontweight="bold", x=0.01, ha="left")
        grid = part.subplots(count, columns, squeeze=False, sharey=not logarithmic).flat
        for axes, (name, curves) in zip(grid, panels.items(), strict=False):
            _panel(axes, name, curves, looks, logarithmic)
        if not logarithmic:
            axes.set_ylim(bottom=0)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        for axes in grid[max(0, len(panels) - columns) : len(panels)]:
            axes.set_xlabel("step", color=INK, fontsize=9)
    handles = [Line2D([], [], label=name, **look) for name, look in looks.items()]
    # about eight letters per inch, and a separate line for the rest
    lines_needed = math.ceil(sum(len(name) + 8 for name in names) / (8 * 3.1 * columns))
    ncols = math.ceil(len(handles) / lines_needed)
    figure.legend(handles=handles, loc="outside upper center", ncols=ncols, frameon=False, labelcolor=INK)
    return save_figure(figure, path)


# ------------------------------------------------------------------------------------------------------------ parts


def new_figure(width: float, height: float) -> Figure:
    """Return an empty white figure of this size in inches, which needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> Figure:
    """Write the PNG and return the figure."""
    replace(path, lambda file: figure.savefig(file, dpi=DPI, format="png"))
    return figure


def _group(name: str) -> str:
    """Return the name without its seed."""
    return re.sub(r", seed \d+$", "", name)


def _curves(axes: Axes, metrics: Metrics, over: tuple[str, str], index: int) -> None:
    style, (x, y) = look(index), over
    for name, other in ((f"train_{y}", {}), (f"test_{y}", {"linestyle": "--", "marker": "", "alpha": 0.75})):
        points = [(m[x], m[name]) for m in shown(metrics) if name in m and x in m]
        axes.plot([point[0] for point in points], [point[1] for point in points], label=name, **{**style, **other})


def shown(metrics: Metrics) -> Metrics:
    """Return the epochs to draw; the initialisation of a long run would dominate the axis."""
    return [m for m in metrics if m.get("epoch") != 0] if len(metrics) > 5 else list(metrics)


def look(index: int) -> dict[str, Any]:
    """Return colour and marker of the curve with this number."""
    marker = MARKERS[index // len(PALETTE) % len(MARKERS)]
    return {"color": PALETTE[index % len(PALETTE)], "marker": marker, "markersize": 4, "linewidth": 1.8}


def dress(axes: Axes, title: str, xlabel: str) -> None:
    """Set title, label, grid and colours of one panel."""
    axes.set_title(title, color=INK, fontsize=11, loc="left")
    axes.set_xlabel(xlabel, color=INK)
    axes.grid(visible=True, which="major", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    axes.tick_params(colors=INK, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)


def _panel(axes: Axes, title: str, curves: Mapping[str, Points], looks: Mapping[str, Any], logarithmic: bool) -> None:
    for name, points in curves.items():
        # zeros are numerical noise, and not representable on a logarithmic axis
        y = [math.nan if logarithmic and value == 0 else value for _, value in points]
        dots = {"marker": ".", "markersize": 4, "markevery": _dotted(y)}
        axes.plot([x for x, _ in points], y, label=name, **{**looks[name], **dots})
    dress(axes, title, "")
    axes.title.set_fontsize(10)
    if logarithmic:
        scale(axes, [y for points in curves.values() for _, y in points if y != 0])


def _dotted(y: Sequence[float]) -> list[int]:
    """Mark all points if there are few, else those between gaps, where a line would not show them."""
    gaps = [True, *(not math.isfinite(value) for value in y), True]
    return [i for i in range(len(y)) if len(y) <= 20 or (gaps[i] and gaps[i + 2])]


def _scale_losses(axes: Axes, runs: Mapping[str, Metrics]) -> None:
    """Scale an axis for the losses of all runs."""
    losses = [
        m[name]
        for metrics in runs.values()
        for m in shown(metrics)
        for name in ("train_loss", "test_loss")
        if name in m
    ]
    scale(axes, losses)


def scale(axes: Axes, values: Sequence[float]) -> None:
    """Use a logarithmic axis with readable ticks if the values are positive and span more than a factor of two."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite or min(finite) <= 0 or max(finite) < 2 * min(finite):
        return
    axes.set_yscale("log")
    log_ticks(axes.yaxis, min(finite), max(finite))


def log_ticks(axis: Axis, low: float, high: float) -> None:
    """Label a logarithmic axis between two numbers with a few plain numbers."""
    decades = math.log10(high / low)
    subs = (1.0,) if decades > 3 else (1.0, 2.0, 5.0) if decades > 0.7 else tuple(range(1, 10))
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(PLAIN)
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, names: list[str]) -> None:
    handles = [Line2D([], [], label=name, **look(index)) for index, name in enumerate(names)]
    handles += [Line2D([], [], label="training", color=INK), Line2D([], [], label="test", color=INK, linestyle="--")]
    columns = len(handles) if sum(len(name) + 6 for name in names) < 90 else 3
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, labelcolor=INK, fontsize=9)


def _image_row(line: Sequence[Axes], images: Tensor, name: str, limits: tuple[float, float]) -> None:
    for axes in line:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    # the limits of the inputs for all, otherwise a low-contrast output would look like its input
    for axes, image in zip(line, images, strict=False):
        pixels = ((image - limits[0]) / max(limits[1] - limits[0], 1e-12)).clamp(0, 1)
        axes.imshow(pixels.detach().cpu().movedim(0, -1).numpy(), cmap="gray", vmin=0, vmax=1)
    line[0].set_ylabel(name, color=INK, rotation=0, ha="right", va="center")
