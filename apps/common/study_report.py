"""Tables and picture of the comparison, made from its records alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from common.atomic import replace_text
from common.baselines import BASELINES
from common.benchmark.report import filled, table
from common.plots import INK, PALETTE, dress, look, new_figure, save_figure, scale
from common.study import BATCHES, NETS, TITLES, TWICE, Run, best, read

TARGET = "adam"
"""The optimizer whose final loss the others have to reach."""

COMPILED = 1.0
"""Seconds before the first step of a race from which on it has compiled; later seeds reuse the compiled steps."""


def report(folder: Path, nets: Sequence[str], page: Path | None) -> None:
    """Print the tables, draw the pictures, and write them into a page between its markers.

    Args:
        folder: folder with the records.
        nets: nets to report, in this order; a net without records is named as not run.
        page: Markdown with `<!-- table: compare -->`, `<!-- table: endure -->` and `<!-- end of table -->` after each;
            the pictures go beside it, to images/compare.png and images/compare_methods.png. None: print only.
    """
    runs = {net: read(folder / f"{net}.jsonl") for net in nets}
    written = {"compare": tables(runs), "endure": endurance(runs)}
    print("\n\n".join(written.values()))
    if page is not None:
        replace_text(page, filled(page.read_text(), written))
        picture(runs, page.parent / "images" / "compare.png")
        methods(runs, page.parent / "images" / "compare_methods.png")


def tables(runs: dict[str, list[Run]]) -> str:
    """Return one table per net that was run, and the names of the others."""
    parts = [f"**{NETS[net].title}**\n\n{of_net(found)}" for net, found in runs.items() if found]
    missing = [NETS[net].title for net, found in runs.items() if not found]
    return "\n\n".join(parts + ([f"Not run yet: {', '.join(missing)}."] if missing else []))


def of_net(runs: list[Run]) -> str:
    """Return the table of one net: settings, final losses, steps and time until the final loss of tuned Adam."""
    rows = []
    for optim in [name for name in TITLES if any(run.optim == name for run in runs)]:
        trials = [run for run in runs if run.optim == optim and run.seed == 0 and not run.kind]
        raced = [run for run in runs if run.optim == optim and run.kind == "plain"]
        chosen = best(trials) or (raced[0].fresh() if raced else None)
        if chosen is None:
            rows.append([TITLES[optim], "–", str(len(trials)), "no run ended", *[""] * 5])
            continue
        seeds = repeats(runs, chosen)
        tried = str(len(trials)) if optim in BASELINES else "0"
        losses = spread([run.loss for run in seeds]) if seeds else "–"
        rows.append(
            [TITLES[optim], settings(chosen), tried, losses, str(len(seeds or raced)), in_steps(runs, seeds or raced)]
            + [ratio(in_time(runs, optim, kind)) for kind in ("plain", "compiled")]
            + [with_compiling(runs, optim)]
        )
    head = ["optimizer", "learning rate", "trials", "final training loss", "seeds"]
    head += ["steps, relative to Adam", "time, relative to Adam", "the same, compiled", "the same, with compiling"]
    return table(head, rows)


def endurance(runs: dict[str, list[Run]]) -> str:
    """Return a table of how every natural gradient's runs ended: one row per net, method and kind of run."""
    rows = []
    for net, found in runs.items():
        for optim in (name for name in TITLES if name not in BASELINES):
            for kind in ("", TWICE, *(f"batch {size}" for size in BATCHES)):
                ended = [run for run in found if run.optim == optim and run.kind == kind]
                if ended:
                    rows.append([NETS[net].title, TITLES[optim], *ending(ended)])
    head = ["net", "optimizer", "batch size", "seeds", "steps", "training loss at the start", "at the end"]
    return table([*head, "lower than at three quarters"], rows)


def ending(runs: Sequence[Run]) -> list[str]:
    """Return how runs that differ in the seed ended, in words.

    A run still learns at its end if its loss is lower than after three quarters of its points.
    """
    ended = [run for run in runs if math.isfinite(run.loss)]
    losses = [run.loss for run in ended]
    learning = sum(run.loss < run.points[3 * len(run.points) // 4 - 1][2] for run in ended)
    last = f"{min(losses):.4f} to {max(losses):.4f}" if len(losses) > 1 else "".join(f"{loss:.4f}" for loss in losses)
    failed = len(runs) - len(ended)
    return [
        str(runs[0].batch_size or "of the trainer"), str(len(runs)), f"{max(run.points[-1][0] for run in runs):,.0f}",
        f"{runs[0].points[0][2]:.3f}", last + (f", {failed} failed" if failed else ""), f"{learning} of {len(runs)}",
    ]  # fmt: skip


def repeats(runs: Sequence[Run], chosen: Run) -> list[Run]:
    """Return the whole runs with these settings, one per seed; a race of Adam, which goes to its end, is one too."""
    same = [run for run in runs if run.key[:4] == chosen.key[:4]]
    whole = {run.seed: run for run in same if run.kind == "plain" and run.optim == TARGET}
    whole |= {run.seed: run for run in same if not run.kind}
    return list(whole.values())


def settings(run: Run) -> str:
    """Return the settings of a run in words."""
    return "none" if run.lr is None else f"{run.lr:.2g}, {run.schedule}"


def spread(values: Sequence[float]) -> str:
    """Return mean ± standard deviation of the finished runs, and the number of diverged ones."""
    ended = [value for value in values if math.isfinite(value)]
    text = f"{statistics.mean(ended):.4f}" if ended else "–"
    text += f" ± {statistics.stdev(ended):.4f}" if len(ended) > 1 else ""
    return text + (f" ({len(values) - len(ended)} diverged)" if len(ended) < len(values) else "")


def in_steps(runs: Sequence[Run], seeds: Sequence[Run]) -> str:
    """Return the steps until the final loss of tuned Adam on the same seed, relative to Adam's steps."""
    adam = best([run for run in runs if run.optim == TARGET and run.seed == 0 and not run.kind])
    ends = {run.seed: run for run in runs if run.optim == TARGET and run.kind == "plain"}
    ends |= {run.seed: run for run in repeats(runs, adam)} if adam else {}
    ratios = []
    for run in seeds:
        if run.seed in ends and math.isfinite(ends[run.seed].loss):
            reached = [point[0] for point in run.points if point[2] <= ends[run.seed].loss]
            ratios.append(reached[0] / ends[run.seed].points[-1][0] if reached else math.inf)
    return ratio(ratios)


def in_time(runs: Sequence[Run], optim: str, kind: str, compiling: bool = False) -> list[float]:
    """Return the same ratio for the seconds of each race, with or without those of compiling."""
    adam = {run.seed: run for run in runs if run.optim == TARGET and run.kind == kind}
    raced = [run for run in runs if run.optim == optim and run.kind == kind and run.seed in adam]
    return [
        seconds(run, compiling) / seconds(adam[run.seed], compiling)
        if run.stopped == "reached" or optim == TARGET
        else math.inf
        for run in raced
        if not compiling or run.warm > COMPILED
    ]


def with_compiling(runs: Sequence[Run], optim: str) -> str:
    """Return the seconds of compiling and the ratio that includes them, of the races that began by compiling."""
    warm = [run.warm for run in runs if run.optim == optim and run.kind == "compiled" and run.warm > COMPILED]
    ratios = in_time(runs, optim, "compiled", compiling=True)
    return f"{ratio(ratios)}; {statistics.median(warm):.0f} s" if warm else ""


def seconds(run: Run, compiling: bool) -> float:
    """Return the seconds of a run, with those of compiling if asked."""
    return run.points[-1][1] + (run.warm if compiling else 0.0)


def ratio(values: Sequence[float]) -> str:
    """Return the median, and the range if there are several values."""
    if not values:
        return ""
    text = "not reached" if math.isinf(statistics.median(values)) else f"{statistics.median(values):.2f}"
    ends = ["–" if math.isinf(value) else f"{value:.2f}" for value in (min(values), max(values))]
    return text + (f" ({ends[0]} to {ends[1]})" if len(values) > 1 and math.isfinite(min(values)) else "")


def picture(runs: dict[str, list[Run]], path: Path) -> None:
    """Draw one row per net with baselines: training loss of these and of K-FAC, by step and by second of the race."""
    rows = {net: found for net, found in runs.items() if any(run.optim in BASELINES for run in found)}
    if not rows:
        return
    names = drawn([*BASELINES, "kfac"], rows)
    figure = new_figure(width=10.0, height=3.2 * len(rows) + 0.5)
    for axes, (net, found) in zip(figure.subplots(len(rows), 2, squeeze=False), rows.items(), strict=True):
        races = {name: [run for run in found if run.optim == name and run.kind == "plain"] for name in names}
        panel(axes[0], NETS[net].title, {name: whole(found, name) or races[name] for name in names}, "step")
        panel(axes[1], "until the final loss of tuned Adam", races, "seconds of training")
        axes[0].set_ylabel("training loss", color=INK)
        if not any(races.values()):
            axes[1].set_axis_off()
            axes[1].text(0.5, 0.5, "race not run", transform=axes[1].transAxes, ha="center", color=INK)
    legend(figure, names, path)


def methods(runs: dict[str, list[Run]], path: Path) -> None:
    """Draw training loss by step of every natural gradient on seed 0, a panel per net that has several, if any has."""
    natural = [name for name in TITLES if name not in BASELINES]
    rows = {net: found for net, found in runs.items() if len(drawn(natural, {net: found})) > 1}
    if not rows:
        return
    names = drawn(natural, rows)
    across = min(len(rows), 2)
    down = math.ceil(len(rows) / across)
    figure = new_figure(width=5.0 * across, height=3.3 * down + 0.7)
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for axes, (net, found) in zip(panels, rows.items(), strict=False):
        panel(axes, NETS[net].title, {name: [r for r in whole(found, name) if not r.seed] for name in names}, "step")
        axes.set_ylabel("training loss", color=INK)
    for axes in panels[len(rows) :]:
        axes.set_axis_off()
    legend(figure, names, path)


def drawn(names: Sequence[str], runs: dict[str, list[Run]]) -> list[str]:
    """Return the optimizers that have whole runs or races on any net."""
    return [
        name
        for name in names
        if any(run.optim == name and run.kind in ("", "plain") for found in runs.values() for run in found)
    ]


def whole(runs: Sequence[Run], name: str) -> list[Run]:
    """Return the whole runs of an optimizer with its best settings, one per seed."""
    chosen = best([run for run in runs if run.optim == name and run.seed == 0 and not run.kind])
    return repeats(runs, chosen) if chosen else []


def panel(axes: Axes, title: str, curves: dict[str, list[Run]], x: str) -> None:
    """Draw the runs of each optimizer without their initial losses, seed 0 strongest."""
    for index, found in enumerate(curves.values()):
        for run in found:
            shown = [(point[0 if x == "step" else 1], point[2]) for point in run.points if point[0]]
            axes.plot([a for a, _ in shown], [b for _, b in shown], **line(index), alpha=0.3 if run.seed else 1.0)
    dress(axes, title, x)
    scale(axes, [point[2] for found in curves.values() for run in found for point in run.points if point[0]])


def line(index: int) -> dict[str, Any]:
    """Return the style of an optimizer's lines."""
    return look(index) | {"linewidth": 1.2, "markersize": 0, "linestyle": "-" if index < len(PALETTE) else "--"}


def legend(figure: Figure, names: Sequence[str], path: Path) -> None:
    """Name the optimizers above the panels, and write the picture."""
    handles = [Line2D([], [], label=TITLES[name], **line(index)) for index, name in enumerate(names)]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(names), 7), frameon=False, labelcolor=INK)
    path.parent.mkdir(exist_ok=True)
    save_figure(figure, path)
