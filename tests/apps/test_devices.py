"""Trainers and benchmark on a GPU: runs that go on on the other kind of device, and what is measured there."""

import dataclasses
import math

import pytest
import torch

import benchmark
from common import runs, trainer
from common.checkpoints import load_checkpoint
from common.results import read_metrics
from common.train_config import CnnConfig, TrainConfig

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available()")

OPTIMIZERS = ["sgd", "adam", "kfac", "lanczos", "exactNG"]
RUNS = [(config, optim) for config in (TrainConfig, CnnConfig) for optim in OPTIMIZERS]


# two-level's default settings do not lower this convolutional net's loss in an epoch, wherever it is trained
@GPU
@pytest.mark.parametrize(("config", "optim"), [*RUNS, (TrainConfig, "twolevel_kfac")])
def test_digits_are_learnt_there(config, optim, tmp_path):
    folder = trainer.run(
        config(
            data="DIGITS", optim=optim, num_epochs=1, device="cuda", num_workers=2, quiet=True, result_dir=str(tmp_path)
        )
    )  # fmt: skip
    before, after = read_metrics(folder)
    assert after["skipped"] == 0 and after["train_loss"] < before["train_loss"]


@GPU
@pytest.mark.parametrize("optim", ["adam", "kfac", "ekfac", "exactNG"])
@pytest.mark.parametrize(("first", "then"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_goes_on_on_the_other_device(own, optim, first, then):
    """Resume in the middle of an epoch: order, labels and optimizer are those of the uninterrupted run."""
    settings = {"data": "own:load", "optim": optim, "num_epochs": 2, "batch_size": 8, "lr": 0.05, "quiet": True}
    if optim == "adam":  # makes steps of the rounding of a gradient that is zero, as that of a bias before a batch norm
        settings |= {"model": "own:autoencoder", "lr": 0.005}
    else:
        settings |= {"damping": 0.1, "kl_bound": 0.1}
    config = TrainConfig(**settings, device=first, result_name="moved")
    straight = trainer.run(dataclasses.replace(config, device="cpu", result_name="straight"))

    def stop(results, save_every, signals, step, at):
        if step == 6:  # epochs have four
            runs.save(results, at())
            raise runs.Stopped(2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "watched", stop)
        with pytest.raises(runs.Stopped):
            trainer.run(config)
    moved = trainer.run(dataclasses.replace(config, device=then, resume=True))
    (found, _), (expected, _) = (load_checkpoint(folder / "checkpoint.pt") for folder in (moved, straight))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.startswith("params"):
            torch.testing.assert_close(found[name], tensor, rtol=1e-2, atol=1e-3)
    last, wanted = read_metrics(moved)[-1], read_metrics(straight)[-1]
    assert (last["epoch"], last["step"]) == (wanted["epoch"], wanted["step"]) == (2, 8)
    assert math.isclose(last["train_loss"], wanted["train_loss"], rel_tol=1e-3)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_the_benchmark_measures_time_and_on_a_gpu_memory(device):
    config = benchmark.BenchmarkConfig(rounds=1, batch_size=4, refresh=False, compile=False, device=device)
    found = benchmark.measure("cuda_convnet", config)["contenders"]
    timings = [timing for one in found.values() for timing in one["parts"].values()]
    assert len(timings) == 1 + 3 * (len(found) - 1), "SGD's step, and three kinds of ours"
    assert all(timing["ms"] > 0 for timing in timings)
    assert all((timing["peak_mib"] is not None) == (device == "cuda") for timing in timings)
