"""The grid of a sweep: options of a trainer with several values, separated by commas; every combination is a run."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from common.config import ConfigError, option_names, read
from common.names import nearest
from common.train_config import TrainConfig
from common.trainer import NUMBERS

STARTS = ("seed", "init_params")
"""Options that change only where a run starts, and the order of its data."""

SWEPT = (*NUMBERS, *STARTS)
"""Options that may have several values."""

SHAPES = ("model", "data", "batch_size", "fisher_samples", "fisher_batch_size", "structure")
"""Options that change the shape of a tensor, so that their values cannot share a step."""

OF_ALL = ("num_epochs", "device", "compile", "download")
"""Options that all runs of a sweep share because they train together."""

TEXTS = ("config", "data_path")
"""Options whose value may contain a comma."""

Values = dict[str, list[Any]]
"""The values of each swept option, in the order of the command line."""


def parse_grid(Config: type[TrainConfig], argv: Sequence[str]) -> tuple[TrainConfig, Values]:
    """Read the options of a trainer; return the configuration with the first value of each, and all values.

    Raises:
        ConfigError: an unknown option, an option without a value, one that cannot be swept, or no grid.
    """
    names, base, lists = option_names(Config), list[str](), dict[str, list[str]]()
    for name, value in _pairs(argv):
        known = names.get(name.replace("-", "_"))
        if known is None and name != "config":
            near = nearest(name, names, cutoff=0.5)
            hint = (
                f"; did you mean --{near}?" if near else "; see --help for those of a sweep, and the trainer's --help"
            )
            raise ConfigError(f"unknown option --{name}{hint}")
        if value is None or "," not in value or (known or name) in TEXTS:
            base += [f"--{name}"] if value is None else [f"--{name}", value]
            lists.pop(str(known), None)  # the last one given counts, as everywhere
            continue
        lists[str(known)] = [part.strip() for part in value.split(",")]
    for name, texts in lists.items():
        _check_sweepable(name, texts)
    values = {name: [_value(Config, base, name, text) for text in texts] for name, texts in lists.items()}
    for name, found in values.items():
        _check_alike(name, found)
        for value in found:
            if found.count(value) > 1:
                raise ConfigError(f"{name} has the value {value} twice")
    first = [text for name, texts in lists.items() for text in (f"--{name}", texts[0])]
    config = read(Config, [*base, *first])
    if not values:
        raise ConfigError(f"an empty grid: give several values to an option, such as --lr 1e-1,1e-2; {_allowed()}")
    return config, values


def rows(values: Values) -> list[dict[str, Any]]:
    """Return every combination of the values; the last option changes fastest."""
    return [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]


def configured(config: TrainConfig, row: Mapping[str, Any]) -> TrainConfig:
    """Return the configuration of the single run that a row of the grid stands for."""
    return dataclasses.replace(config, **row)


def described(row: Mapping[str, Any]) -> str:
    """Return a row in words, such as "lr 0.1, seed 2"."""
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
    )


def slice_of(count: int, part: tuple[int, int] | None) -> list[int]:
    """Return the rows of a slice: every n-th, so that slices cost about the same; all rows without a slice."""
    return list(range(count)) if part is None else list(range(part[0], count, part[1]))


def _pairs(argv: Sequence[str]) -> list[tuple[str, str | None]]:
    """Split arguments into names and values; a switch such as `--compile` has none."""
    pairs: list[tuple[str, str | None]] = []
    for token in argv:
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            pairs.append((name, value if equals else None))
        elif pairs and pairs[-1][1] is None:
            pairs[-1] = (pairs[-1][0], token)
        else:
            raise ConfigError(f"unexpected argument {token}: separate values by commas without spaces")
    return pairs


def _check_sweepable(name: str, texts: Sequence[str]) -> None:
    if name not in SWEPT:
        kinds = ((SHAPES, "changes a shape"), (OF_ALL, "belongs to all runs, which train together"))
        why = next((why for names, why in kinds if name in names), "changes the operations of a step")
        raise ConfigError(f"{name} cannot be swept, because it {why}: start one sweep per value; {_allowed()}")
    empty = [text for text in texts if not text]
    if len(empty) == len(texts):
        raise ConfigError(f"an empty grid: {name} has no value; write them as --{name} a,b,c")
    if empty:
        raise ConfigError(f"{name} has an empty value in {','.join(texts)!r}: remove a comma")


def _check_alike(name: str, found: Sequence[Any]) -> None:
    """Raise an error for numbers next to "auto", or for a KL bound next to none: these are different steps."""
    if name not in NUMBERS:
        return
    numeric = [isinstance(value, (int, float)) and not (name == "kl_bound" and value == 0) for value in found]
    if any(numeric) and not all(numeric):
        raise ConfigError(
            f"{name} cannot be swept over numbers together with auto, null or no bound, because this changes the "
            "operations of a step: start one sweep per kind"
        )
    if not any(numeric):
        raise ConfigError(f"{name} has no number among its values: a sweep needs at least two numbers")
    if any(not math.isfinite(value) for value in found):
        raise ConfigError(f"{name} must be finite")


def _value(Config: type[TrainConfig], base: Sequence[str], name: str, text: str) -> Any:
    return getattr(read(Config, [*base, f"--{name}", text]), name)


def _allowed() -> str:
    return f"options that can have several values: {', '.join(SWEPT)}"
