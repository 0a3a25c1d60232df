"""Measure the error of each method's Fisher for every layer, along a run of Adam: the published comparison.

`python apps/approximation_error.py --data CURVES` trains the CURVES autoencoder. At every `--every`-th step it
measures, for every layer and method, the relative Frobenius error ‖F − F̂‖ / ‖F‖ on the sampled Fisher F of that
step's batch; and at every `--spectra_every`-th step, because these cost more, the relative error of F̂'s leading
eigenvalues, the KL divergence of the damped blocks, and the angle in degrees between the method's step and the exact
block natural gradient at the same λ. Each method starts from the same statistics, of one batch without averages.
`result.json` has all numbers; tables of the means over the last half of the run and two pictures summarise them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

import fisherfn as ff
from common.atomic import empty_folder, replace_text
from common.config import NON_NEGATIVE, POSITIVE, SEED, Check, ConfigError, filled, option, parse, validate
from common.data import load
from common.loop import Task
from common.plots import Points, curve_grid
from common.results import ResultExistsError, default_name
from common.runs import reported
from common.spectra import GRADIENT, Values, compare
from common.train_config import APPS, LABELS, TrainConfig
from common.trainer import FIXED, make_optimizer, make_task, natural_gradient, tuned

FOLDER, RESULT = "approximation_error", "result.json"

METHODS = ("kfac", "kpsvd", "kfac_cor", "deflation", "lanczos", "kl_optimal", "ekfac")
"""Methods that approximate the block of a layer."""

NAMES = LABELS | {GRADIENT: "plain gradient"}
STROKES = {NAMES["lanczos"]: (0, (3, 3)), NAMES[GRADIENT]: ":"}
"""Line styles: dashes, because Lanczos and Deflation coincide."""

COLUMNS = 8192
"""Largest number of examples times samples; the errors need a square matrix of this size, half a gigabyte."""

TITLES = {
    "error": "Relative Frobenius error ‖F − F̂‖ / ‖F‖",
    "eigenvalues": "Relative ℓ2 error of the {eigenvalues} leading eigenvalues",
    "divergence": "KL divergence in nats from the exact block, both damped, λ = {damping:g}",
    "angle": "Degrees between the step and the exact block natural gradient, λ = {damping:g}",
}


def named(methods: str) -> list[str]:
    """Return the methods of the option, each once."""
    return list(dict.fromkeys(name.strip() for name in methods.split(",")))


KNOWN = Check(f"comma-separated names from {', '.join(METHODS)}", lambda text: set(named(text)) <= set(METHODS))
PLAIN = Check("a folder's name, without /", lambda name: name.strip(". ") != "" and Path(name).name == name)


@dataclass(frozen=True)
class ErrorConfig:
    """The settings of the training and of the measurements."""

    app: str = option("train_mlp", "trainer whose nets and data are used", choices=APPS)
    data: str | None = option(None, "data set; default: that of the trainer", aliases=("dataset",))
    data_path: str | None = option(None, "folder with the data files; default: ./data", aliases=("data_root",))
    download: bool = option(False, "fetch published files that are missing")
    model: str | None = option(None, "model; default: the one for the data")
    batch_size: int | None = option(None, "batch size; default: that of the trainer", check=POSITIVE)
    steps: int = option(1200, "steps of Adam", check=NON_NEGATIVE)
    lr: float | None = option(
        None, "learning rate of Adam; default: the tuned value", aliases=("learning_rate",), check=POSITIVE
    )

    every: int = option(25, "steps between measurements of the error", check=POSITIVE)
    spectra_every: int = option(
        200, "steps between measurements of eigenvalues and angle; 0: never", check=NON_NEGATIVE
    )
    methods: str = option(",".join(METHODS), "comma-separated methods", check=KNOWN)
    fisher: Literal["mc", "type2", "empirical"] = option(
        "mc", "labels: sampled, exact expectation, or those of the data"
    )
    fisher_samples: int = option(1, "sampled labels per example, for mc", check=POSITIVE)
    damping: float | None = option(None, "λ of the compared steps; default: 1", check=POSITIVE)
    damping_form: Literal["factored", "eigen"] = option("factored", "form of the damping")
    eigenvalues: int = option(
        50, "number of leading eigenvalues", check=Check("from 1 to 200", lambda count: 1 <= count <= 200)
    )

    seed: int = option(0, "random seed", check=SEED)
    result_dir: str = option("results", "folder for results")
    result_name: str | None = option(None, "name of the result folder; default: from data, model and seed", check=PLAIN)
    overwrite: bool = option(False, "replace an existing result of that name")
    quiet: bool = option(False, "no progress bar")

    def __post_init__(self) -> None:
        validate(self)
        validate(self.trainer())

    def trainer(self) -> TrainConfig:
        """Return the configuration of the trainer that has these nets and data, with Adam."""
        given = {field.name: getattr(self, field.name, None) for field in dataclasses.fields(TrainConfig)}
        return APPS[self.app](**{name: value for name, value in given.items() if value is not None} | {"optim": "adam"})


class Record(NamedTuple):
    """The measurements of one step: by quantity, layer and method."""

    step: int
    loss: float
    values: Values


def run(config: ErrorConfig) -> Path:
    """Train, measure and write the results, also of an interrupted run; return the result folder."""
    config, full, task = prepared(config)
    folder = Path(config.result_dir) / FOLDER / (config.result_name or default_name(config))
    if folder.exists() and not config.overwrite:
        raise ResultExistsError(f"{folder} exists already: give --overwrite, or another --result_name")
    if folder.exists() and any(folder.iterdir()) and not is_result(folder):
        raise ResultExistsError(f"{folder} has no {RESULT} of this program in it: it is not overwritten")
    nets = natural_gradients(config, full, task)
    records: list[Record] = []
    folder.mkdir(parents=True, exist_ok=True)  # an error of the folder should come before hours of measurements
    try:
        for record in measurements(config, full, task, nets):
            records.append(record)
    finally:
        if records:
            layout = next(iter(nets.values())).layout
            report(folder, config, {block.key: block.shape for block in layout.blocks}, records)
        else:
            with contextlib.suppress(OSError):  # an earlier result, if there is one, stays
                folder.rmdir()
    return folder


def is_result(folder: Path) -> bool:
    """Return whether a folder has a result of this program."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        return isinstance(found, dict) and {"config", "records"} <= found.keys()
    return False


def prepared(config: ErrorConfig) -> tuple[ErrorConfig, TrainConfig, Task]:
    """Return both configurations with all defaults filled in, and model and data."""
    full = config.trainer()
    data = load(full.data, data_path=full.data_path, seed=full.seed, download=full.download)
    model = full.model or full.model_for(data)
    rate = tuned(full.app, model, data.name, "adam")["lr"]
    full = filled(full, {"model": model, "lr": rate, "damping": FIXED["damping"]})
    found = {name: getattr(full, name) for name in ("data", "model", "batch_size", "lr", "damping")}
    return dataclasses.replace(config, **found), full, make_task(full, data)[0]


def natural_gradients(config: ErrorConfig, full: TrainConfig, task: Task) -> dict[str, ff.NaturalGradient]:
    """Build one natural gradient per method; all pairs of the Fisher's columns must fit into memory."""
    ng = natural_gradient(dataclasses.replace(full, optim="kfac"), task)
    draws = {"mc": full.fisher_samples, "type2": math.prod(ng.layout.output_shape), "empirical": 1}[full.fisher]
    columns = draws * min(full.batch_size, len(task.train[0]))
    if columns > COLUMNS:
        raise ConfigError(
            f"a Fisher of {columns:,} columns (examples times samples, or times outputs with type2) is too large to "
            f"compare with, {COLUMNS:,} are not: give a smaller --batch_size, or --fisher mc with few --fisher_samples"
        )
    methods = {name: ff.METHODS[name](damping_form=config.damping_form) for name in named(config.methods)}
    return {name: dataclasses.replace(ng, method=method) for name, method in methods.items()}


# ---------------------------------------------------------------------------------------------------------- the run


def measurements(
    config: ErrorConfig, full: TrainConfig, task: Task, nets: Mapping[str, ff.NaturalGradient]
) -> Iterator[Record]:
    """Run Adam, and measure before the first step, at the due steps and at the end."""
    adam = make_optimizer(full, task)
    params, context, state = task.params, task.context, adam.init(task.params)
    bar = tqdm(range(config.steps + 1), desc=f"{config.data} adam", disable=True if config.quiet else None, unit="step")
    for step, batch in zip(bar, batches(task, full.batch_size, config.seed), strict=False):
        wide = config.spectra_every > 0 and step % config.spectra_every == 0
        if wide or step % config.every == 0:
            labels, count = seeded(config.seed, step, stream=1), config.eigenvalues if wide else 0
            loss, values = compare(nets, params, batch, float(full.damping or 0.0), count, labels, context)
            yield Record(step, loss / task.per_output, values)
        new = adam.step(params, state, batch, context, (), step)
        ff.check(new.info)
        params, context, state = new.params, new.context, new.state
        bar.set_postfix_str(f"loss {float(new.info.loss) / task.per_output:.4g}", refresh=False)


def batches(task: Task, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled batches without end, all of one size, because the error depends on the number of examples."""
    examples = task.train[0].shape[0]
    for epoch in itertools.count():
        order = torch.randperm(examples, generator=seeded(seed, epoch, stream=0))
        for chosen in order.split(min(size, examples))[: max(1, examples // size)]:
            yield task.train[0][chosen], task.train[1][chosen]


def seeded(seed: int, index: int, stream: int) -> torch.Generator:
    """Return the generator of an epoch's order or a step's labels, independent of earlier measurements."""
    return torch.Generator().manual_seed(((seed * 1_000_003 + index) * 2 + stream) % 2**63)


# ------------------------------------------------------------------------------------------------------- the report


def report(folder: Path, config: ErrorConfig, shapes: dict[str, tuple[int, int, int]], records: list[Record]) -> None:
    """Write the JSON and the pictures, and print the tables."""
    empty_folder(folder, last=RESULT)
    measured = {q: title.format(**vars(config)) for q, title in TITLES.items() if any(q in r.values for r in records)}
    means = {quantity: last_half(records, quantity) for quantity in measured}
    whole = {"config": dataclasses.asdict(config), "layers": shapes, "last_half": means, "records": records}
    replace_text(folder / RESULT, json.dumps(plain(whole), indent=1, allow_nan=False))
    layers = {key: f"{key} · {'×'.join(map(str, shape[shape[0] == 1 :]))}" for key, shape in shapes.items()}
    for quantity, title in measured.items():
        print(f"\n{title}; mean over the last half\n{table(means[quantity], layers)}")
    groups = [(title, curves(records, quantity, layers)) for quantity, title in measured.items()]
    curve_grid(groups[:1], folder / "errors.png", log=[True], strokes=STROKES)
    if groups[1:]:
        curve_grid(groups[1:], folder / "spectra.png", log=[True, True, False], strokes=STROKES)
    print(f"\nresult.json and the pictures are in {folder}.")


class Mean(NamedTuple):
    """The mean of the available numbers (NaN if there are none), their count, and the possible count."""

    value: float
    numbers: int
    of: int


def last_half(records: list[Record], quantity: str) -> dict[str, dict[str, Mean]]:
    """Return means over the records of the last half of the run, by layer and method."""
    there = [record for record in records if quantity in record.values]
    late = [record.values[quantity] for record in there if 2 * record.step >= there[-1].step]

    def mean(key: str, name: str) -> Mean:
        numbers = [values[key][name] for values in late if math.isfinite(values[key][name])]
        return Mean(statistics.fmean(numbers) if numbers else math.nan, len(numbers), len(late))

    return {key: {name: mean(key, name) for name in methods} for key, methods in late[0].items()}


def table(means: dict[str, dict[str, Mean]], layers: dict[str, str]) -> str:
    """Format a table with one line per layer and one column per method; incomplete means show their counts."""
    names = next(iter(means.values()))
    lines = [["", *(NAMES[name] for name in names)]]
    lines += [[layers[key], *(cell(mean) for mean in methods.values())] for key, methods in means.items()]
    wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        f"{label:{wide[0]}}" + "".join(f"  {text:>{width}}" for text, width in zip(cells, wide[1:], strict=True))
        for label, *cells in lines
    )


def cell(mean: Mean) -> str:
    """Format a number with three digits, or a dash."""
    number = f"{mean.value:.3g}" if mean.numbers else "–"
    return number if mean.numbers == mean.of else f"{number} ({mean.numbers} of {mean.of})"


def curves(records: list[Record], quantity: str, layers: dict[str, str]) -> dict[str, dict[str, Points]]:
    """Return the points (step, value) of a picture, by layer and method."""
    there = [(record.step, record.values[quantity]) for record in records if quantity in record.values]
    return {
        label: {NAMES[name]: [(step, values[key][name]) for step, values in there] for name in there[0][1][key]}
        for key, label in layers.items()
    }


def plain(value: Any) -> Any:
    """Convert a value for JSON: named tuples to objects, non-finite numbers to null."""
    if isinstance(value, Record | Mean):
        return plain(value._asdict())
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    with reported():
        run(parse(ErrorConfig, description=__doc__ or ""))
