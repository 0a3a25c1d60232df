"""Pictures of a GAN run: the grid of every epoch, all grids as an animation and a contact sheet, curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from common import atomic
from common.plots import INK, Metrics, dress, look, new_figure, save_figure, scale

COLUMNS = 8
"""Images per row of a grid, and number of rows."""
ENLARGED = 2
SHOWN = 6
"""Number of grids on a contact sheet."""
ANIMATED = 60
"""Largest number of frames of the animation."""


def grid(images: Tensor, path: Path) -> None:
    """Arrange images [N, C, H, W] in [0, 1] in rows of eight, one pixel apart, at twice their size."""
    n, c, h, w = images.shape
    columns = min(COLUMNS, n)
    rows = math.ceil(n / columns)
    canvas = torch.ones(rows * columns, c, h + 1, w + 1)
    canvas[:n, :, :h, :w] = images.detach().cpu()
    whole = canvas.reshape(rows, columns, c, h + 1, w + 1).permute(2, 0, 3, 1, 4).reshape(c, rows * (h + 1), -1)
    whole = F.interpolate(whole[None], scale_factor=ENLARGED)[0]
    pixels = (whole.clamp(0, 1) * 255).round().byte()
    picture = Image.fromarray(pixels[0].numpy() if c == 1 else pixels.movedim(0, -1).numpy())
    atomic.replace(path, lambda file: picture.save(file, format="PNG"))


def animation(frames: Sequence[Path], path: Path) -> None:
    """Write the grids as a repeating GIF; of many grids, evenly spaced ones."""
    pictures = [Image.open(frame).convert("P") for frame in _chosen(frames, ANIMATED)]
    durations = [120] * (len(pictures) - 1) + [1500]
    first, *rest = pictures

    def write(file: object) -> None:
        first.save(file, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0)  # type: ignore[arg-type]

    atomic.replace(path, write)


def contact_sheet(frames: Sequence[Path], metrics: Metrics, path: Path) -> None:
    """Draw some grids side by side, including the first and the last, with their epochs and FIDs."""
    chosen = _chosen(frames, SHOWN)
    by_epoch = {int(m["epoch"]): m for m in metrics}
    figure = new_figure(width=2.9 * len(chosen), height=3.2)
    for axes, frame in zip(figure.subplots(1, len(chosen), squeeze=False)[0], chosen, strict=True):
        axes.imshow(Image.open(frame), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        epoch = epoch_of(frame)
        fid = by_epoch.get(epoch, {}).get("fid")
        axes.set_title(f"epoch {epoch}" + (f", FID {fid:.3g}" if fid is not None else ""), color=INK, fontsize=11)
        axes.set_axis_off()
    save_figure(figure, path)


def curves(runs: Mapping[str, Metrics], path: Path) -> Figure:
    """Draw FID, critic loss and generator loss over generator steps, and FID over seconds, for each run.

    Args:
        runs: metrics by the name in the legend.
        path: the PNG to write.
    """
    panels = (("fid", "step", "FID"), ("fid", "seconds", "FID by time"), ("crit_loss", "step", "critic loss"),
              ("gen_loss", "step", "generator loss"))  # fmt: skip
    figure = new_figure(width=18.0, height=4.4)
    for axes, (quantity, x, title) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for index, (name, metrics) in enumerate(runs.items()):
            points = [(m[x], m[quantity]) for m in metrics if quantity in m and math.isfinite(m[quantity])]
            axes.plot([p[0] for p in points], [p[1] for p in points], label=name, **look(index) | {"marker": ""})
        dress(axes, title, "generator step" if x == "step" else "seconds of training")
        if quantity == "fid":
            scale(axes, [m["fid"] for metrics in runs.values() for m in metrics if "fid" in m])
    floor = next((m["fid_test"] for metrics in runs.values() for m in metrics if "fid_test" in m), None)
    if floor is not None:
        for axes in figure.axes[:2]:
            axes.axhline(floor, color=INK, linewidth=1, linestyle=":")
        figure.axes[0].annotate("held-out real images", (0.99, floor), xycoords=("axes fraction", "data"), ha="right",
                                va="bottom", color=INK, fontsize=8)  # fmt: skip
    handles, names = figure.axes[2].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, labelcolor=INK)
    return save_figure(figure, path)


def epoch_of(frame: Path) -> int:
    """Return the epoch in the name of a grid, `epoch-0012.png`."""
    return int(frame.stem.rpartition("-")[2])


def _chosen(frames: Sequence[Path], count: int) -> list[Path]:
    """Choose at most `count` evenly spaced items, including the first and the last."""
    if len(frames) <= count:
        return list(frames)
    return [frames[round(i * (len(frames) - 1) / (count - 1))] for i in range(count)]
