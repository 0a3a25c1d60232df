"""Train a whole grid of settings at once: `python apps/sweep.py --app train_mlp --optim kfac --lr 1,0.1 --seed 0,1,2`.

Options of the trainer that have several values, separated by commas, span a grid. Every combination is a run; the runs
of a group share each step (`torch.vmap`), and each ends as its single run would. The result folder has `table.csv`,
`sweep.png`, and the configurations of the best runs, `best.yml` (training loss) and `best_test.yml`, which the trainer
reads: `python apps/train_mlp.py --config results/sweep/NAME/best.yml`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from common import ranks
from common.config import POSITIVE, Check, ConfigError, option, option_names, parse
from common.data import Data, load
from common.loop import Task
from common.memory import keep_freed_memory
from common.results import ResultExistsError, plain_name
from common.runs import check_device, reported, stopped, watched_saver
from common.sweep import auto, folder, report, stages
from common.sweep.grid import SWEPT, Values, configured, parse_grid, rows, slice_of
from common.sweep.group import Problem
from common.train_config import APPS, TrainConfig
from common.trainer import Supervised, check_options, make_task


@dataclass(frozen=True)
class SweepConfig:
    """The settings of a sweep; all other options are those of the trainer."""

    file: ClassVar[str] = "YAML file with options of the trainer"

    app: str = option("train_mlp", "trainer", choices=APPS)
    models_at_once: int | Literal["auto"] = option(
        "auto", "models that share a step; auto: by measured time and memory", check=POSITIVE
    )
    data_order: Literal["own", "shared"] = option(
        "own", "own: data and order follow each run's seed, as in single runs; shared: those of the first seed for all"
    )
    halving: int | None = option(
        None, "successive halving by N: keep the best of every N runs, and train them N times as long",
        check=Check(">= 2", lambda value: value >= 2),
    )  # fmt: skip
    population: int | None = option(
        None, "population-based training: after so many epochs the best quarter replaces the worst", check=POSITIVE
    )
    by: Literal["train_loss", "test_loss"] = option("train_loss", "metric that ranks runs")
    slice: str | None = option(
        None,
        "i/n: the i-th of n parts, counted from 0; env: from Slurm's or torchrun's variables; merge: join all parts",
    )
    result_dir: str = option("results", "folder for all results")
    result_name: str | None = option(None, "name of the result folder; default: from data and optimizer")
    overwrite: bool = option(False, "replace an existing result of that name")
    resume: bool = option(False, "continue an existing sweep")
    save_every: int | None = option(None, "steps between checkpoints within an epoch; default: none", check=POSITIVE)
    quiet: bool = option(False, "print only the table")

    def __post_init__(self) -> None:
        if self.halving and self.population:
            raise ConfigError("halving and population exclude each other: give only one")
        if self.overwrite and self.resume:
            raise ConfigError("overwrite and resume exclude each other: give only one")


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return the arguments of the sweep and those of the trainer."""
    own, rest, mine = list[str](), list[str](), False
    names = {*option_names(SweepConfig), "help"}
    for token in argv:
        if token.startswith("--"):
            mine = token[2:].partition("=")[0].replace("-", "_") in names
        (own if mine or token == "-h" else rest).append(token)
    return own, rest


def with_file(sweep: SweepConfig, config: TrainConfig, own: list[str]) -> SweepConfig:
    """Return the settings with those of the trainer's `--config` file that a sweep also has and the command lacks."""
    given = {token[2:].partition("=")[0].replace("-", "_") for token in own}
    fields = [field.name for field in dataclasses.fields(SweepConfig) if hasattr(config, field.name)]
    open_ones = {name: getattr(config, name) for name in fields if name not in given and name != "app"}
    return dataclasses.replace(sweep, **open_ones)


def part_of(text: str | None) -> tuple[int, int] | None:
    """Return (i, n) of a slice."""
    if text is None or text == "merge":
        return None
    first, bar, count = (_from_environment() if text == "env" else text).partition("/")
    if not (bar and first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise ConfigError(f"slice must be i/n with 0 <= i < n, or env, or merge; got {first}{bar}{count}")
    return int(first), int(count)


def _from_environment() -> str:
    """Return i/n of this process of a Slurm array, or of torchrun."""
    environ = os.environ
    if {"SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"} <= environ.keys():
        number, count = environ["SLURM_ARRAY_TASK_ID"], environ["SLURM_ARRAY_TASK_COUNT"]
        first, last = environ.get("SLURM_ARRAY_TASK_MIN", "0"), environ.get("SLURM_ARRAY_TASK_MAX")
        if not count.isdecimal() or count == "1" or first != "0" or last not in (None, str(int(count) - 1)):
            raise ConfigError(
                f"job {number} of a Slurm array of {count} cannot tell its part: number the array from 0 without gaps, "
                "and start a single part with --slice i/n"
            )
        return f"{number}/{count}"
    if {"RANK", "WORLD_SIZE"} <= environ.keys():
        return f"{environ['RANK']}/{environ['WORLD_SIZE']}"
    raise ConfigError("slice env needs SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT, or RANK and WORLD_SIZE")


def main(argv: list[str]) -> Path:
    """Run a sweep, or a part of it, and return its result folder."""
    own, rest = split(argv)
    listed = f"Options of the trainer that can have several values: {', '.join(SWEPT)}."
    sweep = parse(SweepConfig, own, description=f"{__doc__}\n{listed}")
    try:
        config, values = parse_grid(APPS[sweep.app], rest)
        sweep = with_file(sweep, config, own)
        part = part_of(sweep.slice)
    except ConfigError as error:
        print(f"sweep.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if part is None and ranks.started():
        raise ConfigError("torchrun started several processes: give --slice env, so that each trains its part")
    name = plain_name(sweep.result_name or f"{config.data}-{config.optim}".replace(":", "-"))
    whole = Path(sweep.result_dir) / "sweep" / name
    folder.check_options(config)
    given = config.device
    config = dataclasses.replace(config, result_name=None, device=ranks.own(given))
    own_settings = {each: getattr(sweep, each) for each in ("app", "halving", "population", "by", "data_order")}
    settings = folder.settings_of(config, values, own_settings)
    if part is not None and (whole / folder.FILE).exists():
        raise ResultExistsError(f"{whole} has a sweep without parts: give the parts another --result_name")
    if sweep.slice == "merge":
        return merge(whole, config, values, sweep, settings)
    path = whole if part is None else whole / f"slice-{part[0]}-of-{part[1]}"
    grid = rows(values)
    mine = slice_of(len(grid), part)
    if not mine:
        raise ConfigError(f"this slice has no runs: the grid has only {len(grid)}")
    plan = planned(len(mine), config.num_epochs, sweep)
    check_device(config.device)
    config, problem = make_problem(config, grid, shared=sweep.data_order == "shared")
    # after the errors of options, data and nets
    config = dataclasses.replace(config, device=given)
    with folder.opened(path, settings | {"slice": part}, overwrite=sweep.overwrite, resume=sweep.resume):
        return train(path, config, problem, values, mine, plan, sweep)


def train(
    path: Path, config: TrainConfig, problem: Problem, values: Values, mine: list[int], plan: list[stages.Stage],
    sweep: SweepConfig,
) -> Path:  # fmt: skip
    """Train the runs of this process, and write table, picture and best configurations."""
    trained = max((line["epoch"] for line in stages.read(path / "metrics.jsonl")), default=0)
    if trained > config.num_epochs:
        raise ConfigError(f"{path} has trained {trained} epochs: to resume it, num_epochs must be at least as many")
    examples = problem.task.train[0].shape[0]
    steps = config.num_epochs * math.ceil(examples / config.batch_size)
    size = group_size(path, problem, mine, steps, sweep)
    say(sweep, f"{len(mine)} runs of {steps} steps, {size} at once")
    with stopped() as signals:
        saver = watched_saver(sweep.save_every, signals)

        def record(lines: list[dict[str, object]]) -> None:
            stages.append(path / "metrics.jsonl", lines)
            best = min(stages.score(line, sweep.by) for line in lines)
            shown = f"best {sweep.by} {best:.5f}" if math.isfinite(best) else "none is left"
            say(sweep, f"runs {lines[0]['run']}…{lines[-1]['run']}  epoch {lines[0]['epoch']:3}  {shown}")

        stages.Sweep(problem, mine, plan, size, path / "checkpoints", sweep.by, record, saver, config.seed).run()
    print(report.write(path, config, values, rows(values), stages.read(path / "metrics.jsonl"), sweep.by))
    say_files(path, sweep)
    return path


def make_problem(config: TrainConfig, grid: list[dict[str, object]], shared: bool) -> tuple[TrainConfig, Problem]:
    """Return the completed configuration and the runs, each with the data of its seed."""

    @functools.lru_cache(maxsize=1)  # the problem keeps one copy of equal data, and no others should stay
    def data(seed: int) -> Data:
        return load(config.data, data_path=config.data_path, seed=seed, download=config.download)

    def task(each: TrainConfig) -> Task:
        return make_task(each, data(first.seed if shared else each.seed))[0]

    first = configured(config, grid[0])
    check_options(first, swept=grid[0])
    completed = Supervised.completed(first, data(first.seed))
    return completed, Problem(completed, grid, task, shared_data=shared)


def planned(members: int, epochs: int, sweep: SweepConfig) -> list[stages.Stage]:
    """Return the stages.

    Raises:
        ConfigError: runs or epochs are too few for the selection that was asked for.
    """
    here = f"there are {members} (of this part) and {epochs}"
    if sweep.halving:
        least = sweep.halving
        if min(members, epochs) < least:
            raise ConfigError(f"halving {least} needs at least {least} runs and {least} epochs: {here}")
        return stages.halving(members, epochs, least)
    if sweep.population:
        if members < 4 or epochs <= sweep.population:
            raise ConfigError(f"population {sweep.population} needs at least 4 runs and more epochs than that: {here}")
        return stages.population(members, epochs, sweep.population)
    return [stages.Stage(epochs)]


def group_size(path: Path, problem: Problem, mine: list[int], steps: int, sweep: SweepConfig) -> int:
    """Return the number of models per group; a resumed sweep keeps it, because it may change the last bits.

    Raises:
        ConfigError: the resumed sweep has groups of another size than the given one.
    """
    file = path / folder.FILE
    content = stages.read_settings(file)
    if "models_at_once" in content and sweep.models_at_once not in ("auto", content["models_at_once"]):
        raise ConfigError(
            f"{path} was started with models_at_once {content['models_at_once']}, not {sweep.models_at_once}: leave it "
            "out to resume, or start again with --overwrite"
        )
    if "models_at_once" not in content:
        content["models_at_once"] = sweep.models_at_once
        if sweep.models_at_once == "auto":
            content["models_at_once"], found = auto.choose(problem, mine, steps)
            content["measured"] = [each._asdict() for each in found]
            for each in found:
                say(sweep, f"{each.members:4} at once: {1e3 * each.seconds:.2f} ms per step and model")
        stages.write_json(file, content)
    return int(content["models_at_once"])


def merge(whole: Path, config: TrainConfig, values: Values, sweep: SweepConfig, settings: dict[str, object]) -> Path:
    """Write the results of all slices as those of one sweep."""
    parts = folder.parts_of(whole, settings)
    found = {part: stages.read(part / "metrics.jsonl") for part in parts}
    lines = [line for each in found.values() for line in each]
    grid = rows(values)
    given = config.device  # merging trains nothing, and works where no GPU is
    config, _ = make_problem(dataclasses.replace(config, device="cpu"), grid[:1], shared=False)
    config = dataclasses.replace(config, device=given)
    print(report.write(whole, config, values, grid, lines, sweep.by))
    last = {line["run"]: line["epoch"] for line in lines}
    report_runs("are missing", set(range(len(grid))) - last.keys(), len(grid))
    if sweep.halving:  # only some runs of a part train to the end
        early = [
            part.name
            for part, each in found.items()
            if max((line["epoch"] for line in each), default=-1) < config.num_epochs
        ]
        if early:
            print(f"parts that have not ended: {', '.join(early)}", file=sys.stderr)
    else:
        report_runs("have not ended", {run for run, epoch in last.items() if epoch < config.num_epochs}, len(grid))
    return whole


def report_runs(what: str, found: set[int], total: int) -> None:
    """Name runs without results, on the error stream."""
    if found:
        shown = ", ".join(map(str, sorted(found)[:10]))
        print(f"{len(found)} of {total} runs {what}: {shown}{', …' if len(found) > 10 else ''}", file=sys.stderr)


def say_files(path: Path, sweep: SweepConfig) -> None:
    """Name the files that were written, and say if no run is left."""
    bests = [name for name in report.BESTS.values() if (path / name).exists()]
    if not bests:
        print('no run is left, so there is no best one: see the column "stopped" of table.csv', file=sys.stderr)
    say(sweep, f"Everything is in {path}: {', '.join(['table.csv', 'sweep.png', *bests])} and metrics.jsonl.")


def say(sweep: SweepConfig, text: str) -> None:
    """Print a line, unless the sweep is quiet."""
    if not sweep.quiet:
        print(text, flush=True)


if __name__ == "__main__":
    keep_freed_memory()
    with reported():
        main(sys.argv[1:])
