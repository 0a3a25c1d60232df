"""Sweeps in stages: successive halving, populations, and the checkpoints between stages."""

from pathlib import Path

import pytest

import sweep
from common.checkpoints import CheckpointError
from common.config import ConfigError
from common.sweep import report, stages
from tests.apps.conftest import OWN
from tests.apps.test_sweep import BASE, FIXED, killed_and_resumed, numbers, reversed_grid, table


def test_halving_keeps_the_best_and_finds_that_of_the_whole_grid_for_less(own):
    argv = [*BASE, "--optim", "sgd", "--lr", "1e-9,1e-8,1e-7,1e-6,1e-5,1e-4,3e-4,0.03,1e3", "--models_at_once", "9"]
    argv = [*argv, "--num_epochs", "9"]
    whole = sweep.main([*argv, "--result_name", "whole"])
    halved = sweep.main([*argv, "--result_name", "halved", "--halving", "3"])
    assert table(halved)[0]["lr"] == table(whole)[0]["lr"]
    epochs = [sum(int(row["epoch"]) for row in table(folder)) for folder in (whole, halved)]
    assert epochs == [81, 6 * 1 + 2 * 3 + 9]
    assert epochs[1] <= epochs[0] / 3
    assert (halved / "best.yml").read_text().count("lr: ") == 1


def test_stages():
    assert stages.halving(27, 27, 3) == [(1, "keep", 9), (3, "keep", 3), (9, "keep", 1), (27, "", 0)]
    assert stages.halving(10, 4, 2) == [(1, "keep", 5), (2, "keep", 3), (4, "", 0)]
    assert stages.halving(2, 5, 3) == [(5, "", 0)]
    assert stages.population(8, 5, 2) == [(2, "copy", 2), (4, "copy", 2), (5, "", 0)]


def test_a_population_copies_the_best_over_the_worst_and_perturbs_its_numbers(own):
    argv = [*BASE, "--optim", "sgd", "--lr", "1e-7,1e-6,0.1,0.3", "--population", "1", "--models_at_once", "4"]
    folder = sweep.main(argv)
    lines = {(line["run"], line["epoch"]): line for line in stages.read(folder / "metrics.jsonl")}
    assert lines[0, 1]["lr"] == pytest.approx(1e-7)
    best = min((line for line in lines.values() if line["epoch"] == 1), key=lambda line: line["train_loss"])
    assert min(abs(lines[0, 2]["lr"] / best["lr"] - factor) for factor in stages.PERTURBED) < 1e-5
    assert lines[0, 2]["train_loss"] < 0.9 * lines[1, 2]["train_loss"]
    assert "lr: 1.0e-07" not in (folder / "best.yml").read_text()


@pytest.mark.parametrize("given", [["--halving", "2"], ["--population", "1"]], ids=["halving", "population"])
def test_stages_depend_on_the_number_of_epochs(own, given):
    argv = [*BASE, "--optim", "sgd", "--lr", "0.1,0.2,0.3,0.4", *given]
    sweep.main(argv)
    with pytest.raises(ConfigError, match="another num_epochs, 2 instead of 4"):
        sweep.main([*argv, "--num_epochs", "4", "--resume"])


def test_seeds_may_be_dates(own):
    argv = [*BASE, "--seed", "20240101123456", "--optim", "sgd", "--lr", "0.1,0.2,0.3,0.4", "--population", "1"]
    assert len(table(sweep.main(argv))) == 4


@pytest.fixture(scope="module")
def diverged(tmp_path_factory):
    """One sound run of eight in a population, and the folder of its results."""
    folder = tmp_path_factory.mktemp("population")
    (folder / "own.py").write_text(OWN)
    rates = "0.1," + ",".join(f"{k}e30" for k in range(1, 8))
    argv = [*BASE, "--optim", "sgd", "--lr", rates, "--population", "4", "--num_epochs", "8"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder), patch.syspath_prepend(folder)
        return folder / sweep.main([*argv, "--model", "own:relu"])


def test_runs_that_diverged_are_not_copied_and_keep_their_reason(diverged):
    lines = stages.read(diverged / "metrics.jsonl")
    copied = {line["run"] for line in lines if line["epoch"] == 8 and line["active"] and line["run"] > 0}
    assert len(copied) == 2, "the two places of the worst quarter have copies of the only sound run"
    assert all(line["lr"] < 1 for line in lines if line["run"] in copied and line["epoch"] > 4)
    for row in table(diverged):
        sound = int(row["run"]) in {0, *copied}
        assert ("NonFiniteError" in row["stopped"]) is not sound
        assert sound or int(row["skipped"]) >= 4, "the failed steps of all epochs"


def test_finished_runs_leave_the_memory(own):
    config, problem = sweep.make_problem(*reversed_grid("--lr", "1,2,3,4"), shared=False)
    kept = []
    run = stages.Sweep(problem, [0, 1, 2, 3], [stages.Stage(1)], 1, own / "points", "train_loss", kept.append)
    run._selected = lambda ends, stage, number: kept.append(ends) or ends
    run.run()
    assert kept[-1] == []


def test_a_copy_may_join_a_frozen_member_whose_statistics_have_another_size(own):
    """Two of the batches of exactNG have 12 examples, the last one has 8."""
    fixed = ["--kl_bound", "0", "--damping", "0.1", "--momentum", "0", "--model", "own:relu", "--batch_size", "12"]
    argv = [*BASE, "--optim", "exactNG", "--lr", "0.1,1e37,2e37,3e37", *fixed, "--num_epochs", "4"]
    argv += ["--population", "2", "--models_at_once", "2"]
    folder = sweep.main(argv)
    assert len(table(folder)) == 4
    before = numbers(folder)
    assert numbers(sweep.main([*argv, "--resume"])) == before


@pytest.mark.parametrize("given", [["--population", "1"], ["--halving", "2"]], ids=["population", "halving"])
def test_checkpoints_of_earlier_stages_are_deleted_and_a_kill_meanwhile_loses_nothing(own, monkeypatch, given):
    argv = [*BASE, *FIXED, "--seed", "0,1,2", "--num_epochs", "4", "--models_at_once", "2", *given]
    whole = sweep.main([*argv, "--result_name", "whole"])
    points = {path.name for path in (whole / "checkpoints").glob("*.pt")}
    last = max(int(name.split("-")[1]) for name in points)
    assert last >= 2 and all(name.startswith(f"stage-{last}-") for name in points)

    unlink = Path.unlink

    def killed(path, missing_ok=False):
        unlink(path, missing_ok)
        if path.name.startswith("stage-1-"):  # one of several: the rest does not look like a whole stage
            raise RuntimeError("killed")

    part = killed_and_resumed(monkeypatch, argv, Path, "unlink", killed)
    assert numbers(part) == numbers(whole)
    assert {path.name for path in (part / "checkpoints").glob("*.pt")} == points


def test_a_run_that_diverged_late_is_behind_one_that_stopped_early(tmp_path):
    lines = [
        {"run": 0, "epoch": 1, "train_loss": 0.5, "active": 1},
        {"run": 1, "epoch": 3, "train_loss": 0.2, "active": 0},
        {"run": 2, "epoch": 1, "train_loss": 0.7, "active": 1},
    ]
    assert [line["run"] for line in report.ranked(lines, "train_loss")] == [0, 2, 1]
    found = report.best(lines, "train_loss")
    assert found is not None and found["run"] == 0


def test_a_stage_without_some_of_its_checkpoints_is_an_error(own):
    argv = [*BASE, *FIXED, "--seed", "0,1,2", "--num_epochs", "4", "--models_at_once", "2", "--population", "1"]
    folder = sweep.main(argv)
    (folder / "checkpoints" / "stage-3-group-1.pt").unlink()
    with pytest.raises(CheckpointError, match="lacks checkpoints of stage 3"):
        sweep.main([*argv, "--resume"])
