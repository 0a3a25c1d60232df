"""Sweeps from the command line: grid, groups, results, resume, selection between stages, errors."""

import csv
import math

import pytest
import torch
import yaml

import sweep
from common.checkpoints import load_checkpoint
from common.config import ConfigError, read
from common.results import ResultExistsError
from common.sweep import report, stages
from common.sweep.grid import parse_grid, rows
from common.train_config import TrainConfig
from fisherfn.errors import FisherfnError

BASE = ["--data", "own:load", "--num_epochs", "2", "--batch_size", "8", "--optim", "kfac", "--quiet"]
FIXED = ["--damping", "0.1", "--kl_bound", "0.01", "--lr", "0.3,0.1"]


def table(folder):
    return list(csv.DictReader((folder / "table.csv").read_text().splitlines()))


def numbers(folder):
    """The table without times."""
    return [{name: cell for name, cell in row.items() if name != "seconds"} for row in table(folder)]


def killed_and_resumed(monkeypatch, argv, owner, name, killed):
    """The folder of a sweep that a function in the place of another one kills, and that is then resumed."""
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(RuntimeError, match="killed"):
            sweep.main([*argv, "--result_name", "part"])
    return sweep.main([*argv, "--result_name", "part", "--resume"])


def test_a_sweep_writes_table_picture_and_configurations_that_the_trainer_reads(own, drawn, capsys):
    folder = sweep.main([*BASE, *FIXED, "--seed", "0,1", "--models_at_once", "3"])
    assert folder.as_posix() == "results/sweep/own-load-kfac"
    found = table(folder)
    assert {(row["lr"], row["seed"]) for row in found} == {("0.3", "0"), ("0.3", "1"), ("0.1", "0"), ("0.1", "1")}
    losses = [float(row["train_loss"]) for row in found]
    assert losses == sorted(losses) and len(set(losses)) == 4 and all(row["epoch"] == "2" for row in found)
    assert (folder / "sweep.png").stat().st_size > 10_000
    best = read(TrainConfig, ["--config", str(folder / "best.yml")])
    assert (best.lr, best.seed) == (float(found[0]["lr"]), int(found[0]["seed"])) and best.model == "own:build"
    by_test = yaml.safe_load((folder / "best_test.yml").read_text())
    lowest = min(found, key=lambda row: float(row["test_loss"]))
    assert (by_test["lr"], by_test["seed"]) == (float(lowest["lr"]), int(lowest["seed"]))
    assert "train_loss" in capsys.readouterr().out
    lines = stages.read(folder / "metrics.jsonl")
    assert [(line["run"], line["epoch"]) for line in lines] == [(r, e) for r in range(4) for e in range(3)]
    with pytest.raises(Exception, match="--overwrite, --resume"):
        sweep.main([*BASE, *FIXED])


@pytest.mark.parametrize(
    "given", [[], ["--population", "1"], ["--halving", "2"]], ids=["grid", "population", "halving"]
)
def test_a_killed_sweep_goes_on_bit_for_bit(own, monkeypatch, given):
    argv = [*BASE, "--ema", "0.9,0.8", "--seed", "0,1", "--models_at_once", "2", *given]
    whole = sweep.main([*argv, "--result_name", "whole"])
    steps = []

    def killed(save_every, signals):
        def after(step, save):
            steps.append(step)
            if len(steps) in (3, 9):  # without saving: the last checkpoint is that of an earlier step
                raise RuntimeError("killed")
            if step % 2 == 0:
                save()

        return after

    monkeypatch.setattr(sweep, "watched_saver", killed)
    with pytest.raises(RuntimeError, match="killed"):
        sweep.main([*argv, "--result_name", "part"])
    with pytest.raises(RuntimeError, match="killed"):
        sweep.main([*argv, "--result_name", "part", "--resume"])
    part = sweep.main([*argv, "--result_name", "part", "--resume"])
    assert numbers(part) == numbers(whole)
    saved = sorted(path.name for path in (whole / "checkpoints").glob("*.pt"))
    assert saved and saved == sorted(path.name for path in (part / "checkpoints").glob("*.pt"))
    for name in saved:
        one, other = (load_checkpoint(folder / "checkpoints" / name)[0] for folder in (part, whole))
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    with pytest.raises(Exception, match="another lr, None instead of 0.5"):
        sweep.main([*argv, "--result_name", "part", "--resume", "--lr", "0.5"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--optim", "adam", "--damping", "1,0.1"], "damping is no option of adam"),
        (["--optim", "adam", "--lr", "1,0.1", "--kl_bound", "1"], "kl_bound is no option of adam"),
        (["--lr", "1,0.1", "--model", "own:missing"], "no such function"),
    ],
)
def test_a_sweep_that_cannot_start_leaves_nothing_behind(own, more, message):
    with pytest.raises(FisherfnError, match=message):
        sweep.main([*BASE, *more])
    assert not (own / "results").exists()


def test_a_run_that_diverges_is_reported_and_the_others_finish(own):
    folder = sweep.main([*BASE, "--optim", "sgd", "--lr", "0.1,1e38", "--models_at_once", "2"])
    good, bad = table(folder)
    assert (good["lr"], bad["lr"], bad["epoch"]) == ("0.1", "1e+38", "2")
    assert "NonFiniteError" in bad["stopped"] and not good["stopped"]
    assert yaml.safe_load((folder / "best.yml").read_text())["lr"] == 0.1


def test_shared_data_is_that_of_the_first_seed(own):
    folder = sweep.main([*BASE, *FIXED, "--seed", "3,4", "--data_order", "shared", "--models_at_once", "4"])
    own_order = sweep.main([*BASE, *FIXED, "--seed", "3,4", "--models_at_once", "4", "--result_name", "own"])
    shared, each = ({row["run"]: float(row["train_loss"]) for row in table(f)} for f in (folder, own_order))
    assert shared["0"] == pytest.approx(each["0"]) and shared["1"] != pytest.approx(each["1"])


def reversed_grid(*argv):
    config, values = parse_grid(TrainConfig, [*BASE[:-1], "--damping", "0.1", "--kl_bound", "0.01", *argv])
    return config, rows(values)


ERRORS = {
    "an empty grid: give several values": [],
    "an empty grid: lr has no value": ["--lr", ","],
    "lr has an empty value": ["--lr", "0.1,,0.2"],
    "lr has the value 0.1 twice": ["--lr", "0.1,0.1"],
    "lr has the value 0.2 twice": ["--lr", "0.1,0.2,2e-1"],
    "seed has the value 0 twice": ["--seed", "0,1,00"],
    "an empty grid: give several values to": ["--lr", "0.1,0.2", "--lr", "0.3"],
    "unknown option --dampin; did you mean --damping?": ["--dampin", "1,2"],
    "unknown option --model_at_once; did you mean": ["--model_at_once", "3", "--lr", "1,2"],
    "batch_size cannot be swept, because it changes a shape": ["--batch_size", "8,16"],
    "optim cannot be swept, because it changes the operations": ["--optim", "kfac,ekfac"],
    "lr must be > 0, got -1": ["--lr", "0.1,-1"],
    "lr must be": ["--lr", "0.1,fast"],
    "lr cannot be swept over numbers together with auto": ["--lr", "auto,0.1"],
    "separate values by commas": ["--lr", "0.1,", "0.2"],
    "num_epochs cannot be swept, because it belongs to all runs": ["--num_epochs", "1,2"],
    "slice must be i/n": ["--lr", "0.1,0.2", "--slice", "2/2"],
    "slice env needs": ["--lr", "0.1,0.2", "--slice", "env"],
    "halving must be >= 2": ["--lr", "0.1,0.2", "--halving", "1"],
    "halving and population exclude": ["--lr", "0.1,0.2", "--halving", "2", "--population", "1"],
    "app must be one of": ["--app", "train_gam", "--lr", "0.1,0.2"],
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_teach(own, capsys, message):
    with pytest.raises(SystemExit) as stopped:
        sweep.main([*BASE, *ERRORS[message]])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (own / "results").exists()


def test_the_best_of_none(tmp_path):
    line = {"run": 0, "epoch": 1, "train_loss": math.nan, "active": 0}
    assert report.best([line], "train_loss") is None


# ------------------------------------------------------------------------------------------ kills, locks, other faults


@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("cut", [0, 40], ids=["before the metrics", "within a line"])
def test_a_kill_between_a_checkpoint_and_its_metrics_loses_nothing(own, monkeypatch, epoch, cut):
    argv = [*BASE, *FIXED, "--seed", "0,1", "--models_at_once", "2"]
    whole = sweep.main([*argv, "--result_name", "whole"])
    append = stages.append

    def killed(path, lines):
        if lines[0]["epoch"] == epoch and lines[0]["run"] == 2:
            with path.open("a") as file:
                file.write('{"run": 2, "epoch": 1, "step": 4, "train_loss": 0.123'[:cut])
            raise RuntimeError("killed")
        append(path, lines)

    part = killed_and_resumed(monkeypatch, argv, stages, "append", killed)
    assert numbers(part) == numbers(whole)
    assert (part / "best.yml").read_text() == (whole / "best.yml").read_text()


def test_a_file_of_options_that_has_changed_is_seen(own):
    options = own / "options.yml"
    options.write_text("batch_size: 8\nnum_epochs: 1\n")
    argv = ["--data", "own:load", "--optim", "sgd", "--lr", "0.1,0.2", "--quiet", "--config", str(options)]
    sweep.main(argv)
    options.write_text("batch_size: 16\nnum_epochs: 1\n")
    with pytest.raises(ConfigError, match="another batch_size, 8 instead of 16"):
        sweep.main([*argv, "--resume"])
    options.write_text("batch_size: 8\nnum_epochs: 3\n")
    assert {row["epoch"] for row in table(sweep.main([*argv, "--resume"]))} == {"3"}


REFUSED = {
    "beta_1 is no option of kfac": ["--beta_1", "0.9,0.5"],
    "ema is no option of exactNG": [*FIXED, "--optim", "exactNG", "--ema", "0.9,0.1"],
    "ema is no option of sgd": ["--optim", "sgd", "--lr", "0.1", "--ema", "0.95,0.5"],
    "cg_steps goes with optim exactNG": [*FIXED, "--cg_steps", "3"],
    "verbose is no option of a sweep": [*FIXED, "--verbose"],
    "tensorboard is no option of a sweep": [*FIXED, "--tensorboard"],
    "num_workers is no option of a sweep": [*FIXED, "--num_workers", "2"],
    "result_name must be a plain folder name": [*FIXED, "--result_name", "../escaped"],
    "halving 3 needs at least 3 runs and 3 epochs": [*FIXED, "--halving", "3"],
    "population 1 needs at least 4 runs": [*FIXED, "--population", "1"],
    "population 2 needs at least 4 runs and more epochs": [*FIXED, "--seed", "0,1", "--population", "2"],
    "device meta cannot be used here": [*FIXED, "--device", "meta"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_an_option_that_would_be_ignored_is_refused(own, message):
    with pytest.raises(ConfigError, match=message):
        sweep.main([*BASE, *REFUSED[message]])
    assert not (own / "results").exists() and not (own / "escaped").exists()


def test_only_one_process_writes_to_a_folder(own, monkeypatch):
    train = sweep.train

    def twice(*args):
        monkeypatch.setattr(sweep, "train", train)
        with pytest.raises(ResultExistsError, match="another run is writing"):
            sweep.main([*BASE, *FIXED, "--resume"])
        with pytest.raises(ResultExistsError, match="another run is writing"):
            sweep.main([*BASE, *FIXED, "--overwrite"])
        return train(*args)

    monkeypatch.setattr(sweep, "train", twice)
    folder = sweep.main([*BASE, *FIXED])
    assert len(table(folder)) == 2


def test_resuming_with_the_options_in_another_order_is_an_error(own):
    """Runs are numbered in the order of the options: run 1 would go on with the data of another seed."""
    sweep.main([*BASE, *FIXED, "--seed", "0,1"])
    with pytest.raises(ConfigError, match=r"another order, \['lr', 'seed'\] instead of \['seed', 'lr'\]"):
        sweep.main([*BASE, "--seed", "0,1", *FIXED, "--resume"])


def test_options_of_a_file_count_for_the_sweep_unless_the_command_gives_them(own, capsys):
    options = own / "options.yml"
    options.write_text("result_dir: elsewhere\nresult_name: mine\nquiet: true\n")
    argv = [*BASE[:-1], *FIXED, "--config", str(options), "--models_at_once", "2"]
    assert sweep.main(argv).as_posix() == "elsewhere/sweep/mine"
    assert "at once" not in capsys.readouterr().out
    assert sweep.main([*argv, "--result_name", "yours", "--result-dir=here"]).as_posix() == "here/sweep/yours"


def test_quiet_prints_only_the_table(own, capsys):
    sweep.main([*BASE, *FIXED])
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_sweep_is_not_resumed_with_fewer_epochs_than_it_has(own):
    sweep.main([*BASE, *FIXED])
    with pytest.raises(ConfigError, match="has trained 2 epochs"):
        sweep.main([*BASE, *FIXED, "--num_epochs", "1", "--resume"])


def test_a_sweep_of_a_version_that_did_not_record_the_order_is_resumed(own):
    folder = sweep.main([*BASE, *FIXED])
    content = stages.read_settings(folder / "sweep.json")
    del content["settings"]["order"]
    stages.write_json(folder / "sweep.json", content)
    sweep.main([*BASE, *FIXED, "--resume"])


def test_no_run_that_is_left_is_said(own, capsys):
    folder = sweep.main([*BASE, "--optim", "sgd", "--lr", "1e37,1e38", "--num_epochs", "4", "--model", "own:relu"])
    said = capsys.readouterr()
    assert "no run is left" in said.err and "best.yml" not in said.out and not (folder / "best.yml").exists()


def test_the_best_configuration_shows_what_the_trainer_shows(own):
    assert yaml.safe_load((sweep.main([*BASE, *FIXED]) / "best.yml").read_text())["quiet"] is False
