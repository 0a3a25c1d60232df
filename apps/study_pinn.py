"""Compare optimizers on physics-informed nets with published results: a table by steps, and a picture.

`python apps/study_pinn.py` runs `train_pinn` with each optimizer on each problem, one after another, and continues
where it was stopped. `--steps 0` only prints the table of the runs so far.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

from common.config import NON_NEGATIVE, SEED, option, parse
from common.pinn.optimizers import DEFAULTS, OPTIONS
from common.pinn.problems import PROBLEMS
from common.plots import PLAIN, save_figure, scale
from common.results import CHECKPOINT, MetricsError, read_metrics
from common.runs import reported
from train_pinn import PinnConfig, run

PUBLISHED = {
    "POISSON_2D": {
        "ENGD per layer": {100: 5.5e-3, 300: 2.7e-5, 1000: 2.1e-7},
        "ENGD": {100: 1.9e-1, 300: 1.6e-2, 1000: 1.1e-2},
        "K-FAC": {100: 2.9e-2, 300: 3.2e-3, 1000: 2.7e-4},
    },
    "HEAT": {"ENGD": {100: 1.3e-4, 300: 1.3e-6, 1000: 7.2e-8}},
    "POISSON_5D": {
        "ENGD (Woodbury)": {100: 1.3e-4, 300: 7.9e-6, 1000: 1.4e-6},
        "SPRING": {100: 3.2e-5, 300: 5.3e-6, 1000: 2.2e-6},
    },
}
"""Root mean square errors √mean (u − u*)² after some steps, from the authors' logs, at the last logged step.

Dangel, Müller & Zeinhofer 2024; Guzmán-Cordero et al. 2025.
"""

SIZES = {"POISSON_2D": 0.5, "HEAT": ((1 - math.exp(-(math.pi**2) / 2)) / math.pi**2) ** 0.5, "POISSON_5D": 2.5**0.5}
"""Root mean square √∫ u*² of each solution over the unit cube. A published error divided by it is a relative error."""

NAMES = {
    "exact": "exact", "exact_block": "exact per layer", "dense": "per layer, averaged", "spring": "SPRING",
    "kfac": "K-FAC", "kfac_by_term": "K-FAC per term", "adam": "Adam", "lbfgs": "L-BFGS",
}  # fmt: skip
COLOURS = dict(
    zip(
        NAMES,
        ("#0072B2", "#56B4E9", "#000080", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#999999"),
        strict=True,
    )
)


@dataclass(frozen=True)
class StudyConfig:
    """The settings of the study."""

    sections: ClassVar = {"problems": "study"}

    problems: str = option("POISSON_2D,HEAT", "equations, separated by commas")
    optims: str = option(",".join(DEFAULTS), "optimizers, separated by commas")
    steps: int = option(300, "steps of each run; 0: only the table of existing runs", check=NON_NEGATIVE)
    redraw: int | None = option(
        None,
        "steps between new training points; 0: never; default: as published",
        check=NON_NEGATIVE,
    )
    damping: float | None = option(None, "damping λ of all runs; default: that of each optimizer", check=NON_NEGATIVE)
    seed: int = option(0, "random seed of points and nets", check=SEED)
    result_dir: str = option("results", "folder for all results")
    picture: str | None = option(None, "file for the picture; default: pinn.png in the folder of the runs")


def runs(config: StudyConfig) -> Iterator[PinnConfig]:
    """Yield the configuration of each run."""
    for data in config.problems.split(","):
        for optim in config.optims.split(","):
            damping = config.damping if "damping" in OPTIONS[optim] else None
            given: dict[str, Any] = {"redraw": config.redraw, "damping": damping}
            more = "".join(f"-{name}{value:g}" for name, value in given.items() if value is not None)
            name = f"study-{data}-{optim}-{config.seed}{more}"
            folder = Path(config.result_dir) / PinnConfig.app / name
            yield PinnConfig(
                data=data, optim=optim, num_steps=max(config.steps, 1), seed=config.seed, **given,
                result_name=name, result_dir=config.result_dir, resume=(folder / CHECKPOINT).exists(), quiet=True,
                overwrite=folder.exists() and not (folder / CHECKPOINT).exists(),
            )  # fmt: skip


def measured(config: PinnConfig) -> dict[int, dict[str, float]]:
    """Return the measurements of a run by step; empty if there is no run."""
    try:
        found = read_metrics(Path(config.result_dir) / PinnConfig.app / str(config.result_name))
    except (MetricsError, OSError):
        return {}
    return {int(each["epoch"]): each for each in found}


def main(config: StudyConfig) -> dict[str, Any]:
    """Run what is missing; print the table, draw the picture, and return the measurements."""
    found: dict[str, dict[str, dict[int, dict[str, float]]]] = {}
    for each in runs(config):
        if config.steps and max(measured(each), default=0) < config.steps:
            print(f"{each.data} {each.optim} …", flush=True)
            run(each)
        found.setdefault(each.data, {})[each.optim] = measured(each)
    print("\n".join(table(found)))
    picture = Path(config.picture or Path(config.result_dir) / PinnConfig.app / "pinn.png")
    draw(picture, found)
    print(f"\nThe picture is {picture}.")
    return found


def table(found: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a table with the published rows below the measured ones."""
    yield "| problem | optimizer | 30 | 100 | 300 | 1,000 | seconds per step |"
    yield "|---|---|---|---|---|---|---|"
    for data, by_optim in found.items():
        for optim, steps in by_optim.items():
            errors = [f"{steps[step]['error']:.1e}" if step in steps else "" for step in (30, 100, 300, 1000)]
            pace = f"{steps[max(steps)]['seconds'] / max(steps):.3f}" if steps else ""
            yield f"| {data} | {NAMES[optim]} | {' | '.join(errors)} | {pace} |"
        for name, published in relative(data).items():
            errors = [f"{published[step]:.1e}" if step in published else "" for step in (30, 100, 300, 1000)]
            yield f"| {data} | *published: {name}* | {' | '.join(errors)} | |"


def relative(data: str) -> dict[str, dict[int, float]]:
    """Return the published errors of an equation, divided by the size of its solution."""
    return {
        name: {step: error / SIZES[data] for step, error in errors.items()}
        for name, errors in PUBLISHED.get(data, {}).items()
    }


def draw(file: Path, found: dict[str, Any]) -> None:
    """Draw the errors by steps, with the published ones as points."""
    figure, axes = plt.subplots(1, len(found), figsize=(5.4 * len(found), 4.2), layout="constrained", squeeze=False)
    for axis, (data, by_optim) in zip(axes[0], found.items(), strict=True):
        for optim, steps in ((optim, steps) for optim, steps in by_optim.items() if steps):
            errors = [each["error"] for each in steps.values()]
            axis.semilogx(list(steps), errors, color=COLOURS[optim], label=NAMES[optim])
        last = max((step for steps in by_optim.values() for step in steps), default=0)
        for marker, (name, published) in zip("osD", relative(data).items(), strict=False):
            shown = {step: error for step, error in published.items() if step <= last}
            axis.semilogx(list(shown), list(shown.values()), f"{marker}k", mfc="none", label=f"published: {name}")
        axis.set(title=PROBLEMS[data].title.split(",")[0], xlabel="step", ylabel="relative L2 error")
        axis.xaxis.set_major_formatter(PLAIN)
        axis.xaxis.set_minor_formatter(NullFormatter())
        scale(axis, [float(error) for line in axis.lines for error in line.get_ydata()])
        axis.legend(fontsize="small")
    file.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, file)
    plt.close(figure)


if __name__ == "__main__":
    with reported(), contextlib.suppress(KeyboardInterrupt):
        main(parse(StudyConfig, description=__doc__))
