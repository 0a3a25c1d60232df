"""Event files: the numbers of metrics.jsonl, each step once, also after a resume; nothing without the flag."""

import builtins
import sys
from pathlib import Path

import pytest

import fisherfn as ff
from common import tensorboard
from common.config import read
from common.gan.config import GanConfig
from common.gan.trainer import run as play
from common.results import read_metrics
from common.train_config import TrainConfig
from common.trainer import run

SMALL = ["--data", "own:load", "--optim", "sgd", "--lr", "0.1", "--batch_size", "10", "--quiet", "--result_name", "x"]
GAN = "--data own:digits --width 0.02 --z_dim 5 --batch_size 12 --crit_repeats 1 --fid none --quiet --result_name x"
ADAM = ["--gen_optim", "adam", "--crit_optim", "adam"]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    module = "tensorboard.backend.event_processing.event_file_loader"
    loader = pytest.importorskip(module, reason="tensorboard is not installed")
    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted((folder / tensorboard.FOLDER).iterdir()):
        for event in loader.EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.tensor.float_val[0]))
    return found


def is_what_metrics_say(folder: Path) -> None:
    metrics, found = read_metrics(folder), scalars(folder)
    assert set(found) == {name for epoch in metrics for name in epoch} - {"step"}
    for name, points in found.items():
        expected = [(epoch["step"], epoch[name]) for epoch in metrics if name in epoch]
        assert [step for step, _ in points] == [step for step, _ in expected]
        assert [value for _, value in points] == pytest.approx([value for _, value in expected], rel=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_run_and_its_resumption_have_every_step_once(own):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    run(read(TrainConfig, [*SMALL, "--num_epochs", "2", "--tensorboard"]))
    folder = run(read(TrainConfig, [*SMALL, "--num_epochs", "4", "--tensorboard", "--resume"]))
    assert len(scalars(folder)["train_loss"]) == 5
    is_what_metrics_say(folder)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_run_that_starts_to_log_when_resumed_has_its_beginning_too(own):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    run(read(TrainConfig, [*SMALL, "--num_epochs", "2"]))
    is_what_metrics_say(run(read(TrainConfig, [*SMALL, "--num_epochs", "3", "--tensorboard", "--resume"])))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_games_log_as_well(own):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    is_what_metrics_say(play(read(GanConfig, [*GAN.split(), *ADAM, "--num_epochs", "2", "--tensorboard"])))


def test_without_the_flag_nothing_is_written(own):
    assert not (run(read(TrainConfig, [*SMALL, "--num_epochs", "1"])) / tensorboard.FOLDER).exists()


@pytest.mark.parametrize("start", [lambda: run(read(TrainConfig, [*SMALL, "--tensorboard"])),
                                   lambda: play(read(GanConfig, [*GAN.split(), *ADAM, "--tensorboard"]))])  # fmt: skip
def test_a_missing_package_is_a_typed_error_before_anything_is_written(own, monkeypatch, start):
    whole = builtins.__import__

    def without(name, *args, **kwargs):
        if "tensorboard" in name and not name.startswith("common"):
            raise ImportError(name)
        return whole(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ff.errors.MissingPackageError, match="pip install tensorboard"):
        start()
    assert not (own / "results").exists()
