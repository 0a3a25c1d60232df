"""The options of any app: one frozen dataclass, read from the command line and a YAML file by jsonargparse.

A field is an option. In addition to its type and default, `option` records its help, its other names and the rule for
its values:

    @dataclass(frozen=True)
    class Config:
        sections: ClassVar = {"batch_size": "optimization", "fisher": "curvature"}  # by their first fields

        batch_size: int = option(256, "batch size", check=POSITIVE)
        update_every: int = option(10, "steps between statistics", aliases=("T_cov",), check=POSITIVE)
        optim: str = option("kfac", "optimizer", choices=lambda: OPTIMIZERS)
        fisher: Literal["mc", "type2"] = option("mc", "labels of the Fisher")

`--update_every 5`, `--update-every 5`, `--T_cov=5` and the YAML lines `update_every: 5` and `T_cov: 5` are the same.
The help and the file are in `sections`, in this order; a title may be repeated, where a subclass adds to a section.

jsonargparse splits arguments, converts the values of both sources by the field's type and writes the help. This module
adds three things: it suggests the closest name for an unknown option, refuses a file that sets one field twice, and
reports errors in one line. train_config.py declares the options of the trainers.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from common.atomic import replace_text
from common.hints import accepts, described, is_word, kinds, shown
from common.names import is_own, nearest
from fisherfn.errors import FisherfnError

T = TypeVar("T")
Choices = Iterable[str] | Callable[[], Iterable[str]]


class ConfigError(FisherfnError, ValueError):
    """An unknown option, or an invalid value."""


class Check(NamedTuple):
    """A rule for a value: `wording` follows "must be" in the error. `None` is not checked."""

    wording: str
    holds: Callable[[Any], bool]


POSITIVE = Check("> 0", lambda value: value > 0)
NON_NEGATIVE = Check(">= 0", lambda value: value >= 0)
SEED = Check("from 0 to 2**63 - 1", lambda value: 0 <= value < 2**63)
FRACTION = Check("in [0, 1)", lambda value: 0 <= value < 1)


def check_listed(option: str, text: str, known: Iterable[str]) -> None:
    """Raise `ConfigError` if a comma-separated text has a name that is not known, or none at all."""
    names = list(known)
    for wrong in (name for name in listed(text) or [""] if name not in names):
        raise ConfigError(f"{option} must be among {', '.join(names)}, got {wrong!r}")


def listed(text: str) -> list[str]:
    """Return the names in a text that separates them by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


EXIT_CODES = (
    "exit codes: 0 done; 1 an error, in one line; 2 a wrong command line; 128 + N stopped by signal N (130 for Ctrl-C)"
)
RESUMES = ", after which --resume continues a saved run"
"""Text at the end of `--help`, and its end for apps that can resume."""


def option(
    default: Any,
    help: str,
    *,
    aliases: Sequence[str] = (),
    choices: Choices | None = None,
    own: bool = False,
    check: Check | None = None,
) -> Any:
    """Declare a dataclass field that is an option.

    Args:
        default: the value if neither command line nor file gives one.
        help: the text in `--help`.
        aliases: other names, on the command line and in files.
        choices: allowed values, or a function that lists them; or use `Literal` as type.
        own: True also allows `pkg.module:function`.
        check: rule for the values.
    """
    metadata = {"help": help, "aliases": tuple(aliases), "choices": choices, "own": own, "check": check}
    return dataclasses.field(default=default, metadata=metadata)


# --------------------------------------------------------------------------------------------- reading and writing


def parse(Config: type[T], argv: Sequence[str] | None = None, *, description: str | None) -> T:
    """Parse a command line; on an error, print one line and exit with status 2, as argparse does.

    Args:
        Config: a frozen dataclass, every field with a default.
        argv: arguments without the program's name; None for those of the process.
        description: text at the start of `--help`.
    """
    try:
        return read(Config, sys.argv[1:] if argv is None else argv, description=description)
    except ConfigError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def read(Config: type[T], argv: Sequence[str], *, description: str | None = None) -> T:
    """Combine defaults, the `--config` files in order, and the command line; raise `ConfigError` on an error."""
    names = option_names(Config)
    parser = _parser(Config, description)
    given = _convert(Config, parser.parse_args, [_flag(token, names) for token in argv])
    values: dict[str, Any] = {}
    for path in given.pop("config", None) or []:
        values |= _from_file(Config, parser, Path(path))
    config = Config(**{**values, **given})
    validate(config)
    return config


def as_yaml(config: Any) -> str:
    """Return the configuration as lines of a `--config` file."""
    values = {field.name: getattr(config, field.name) for _, field in _in_sections(type(config))}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def dump(config: Any, path: Path) -> None:
    """Write the configuration as a YAML file from which `--config` reads an equal one."""
    replace_text(path, as_yaml(config))


def filled(config: T, values: Mapping[str, Any]) -> T:
    """Replace None by `values` and validate again; other settings are kept."""
    known = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise ConfigError(f"unknown key {name}{_near(name, known)}")
    new = {name: value for name, value in values.items() if getattr(config, name) is None}
    config = dataclasses.replace(config, **new)  # type: ignore[type-var]
    validate(config)
    return config


def validate(config: Any) -> None:
    """Raise `ConfigError` for the first field whose value its type, choices or rule do not allow."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is None and not accepts(hints[field.name], None):
            raise ConfigError(f"{field.name} must be {described(hints[field.name])}, got null")
        if value is not None and not is_word(hints[field.name], value):
            _check_value(field.name, value, field.metadata)


def _check_value(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} must be finite, got {value}")
    check = metadata.get("check")
    if check and not check.holds(value):
        raise ConfigError(f"{name} must be {check.wording}, got {shown(value)}")
    choices = _choices(metadata)
    if choices and value not in choices and not (metadata.get("own") and is_own(value)):
        own = " or pkg.module:function" if metadata.get("own") else ""
        raise ConfigError(f"{name} must be one of {', '.join(choices)}{own}, got {value}{_near(value, choices)}")


# ------------------------------------------------------------------------------------------------------- the parser


class _Formatter(DefaultHelpFormatter):
    """A formatter that prints the help of `_help` alone: jsonargparse would add types and defaults as Python code."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help or ""


def _parser(Config: type, description: str | None) -> ArgumentParser:
    hints = typing.get_type_hints(Config)
    file = getattr(Config, "file", "YAML file with any of the options below")
    parser = ArgumentParser(
        description=description, usage="%(prog)s [--config FILE] [--option VALUE ...]", exit_on_error=False,
        epilog=f"{EXIT_CODES}{RESUMES if 'resume' in hints else ''}.", formatter_class=_Formatter,
    )  # fmt: skip
    parser.add_argument("--config", action="append", metavar="FILE", help=file)
    groups: dict[str, Any] = {"": parser}
    for title, field in _in_sections(Config):
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        flags = [f"--{name}" for name in (field.name, *field.metadata.get("aliases", ()))]
        # `--quiet` without a value means true
        switch: dict[str, Any] = {"nargs": "?", "const": True} if hints[field.name] is bool else {}
        groups[title].add_argument(
            *flags, type=hints[field.name], default=field.default, **switch, help=_help(field, hints)
        )
    return parser


def _in_sections(Config: type) -> list[tuple[str, dataclasses.Field[Any]]]:
    """Return all fields with the titles of their sections, in the order of the sections."""
    sections: Mapping[str, str] = getattr(Config, "sections", {})
    title, found = "", []
    for field in dataclasses.fields(Config):
        title = sections.get(field.name, title)
        found.append((title, field))
    order = ["", *sections.values()]
    return sorted(found, key=lambda pair: order.index(pair[0]))


def _help(field: dataclasses.Field[Any], hints: Mapping[str, Any]) -> str:
    """Return text, choices, type and default; the text itself describes a default of None."""
    choices = _choices(field.metadata)
    own = " or pkg.module:function" if field.metadata.get("own") else ""
    text = field.metadata.get("help", "") + (f"; one of {', '.join(choices)}{own}" if choices else "")
    default = str(field.default).lower() if isinstance(field.default, bool) else field.default
    notes = [kinds(hints[field.name]), "" if default in (None, "") else f"default: {default}"]
    return text + f" ({'; '.join(filter(None, notes))})" * any(notes)


def _choices(metadata: Mapping[str, Any]) -> list[str]:
    choices = metadata.get("choices")
    return list(choices() if callable(choices) else choices or ())


def option_names(Config: type) -> dict[str, str]:
    """Map every name of every option to its field."""
    fields = dataclasses.fields(Config)
    return {name: field.name for field in fields for name in (field.name, *field.metadata.get("aliases", ()))}


def _flag(token: str, names: Mapping[str, str]) -> str:
    """Convert dashes to underscores in an option, which must be known; return other tokens unchanged."""
    if not token.startswith("--") or token == "--":
        return token
    name, equals, value = token[2:].partition("=")
    known = [*names, "config", "help"]
    if name.replace("-", "_") not in known:
        raise ConfigError(f"unknown option --{name}{_near(name, known, '--') or '; see --help for all'}")
    return f"--{name.replace('-', '_')}{equals}{value}"


class _Loader(yaml.SafeLoader):
    """A loader of plain data that refuses a key given twice; YAML's own would keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        for twice in (key for place, key in enumerate(keys) if key in keys[:place]):
            raise ConfigError(f"{twice} is set twice")
        return super().construct_mapping(node, deep)


def _from_file(Config: type, parser: ArgumentParser, path: Path) -> dict[str, Any]:
    """Return the fields that a file sets, by field name."""
    try:
        return _from_yaml(Config, parser, _load(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _load(path: Path) -> dict[Any, Any]:
    try:
        # SafeLoader: no object of Python is made
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from None
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:  # some of a malformed tag
        raise ConfigError(f"not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found or {}, dict):
        raise ConfigError("must contain lines like `batch_size: 256`")
    return found or {}


def _from_yaml(Config: type, parser: ArgumentParser, found: Mapping[Any, Any]) -> dict[str, Any]:
    names, hints = option_names(Config), typing.get_type_hints(Config)
    values: dict[str, Any] = {}
    for key, value in found.items():
        name = names.get(str(key).replace("-", "_"))
        if name is None:
            raise ConfigError(f"unknown key {key}{_near(str(key), names) or '; see --help for all'}")
        if name in values:
            raise ConfigError(f"{name} is set twice, under {key} and another of its names")
        values[name] = value
    # a value of the right type is kept: jsonargparse would read the text "null" as None
    ready = {name: value for name, value in values.items() if accepts(hints[name], value)}
    rest = {name: value for name, value in values.items() if name not in ready}
    return ready | _convert(Config, parser.parse_object, rest)


def _convert(Config: type, convert: Callable[..., Any], raw: Any) -> dict[str, Any]:
    """Let jsonargparse convert `raw`; the result has only the given values, without defaults."""
    try:
        return convert(raw, defaults=False).as_dict()
    except argparse.ArgumentError as error:
        _reword(Config, str(error))


# ------------------------------------------------------------------------------------------------------- the wording


def _reword(Config: type, message: str) -> NoReturn:
    """Shorten the message of jsonargparse, which has up to eight lines for a wrong type, to one."""
    key, value = re.search(r'Parser key "(\w+)"', message), re.search(r"value: (.*)\Z", message, re.DOTALL)
    if key and value:
        name = key[1]
        message = f"{name} must be {described(typing.get_type_hints(Config)[name])}, got {value[1]}"
    raise ConfigError(" ".join(message.split()).replace("unrecognized arguments", "unexpected arguments")) from None


def _near(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return a suggestion of the closest known name for an error, or an empty string; case is ignored."""
    near = nearest(name, known, cutoff=0.5)
    return f"; did you mean {prefix}{near}?" if near else ""
