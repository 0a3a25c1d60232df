"""Overlay several runs: `python apps/plot.py results/train_mlp/* --out comparison.png`; GAN runs with GAN runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from common.gan.pictures import curves
from common.plots import loss_curves
from common.results import MetricsError, read_metrics, result_folders
from common.runs import reported


def plot(places: Sequence[Path], out: Path | None) -> Path:
    """Draw every run among `places` and directly inside them; return the path of the picture."""
    folders = result_folders(places)
    for missing in (place for place in places if not place.exists()):
        raise MetricsError(f"there is no folder {missing}: name result folders, such as results/train_mlp/*")
    if not folders:
        where = ", ".join(map(str, places))
        raise MetricsError(f"no results in {where}: name folders with a metrics.jsonl, or folders of such folders")
    path = out or Path(os.path.commonpath([folder.parent for folder in folders])) / "comparison.png"
    if path.suffix.lower() != ".png":
        raise MetricsError(f"the picture is a PNG: give --out a name that ends in .png, not {path}")
    if not path.parent.is_dir():
        raise MetricsError(f"there is no folder {path.parent} to put the picture in")
    runs = {name: _losses(folder) for name, folder in zip(_names(folders), folders, strict=True)}
    games = [any("gen_loss" in m for m in metrics) for metrics in runs.values()]
    if any(games) and not all(games):
        raise MetricsError("GAN runs and others have no common losses: plot them separately")
    (curves if any(games) else loss_curves)(runs, path)
    return path


def _losses(folder: Path) -> list[dict[str, float]]:
    """Return the metrics of a run that has losses to draw."""
    metrics = read_metrics(folder)
    if any("run" in line for line in metrics):
        raise MetricsError(f"{folder} has the many runs of a sweep: see its sweep.png, or name single runs")
    if not any(name in line for line in metrics for name in ("train_loss", "gen_loss")):
        raise MetricsError(f"{folder} has no epoch with a training loss: leave it out")
    return metrics


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths, of equal length, that tell the folders apart."""
    paths = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, paths))):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [str(folder.resolve()) for folder in folders]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "results", nargs="+", type=Path, metavar="RESULT", help="result folder, or a folder of result folders"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="PNG file; default: comparison.png in the folder of the results"
    )
    arguments = parser.parse_args(argv)
    with reported():
        try:
            print(plot(arguments.results, arguments.out))
        except MetricsError as error:
            print(f"plot.py: error: {error}", file=sys.stderr)
            raise SystemExit(2) from None


if __name__ == "__main__":
    main()
