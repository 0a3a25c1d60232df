"""Options by any of their names, from the command line and files; errors that say in one line what is wrong."""

import dataclasses
import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from common import config as c
from common.config import ConfigError, dump, filled, option, option_names, parse, read, validate
from common.gan.config import GanConfig
from common.train_config import APPS, TrainConfig

TREES = ["oak", "ash"]


@dataclass(frozen=True)
class Config:
    sections: ClassVar[dict[str, str]] = {"size": "of the garden", "name": "of the run"}

    size: int = option(4, "how many", aliases=("n", "N_all"), check=c.POSITIVE)
    rate: float | None = option(None, "how fast", check=c.NON_NEGATIVE)
    part: float = option(0.5, "how much", check=c.FRACTION)
    tree: str = option("oak", "which tree", choices=lambda: TREES, own=True)
    shape: str | None = option(None, "which shape", choices=["round", "square"])
    kind: Literal["mc", "type2"] = option("mc", "which kind")
    update_every: int = option(10, "how often", aliases=("T_cov",))
    name: str | None = option(None, "its name")
    quiet: bool = option(False, "say nothing")


def from_args(*argv):
    return read(Config, argv)


def from_yaml(tmp_path, text, *argv):
    file = tmp_path / "settings.yml"
    file.write_text(text)
    return read(Config, ["--config", str(file), *argv])


def message(call, *args):
    with pytest.raises(ConfigError) as caught:
        call(*args)
    text = str(caught.value)
    assert "\n" not in text
    return text


# ----------------------------------------------------------------------------------------------- names and sources


def test_without_arguments_the_defaults():
    assert from_args() == Config()


@pytest.mark.parametrize("argv", ["--T_cov 3", "--update_every 3", "--update-every 3", "--T-cov=3", "--update-every=3"])
def test_every_name_of_an_option_on_the_command_line(argv):
    assert from_args(*argv.split()) == Config(update_every=3)


@pytest.mark.parametrize("key", ["T_cov", "update_every", "update-every", "T-cov"])
def test_every_name_of_an_option_in_a_file(tmp_path, key):
    assert from_yaml(tmp_path, f"{key}: 3") == Config(update_every=3)


@pytest.mark.parametrize("order", ["file first", "file last"])
def test_the_command_line_wins_wherever_the_file_stands(tmp_path, order):
    file = tmp_path / "settings.yml"
    file.write_text("n: 5\nT_cov: 6\n")
    argv = ["--config", str(file)], ["--size", "7"]
    assert read(Config, sum(argv if order == "file first" else argv[::-1], [])) == Config(size=7, update_every=6)


def test_the_later_of_two_files_wins(tmp_path):
    for name, text in (("a.yml", "size: 1\nrate: 1.0\n"), ("b.yml", "n: 2\n")):
        (tmp_path / name).write_text(text)
    argv = ["--config", f"{tmp_path}/a.yml", f"--config={tmp_path}/b.yml"]
    assert read(Config, argv) == Config(size=2, rate=1.0)


def test_an_empty_file_sets_nothing(tmp_path):
    assert from_yaml(tmp_path, "# nothing\n") == Config()


def test_values_become_the_type_of_their_field(tmp_path):
    assert from_args("--rate", "1e-3", "--name", "2024", "--quiet") == Config(rate=1e-3, name="2024", quiet=True)
    # YAML 1.1 takes 1e-3 for text
    found = from_yaml(tmp_path, "rate: 1e-3\npart: 0\nquiet: true\nname: 'null'\nkind: type2")
    assert found == Config(rate=1e-3, part=0.0, quiet=True, name="null", kind="type2")
    assert type(found.part) is float


def test_null_and_false_undo_what_a_file_sets(tmp_path):
    assert from_yaml(tmp_path, "rate: 1.0\nquiet: true", "--rate", "null", "--quiet", "false") == Config()


def test_dashes_in_values_stay():
    assert from_args("--name=a-b").name == "a-b"
    assert from_args("--name", "a-b").name == "a-b"


def test_a_custom_function_in_place_of_the_choices():
    assert from_args("--tree", "garden.trees:plum").tree == "garden.trees:plum"


def test_choices_are_asked_for_when_they_are_needed(monkeypatch):
    monkeypatch.setattr("tests.apps.common.test_config.TREES", ["elm"], raising=True)
    assert from_args("--tree", "elm").tree == "elm"


@given(
    st.builds(
        Config,
        size=st.integers(1, 10**9),
        rate=st.none() | st.floats(0, 1e300),
        part=st.floats(0, 1, exclude_max=True),
        kind=st.sampled_from(["mc", "type2"]),
        name=st.none()
        | st.text(st.characters(exclude_categories=["Cs"]))
        | st.sampled_from(["null", "1e3", "yes", "~"]),
        quiet=st.booleans(),
    )
)
def test_a_dumped_configuration_is_read_back_equal(tmp_path_factory, config):
    file = tmp_path_factory.mktemp("dump") / "config.yaml"
    dump(config, file)
    assert read(Config, ["--config", str(file)]) == config


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--siez 3", "unknown option --siez; did you mean --size?"),
        ("--update-evry=3", "unknown option --update-evry; did you mean --update_every?"),
        ("--t_cov 3", "unknown option --t_cov; did you mean --T_cov?"),
        ("--zzzzz 3", "unknown option --zzzzz; see --help for all"),
        ("--upd 3", "unknown option --upd"),  # no abbreviations: they would change meaning with each new option
        ("--size x", "size must be int, got x"),
        ("--size 1.5", "size must be int, got 1.5"),
        ("--rate x", "rate must be float or null, got x"),
        ("--quiet maybe", "quiet must be bool, got maybe"),
        ("--kind mcc", "kind must be one of mc, type2, got mcc"),
        ("--size 0", "size must be > 0, got 0"),
        ("--rate -1", "rate must be >= 0, got -1"),
        ("--part 1", "part must be in [0, 1), got 1"),
        ("--rate .nan", "rate must be finite, got nan"),
        ("--rate .inf", "rate must be finite, got inf"),
        ("--tree ook", "tree must be one of oak, ash or pkg.module:function, got ook; did you mean oak?"),
        ("--shape OVAL", "shape must be one of round, square, got OVAL"),
        ("--shape a:b", "shape must be one of round, square, got a:b"),
        ("stray", "unexpected arguments: stray"),
        ("--size", "argument --size/--n/--N_all: expected one argument"),
        ("--config missing.yml", "missing.yml: cannot be read: No such file or directory"),
    ],
)
def test_errors_of_the_command_line(argv, expected):
    assert message(from_args, *argv.split()).startswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("siez: 3", "unknown key siez; did you mean size?"),
        ("3: 3", "unknown key 3; see --help for all"),
        ("config: other.yml", "unknown key config"),
        ("size: x", "size must be int, got x"),
        ("size: 3.0", "size must be int, got 3.0"),
        ("size: true", "size must be int, got True"),
        ("size: [1, 2]", "size must be int, got [1, 2]"),
        ("name: 2024", "name must be str or null, got 2024"),
        ("quiet: 1", "quiet must be bool, got 1"),
        ("kind: foo", "kind must be one of mc, type2, got foo"),
        ("size: 3\nn: 4", "size is set twice, under n and another of its names"),
        ("size: 3\nsize: 4", "size is set twice"),
        ("size: " + "[" * 3000, "not YAML: "),
        ("quiet: !!map 3", "not YAML: "),
        ("quiet: !!map [1]", "not YAML: "),
        ("size: !!set 3", "not YAML: "),
        ("size: 2001-99-99", "not YAML: month must be in 1..12"),
        ("size: !!int x", "not YAML: "),
        ("size: !!timestamp 5", "not YAML: "),
        ("- size", "must contain lines like `batch_size: 256`"),
        ("size: [", "not YAML: "),
        ("size: !!python/object/apply:os.getcwd []", "not YAML: could not determine a constructor"),
    ],
)
def test_errors_of_a_file_name_the_file(tmp_path, text, expected):
    assert message(from_yaml, tmp_path, text).startswith(f"{tmp_path}/settings.yml: {expected}")


def test_null_where_there_is_none(tmp_path):
    assert message(from_yaml, tmp_path, "size: null") == "size must be int, got null"


def test_parse_prints_one_line_and_exits_with_2(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(Config, ["--siez", "3"], description="Do it.")
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert not out and err.endswith("error: unknown option --siez; did you mean --size?\n") and err.count("\n") == 1


def test_help_describes_each_option(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(Config, ["--help"], description="Do it.")
    out = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    assert "Do it." in out and "--T_cov" in out and "how often" in out and "default: 10" in out
    assert "which tree; one of oak, ash or pkg.module:function" in out


PROGRAMS = sorted(path.stem for path in (Path(__file__).parents[3] / "apps").glob("*.py"))


def shown(Config, capsys):
    """Return the help of a configuration as one line."""
    with pytest.raises(SystemExit):
        parse(Config, ["--help"], description=None)
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("program", [name for name in PROGRAMS if name != "plot"])
def test_help_is_plain_english_and_promises_only_options_that_exist(program, capsys):
    found = [value for value in vars(importlib.import_module(program)).values() if dataclasses.is_dataclass(value)]
    configs = [each for each in found if any("help" in field.metadata for field in dataclasses.fields(each))]
    assert configs
    for each in configs:
        text, names = shown(each, capsys), option_names(each)
        assert not re.search(r"\bnull\b|\bNone\b|Union\[|Literal\[|type: |True|False", text), text
        assert set(re.findall(r"--(\w+)", text)) <= {*names, "config", "option", "help"}, text
        assert ("--resume continues" in text) == ("resume" in names)


def test_help_states_types_and_defaults(capsys):
    text = shown(Config, capsys)
    assert "how many (whole number; default: 4)" in text and "how fast (number)" in text
    assert "its name --quiet [{true,false}] say nothing (default: false)" in text
    assert "which kind (default: mc)" in text and "from the data (number or auto)" in shown(Several, capsys)
    assert "which one (one of a, b)" in shown(Several, capsys)


@dataclass(frozen=True)
class Several:
    rate: float | Literal["auto"] | None = option(None, "how fast; default: from the data")
    one: Literal["a", "b"] | None = option(None, "which one")


def test_help_is_in_sections(capsys):
    with pytest.raises(SystemExit):
        parse(Config, ["--help"], description=None)
    _, garden = capsys.readouterr().out.split("of the garden")
    garden, run = garden.split("of the run")
    assert "--size" in garden and "--T_cov" in garden and "--name" in run and "--quiet" in run


@pytest.mark.parametrize("Trainer", [*APPS.values(), GanConfig])
def test_sections_of_trainers_begin_with_fields_and_end_with_the_run(Trainer):
    names = [field.name for field in dataclasses.fields(Trainer)]
    assert set(Trainer.sections) <= set(names) and next(iter(Trainer.sections)) == names[0]
    assert list(dict.fromkeys(Trainer.sections.values()))[-1] == "the run"


@pytest.mark.parametrize("Trainer", [TrainConfig, GanConfig])
def test_help_and_file_have_what_every_run_has_in_the_last_section(Trainer, capsys):
    with pytest.raises(SystemExit):
        parse(Trainer, ["--help"], description=None)
    before, run = capsys.readouterr().out.split("the run:")
    own = "--init_params" if Trainer is TrainConfig else "--critic_norm"
    assert own in before and "--data_path" in before and "--seed" in run and own not in run
    keys = list(yaml.safe_load(c.as_yaml(Trainer())))
    assert keys[0] == "data" and keys.index(own[2:]) < keys.index("batch_size") < keys.index("seed")
    assert set(keys) == {field.name for field in dataclasses.fields(Trainer)}


# ------------------------------------------------------------------------------------------- filling and validating


def test_filled_leaves_what_is_set():
    values = {"rate": 1.0, "name": "x", "size": 9}
    assert filled(Config(name="own"), values) == Config(name="own", rate=1.0)


def test_filled_checks_names_and_values():
    assert message(filled, Config(), {"raet": 1.0}) == "unknown key raet; did you mean rate?"
    assert message(filled, Config(), {"rate": -1.0}) == "rate must be >= 0, got -1"


def test_validate_needs_no_metadata():
    @dataclass(frozen=True)
    class Plain:
        size: int = 3

    validate(Plain())
    assert read(Plain, ["--size", "4"]) == Plain(4)


# -------------------------------------------------------------------------------------------- the trainers' options


def test_a_training_configuration_is_validated_however_it_is_made():
    assert message(lambda: TrainConfig(damping=-1.0)) == "damping must be >= 0, got -1"
    with pytest.raises(ConfigError, match="batch_size must be > 0"):
        dataclasses.replace(TrainConfig(), batch_size=0)
    with pytest.raises(ConfigError, match="overwrite and resume"):
        TrainConfig(overwrite=True, resume=True)


def test_a_training_configuration_knows_the_other_spellings():
    argv = "--dataset MNIST --data_root d --optimizer adam --n_epochs 3 --T_cov 4 --T_inv 5 --kl_clip 0.1".split()
    expected = TrainConfig(
        data="MNIST", data_path="d", optim="adam", num_epochs=3, update_every=4, invert_every=5, kl_bound=0.1
    )
    assert read(TrainConfig, argv) == expected


@pytest.mark.parametrize("name", ["kl_bound", "clipping", "kl_clip"])
def test_the_kl_bound_has_its_former_names(name):
    assert read(TrainConfig, [f"--{name}", "0.5"]).kl_bound == read(GanConfig, [f"--{name}", "0.5"]).kl_bound == 0.5
    assert read(GanConfig, ["--gen_clipping", "0.5"]).gen_kl_bound == 0.5


def test_every_option_of_the_trainers_says_what_it_is():
    assert all(field.metadata["help"] for field in dataclasses.fields(TrainConfig))


def test_the_defaults_survive_a_file(tmp_path):
    dump(TrainConfig(), tmp_path / "config.yaml")
    assert read(TrainConfig, ["--config", str(tmp_path / "config.yaml")]) == TrainConfig()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["lr"] is None
