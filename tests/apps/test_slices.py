"""Sweeps in parts: slices of a grid, from options, Slurm arrays or torchrun, and their merge."""

import os
import subprocess
import sys

import pytest

import sweep
from common import ranks
from common.config import ConfigError
from common.results import ResultExistsError
from common.sweep import stages
from common.sweep.grid import slice_of
from tests.apps.test_sweep import BASE, FIXED, numbers


def test_slices_together_are_the_whole_sweep(own, monkeypatch, capsys):
    argv = [*BASE, *FIXED, "--seed", "0,1,2", "--models_at_once", "2"]
    whole = sweep.main([*argv, "--result_name", "whole"])
    sweep.main([*argv, "--slice", "0/2"])
    sweep.main([*argv, "--slice", "merge"])
    assert "3 of 6 runs are missing: 1, 3, 5" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1"), monkeypatch.setenv("WORLD_SIZE", "2")
    sweep.main([*argv, "--slice", "env"])
    merged = sweep.main([*argv, "--slice", "merge"])
    for one, other in zip(numbers(merged), numbers(whole), strict=True):
        assert one["run"] == other["run"] and float(one["train_loss"]) == pytest.approx(float(other["train_loss"]))
    assert (merged / "best.yml").read_text() == (whole / "best.yml").read_text()
    assert slice_of(5, (1, 2)) == [1, 3]


SLURM = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")


TORCHRUN = ("RANK", "WORLD_SIZE")


@pytest.mark.parametrize("names", [SLURM, TORCHRUN], ids=["slurm", "torchrun"])
def test_two_processes_with_a_slice_each_give_the_table_of_one_bit_for_bit(own, names):
    argv = [*BASE, *FIXED, "--damping", "0.1,1", "--seed", "0,1", "--models_at_once", "1"]
    whole = sweep.main([*argv, "--result_name", "whole"])
    inherited = {name: value for name, value in os.environ.items() if name not in (*SLURM, *TORCHRUN)}
    command = [sys.executable, sweep.__file__, *argv, "--slice", "env"]
    environments = [inherited | dict(zip(names, (str(part), "2"), strict=True)) for part in range(2)]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for environment in environments]
    assert [process.communicate(timeout=300) and process.returncode for process in processes] == [0, 0]
    merged = sweep.main([*argv, "--slice", "merge"])
    assert numbers(merged) == numbers(whole) and len(numbers(whole)) == 8
    for name in ("best.yml", "best_test.yml"):
        assert (merged / name).read_text() == (whole / name).read_text()


def test_only_slices_of_one_sweep_are_merged(own, capsys):
    sweep.main([*BASE, *FIXED, "--slice", "0/2"])
    with pytest.raises(ConfigError, match="slice-0-of-2 was started with another lr"):
        sweep.main([*BASE, *FIXED, "--lr", "0.3,0.2", "--slice", "merge"])
    with pytest.raises(ConfigError, match="slice-0-of-2 was started with another by"):
        sweep.main([*BASE, *FIXED, "--by", "test_loss", "--slice", "merge"])
    sweep.main([*BASE, *FIXED, "--slice", "1/3"])
    with pytest.raises(ConfigError, match="slices of 2 and of 3 parts"):
        sweep.main([*BASE, *FIXED, "--slice", "merge"])
    with pytest.raises(ConfigError, match="this slice has no runs: the grid has only 2"):
        sweep.main([*BASE, *FIXED, "--slice", "2/3"])


def test_an_array_that_is_not_numbered_from_0_is_refused(own, monkeypatch, capsys):
    """An array of some of the parts counts only these: none of them may take the runs of another part."""
    for number, count, first, last in (("1", "1", "1", "1"), ("0", "1", "0", "0"), ("0", "2", "0", "3")):
        for name, value in {"ID": number, "COUNT": count, "MIN": first, "MAX": last}.items():
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
        with pytest.raises(SystemExit):
            sweep.main([*BASE, *FIXED, "--slice", "env"])
        said = capsys.readouterr().err
        assert "number the array from 0 without gaps, and start a single part with --slice i/n" in said
    monkeypatch.setenv("SLURM_ARRAY_TASK_MAX", "1")
    assert sweep.part_of("env") == (0, 2)


def test_runs_that_a_slice_has_not_finished_are_named(own, capsys):
    for part in ("0/2", "1/2"):
        folder = sweep.main([*BASE, *FIXED, "--slice", part])
    lines = stages.read(folder / "metrics.jsonl")
    (folder / "metrics.jsonl").unlink()
    stages.append(folder / "metrics.jsonl", lines[:-1])
    sweep.main([*BASE, *FIXED, "--slice", "merge"])
    assert "1 of 2 runs have not ended: 1" in capsys.readouterr().err


def test_results_of_parts_and_of_a_whole_sweep_do_not_replace_each_other(own):
    sweep.main([*BASE, *FIXED, "--slice", "0/1"])
    with pytest.raises(ResultExistsError, match="such as parts of a sweep"):
        sweep.main([*BASE, *FIXED, "--overwrite"])
    sweep.main([*BASE, *FIXED, "--result_name", "whole"])
    with pytest.raises(ResultExistsError, match="has a sweep without parts"):
        sweep.main([*BASE, *FIXED, "--result_name", "whole", "--slice", "merge"])


def test_processes_of_torchrun_need_a_slice_and_have_a_gpu_each(own, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "here"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="give --slice env"):
        sweep.main([*BASE, *FIXED])
    assert [ranks.own(device) for device in ("cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:0", "cpu"]


def test_parts_of_a_halving_that_have_not_ended_are_named(own, capsys):
    argv = [*BASE, "--optim", "sgd", "--lr", "0.1,0.2,0.3,0.4", "--halving", "2"]
    for part in ("0/2", "1/2"):
        folder = sweep.main([*argv, "--slice", part])
    lines = stages.read(folder / "metrics.jsonl")
    (folder / "metrics.jsonl").unlink()
    stages.append(folder / "metrics.jsonl", [line for line in lines if line["epoch"] < 2])
    sweep.main([*argv, "--slice", "merge"])
    assert "parts that have not ended: slice-1-of-2" in capsys.readouterr().err


def test_parts_and_a_whole_sweep_do_not_share_a_folder(own):
    """Merging would refuse them, and `--overwrite` of the whole would delete the parts."""
    sweep.main([*BASE, *FIXED])
    with pytest.raises(ResultExistsError, match="has a sweep without parts: give the parts another --result_name"):
        sweep.main([*BASE, *FIXED, "--slice", "0/2"])


def test_parts_are_merged_where_their_device_is_missing(own):
    sweep.main([*BASE, *FIXED, "--slice", "0/2"])
    sweep.main([*BASE, *FIXED, "--slice", "1/2"])
    merged = sweep.main([*BASE, *FIXED, "--slice", "merge", "--device", "cuda:7"])
    assert len(numbers(merged)) == 2 and "device: cuda:7" in (merged / "best.yml").read_text()
