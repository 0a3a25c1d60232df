"""Bars of the average step of every contender on every workload."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from common.benchmark.report import UNIT, Numbers, contenders, mean_step, title
from common.plots import INK, PALETTE, dress, new_figure, save_figure

LONGEST = 8.0
"""Value at which bars are cut and labelled with their number."""


def mean_steps(numbers: Numbers, path: Path) -> Figure:
    """Draw one panel per workload, with one bar per contender that ran, in units of SGD."""
    workloads, names = numbers["workloads"], contenders(numbers)
    figure = new_figure(width=3.2 * len(workloads) + 1.6, height=0.3 * len(names) + 1.1)
    panels = figure.subplots(1, len(workloads), sharey=True, squeeze=False)[0]
    for axes, (name, workload) in zip(panels, workloads.items(), strict=True):
        dress(axes, title(name), "SGD steps")
        axes.axvline(1.0, color=INK, linewidth=0.8, linestyle=":")
        for row, contender in enumerate(names):
            mean = mean_step(workload, contender)
            width = 0.0 if mean is None else min(mean, LONGEST)
            axes.barh(row, width, color=colour(contender), height=0.7)
            axes.text(width + 0.1, row, "did not run" if mean is None else f"{mean:.2f}", va="center", fontsize=8)
        axes.set_xlim(0, LONGEST + 1.2)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    return save_figure(figure, path)


def colour(contender: str) -> str:
    """Return the colour of the library, of the unit or of the others."""
    if contender.startswith("fisherfn"):
        return PALETTE[0]
    return INK if contender == UNIT else PALETTE[4]
