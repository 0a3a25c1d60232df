"""Result folders: nothing by accident, nothing by halves, nothing outside."""

import dataclasses
import errno
import json
import math
import os
from dataclasses import dataclass

import pytest
import torch

from common import results as r
from common.atomic import WriteError
from common.checkpoints import CheckpointError
from common.config import ConfigError, option, read
from common.results import MetricsError, ResultExistsError, Results


@dataclass(frozen=True)
class Config:
    result_dir: str
    result_name: str | None = None
    overwrite: bool = False
    resume: bool = False
    data: str = "CURVES"
    model: str = "AE"
    optim: str = "kfac"
    seed: int = 0
    lr: float = option(1e-5, "learning rate", aliases=("rate",))
    num_epochs: int = 3


@pytest.fixture
def config(tmp_path):
    return Config(str(tmp_path / "results"), "run")


def epoch(number, **others):
    return {"epoch": number, "train_loss": 1.0 / (1 + number), **others}


def finished(config, epochs=3):
    """A result with a checkpoint after its last epoch."""
    results = Results.open(config, "app")
    for number in range(epochs):
        results.record(epoch(number))
    results.save_checkpoint({"w": torch.arange(3.0)}, {"epoch": epochs - 1})
    results.close()
    return results


def all_files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------ the folder


def test_nothing_is_made_before_something_is_written(config, tmp_path):
    results = Results.open(config, "app")
    assert list(tmp_path.iterdir()) == []
    results.record(epoch(0))
    assert results.path == tmp_path / "results" / "app" / "run"
    assert set(all_files(results.path)) == {"config.yaml", "metrics.jsonl"}


def test_a_name_is_made_from_what_is_trained(tmp_path):
    results = Results.open(Config(str(tmp_path), data="my.mod:load", seed=7), "app")
    assert results.path.name == "my-mod-load-AE-kfac-7"


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".", ".hidden", "a\\b", "a\nb", "a\0b", "/abs"])
def test_names_that_lead_elsewhere_are_refused(config, tmp_path, name):
    with pytest.raises(ConfigError, match="plain folder name"):
        Results.open(dataclasses.replace(config, result_name=name), "app")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_result_is_refused_with_the_ways_out(config):
    before = finished(config)
    kept = all_files(before.path)
    with pytest.raises(ResultExistsError, match="--overwrite, --resume, or another --result_name"):
        Results.open(config, "app")
    assert all_files(before.path) == kept


def test_overwriting_waits_for_the_first_write_and_leaves_nothing_old(config):
    before = finished(config)
    kept = all_files(before.path)
    results = Results.open(dataclasses.replace(config, overwrite=True, seed=1), "app")
    assert all_files(before.path) == kept  # the new run may still fail
    results.record(epoch(0))
    results.record(epoch(1))
    assert set(all_files(results.path)) == {"config.yaml", "metrics.jsonl"}
    assert [metrics["epoch"] for metrics in results.metrics()] == [0, 1]


def test_overwriting_spares_folders_that_are_no_results(config, tmp_path):
    thesis = tmp_path / "results" / "app" / "run"
    thesis.mkdir(parents=True)
    (thesis / "thesis.tex").write_text("years of work")
    with pytest.raises(ResultExistsError, match="is not overwritten"):
        Results.open(dataclasses.replace(config, overwrite=True), "app")


class Killed(BaseException):
    """The end of a process at a chosen moment."""


@pytest.mark.parametrize("moment", range(12))
def test_a_run_killed_while_it_makes_or_replaces_its_folder_can_be_overwritten(config, monkeypatch, moment):
    """Every change of the file system is a moment; after the last one the run lives."""
    first = Results.open(config, "app")
    first.record(epoch(0))
    first.save_checkpoint({"a": torch.zeros(2)}, {"epoch": 0})
    (first.path / "tensorboard").mkdir()
    (first.path / "tensorboard" / "events").write_text("…")
    first.close()
    left = [moment]

    def counted(change):
        def call(*args, **kwargs):
            if not left[0]:
                raise Killed
            left[0] -= 1
            return change(*args, **kwargs)

        return call

    with monkeypatch.context() as during:
        for name in ("unlink", "rmdir", "mkdir", "replace", "rename"):
            during.setattr(os, name, counted(getattr(os, name)))
        try:
            killed = Results.open(dataclasses.replace(config, overwrite=True), "app")
            killed.record(epoch(0))
        except Killed:
            pass
        killed.close()
    after = Results.open(dataclasses.replace(config, overwrite=True, seed=1), "app")
    after.record(epoch(0))
    assert read(Config, ["--config", str(after.path / "config.yaml")]).seed == 1
    assert {path.name for path in after.path.iterdir()} == {"config.yaml", "metrics.jsonl"}


def test_overwriting_spares_what_a_link_points_to(config, tmp_path):
    elsewhere = finished(dataclasses.replace(config, result_dir=str(tmp_path / "elsewhere"))).path
    (tmp_path / "results" / "app").mkdir(parents=True)
    (tmp_path / "results" / "app" / "run").symlink_to(elsewhere)
    with pytest.raises(ResultExistsError, match="is not overwritten"):
        Results.open(dataclasses.replace(config, overwrite=True), "app")


def test_two_runs_of_one_name_do_not_mix(config):
    first, second = Results.open(config, "app"), Results.open(config, "app")
    first.record(epoch(0))
    with pytest.raises(ResultExistsError, match="in the meantime"):
        second.record(epoch(0))


def test_the_recorded_configuration_neither_overwrites_nor_resumes(config):
    finished(config)
    results = Results.open(dataclasses.replace(config, overwrite=True), "app")
    results.record(epoch(0))
    again = read(Config, ["--config", str(results.path / "config.yaml")])
    assert again == dataclasses.replace(config, overwrite=False)


# --------------------------------------------------------------------------------------------------------- metrics


def test_metrics_are_json_lines_and_what_is_not_finite_is_null(config):
    results = Results.open(config, "app")
    results.record(epoch(0, test_loss=math.nan))
    results.record(epoch(1, test_loss=-math.inf))
    lines = (results.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["test_loss"] for line in lines] == [None, None]
    back = results.metrics()
    assert all(math.isnan(metrics["test_loss"]) for metrics in back)
    assert [metrics["train_loss"] for metrics in back] == [1.0, 0.5]


def test_an_epoch_is_on_the_disk_when_record_returns(config, monkeypatch):
    results = finished(config)
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    results.record(epoch(3))
    assert synced == [(results.path / "metrics.jsonl").stat().st_size]


def test_a_line_cut_short_is_left_out_and_nonsense_is_named(config):
    results = finished(config)
    file = results.path / "metrics.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"epoch": 3, "tra')
    assert len(results.metrics()) == 3
    file.write_text(whole + "nonsense\n")
    with pytest.raises(MetricsError, match=r"metrics\.jsonl:4: not a JSON object of numbers with an epoch: 'nonsense'"):
        results.metrics()


def test_no_metrics_is_an_error_that_says_so(tmp_path):
    with pytest.raises(MetricsError, match=r"metrics\.jsonl: No such file"):
        r.read_metrics(tmp_path)


def test_result_folders_are_found_themselves_and_one_below(config):
    one = finished(config).path
    other = finished(dataclasses.replace(config, result_name="other")).path
    assert r.result_folders([one.parent]) == [other, one]
    assert r.result_folders([one, one.parent]) == [one, other]
    assert r.result_folders([one.parent.parent]) == []


# ----------------------------------------------------------------------------------------------------- checkpoints


def test_a_save_that_fails_leaves_the_old_checkpoint_and_no_litter(config, monkeypatch):
    results = finished(config)
    kept = all_files(results.path)

    def full(handle):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match="checkpoint.pt: disk full"):
        results.save_checkpoint({"w": torch.zeros(3)}, {"epoch": 3})
    assert all_files(results.path) == kept


# -------------------------------------------------------------------------------------------------------- resuming


def test_a_resumed_run_goes_on_from_its_checkpoint(config):
    before = finished(config)
    before.record(epoch(3))  # killed between the record and the checkpoint
    before.record(epoch(4))
    results = Results.open(dataclasses.replace(config, resume=True, num_epochs=5), "app")
    tensors, meta = results.load_checkpoint()
    assert torch.equal(tensors["w"], torch.arange(3.0)) and meta == {"epoch": 2}
    results.record(epoch(3, train_loss=9.0))
    assert [metrics["epoch"] for metrics in results.metrics()] == [0, 1, 2, 3]
    assert results.metrics()[-1]["train_loss"] == 9.0
    recorded = read(Config, ["--config", str(results.path / "config.yaml")])
    assert recorded == dataclasses.replace(config, num_epochs=5)


def test_a_damaged_checkpoint_falls_back_on_the_one_before_and_says_so(config, caplog):
    results = finished(config)
    results.save_checkpoint({"w": torch.arange(4.0)}, {"epoch": 3})
    newest = results.path / r.CHECKPOINT
    newest.write_bytes(newest.read_bytes()[:-200])
    resumed = Results.open(dataclasses.replace(config, resume=True), "app")
    tensors, meta = resumed.load_checkpoint()
    assert torch.equal(tensors["w"], torch.arange(3.0)) and meta == {"epoch": 2}
    assert "damaged" in caplog.text and "checkpoint.1.pt" in caplog.text
    (results.path / r.KEPT[0]).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"checkpoint\.1\.pt is damaged"):
        resumed.load_checkpoint()


def test_two_runs_of_one_name(config):
    first = Results.open(config, "app")
    first.record(epoch(0))
    first.save_checkpoint({}, {"epoch": 0})
    kept = all_files(first.path)
    with pytest.raises(ResultExistsError, match="another run is writing"):
        Results.open(dataclasses.replace(config, resume=True), "app")
    second = Results.open(dataclasses.replace(config, overwrite=True), "app")
    with pytest.raises(ResultExistsError, match="another run is writing"):
        second.record(epoch(0))
    assert all_files(first.path) == kept
    first.close()
    second.record(epoch(0))


def test_reading_a_checkpoint_of_a_run_that_is_not_resumed_changes_nothing(config):
    results = finished(config)
    results.record(epoch(3))
    kept = all_files(results.path)
    results.load_checkpoint()
    assert all_files(results.path) == kept


def test_nothing_to_resume(config):
    with pytest.raises(CheckpointError, match="nothing to resume"):
        Results.open(dataclasses.replace(config, resume=True), "app")


def test_a_run_recorded_under_a_former_name_of_an_option_is_resumed_as_itself_only(config):
    recorded = finished(config).path / r.CONFIG
    recorded.write_text(recorded.read_text().replace("lr:", "rate:"))
    Results.open(dataclasses.replace(config, resume=True), "app").close()
    with pytest.raises(ConfigError, match="lr is 1e-05 there and 0.1 here"):
        Results.open(dataclasses.replace(config, resume=True, lr=0.1), "app")


def test_a_run_is_resumed_as_itself_only(config):
    finished(config)
    with pytest.raises(ConfigError, match=r"lr is 1e-05 there and 0\.1 here"):
        Results.open(dataclasses.replace(config, resume=True, lr=0.1), "app")
    moved = dataclasses.replace(config, resume=True, num_epochs=9, result_dir=config.result_dir + "/.")
    assert Results.open(moved, "app").path.exists()
