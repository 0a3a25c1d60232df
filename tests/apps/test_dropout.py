"""Dropout in one's own net: every optimizer trains it, and a resumed run draws the masks of the straight one."""

import pytest
import torch

import fisherfn as ff
from common.checkpoints import load_checkpoint
from common.config import read
from common.results import read_metrics
from common.train_config import TrainConfig
from common.trainer import run
from tests.apps.options import cadence, curvature

DROPS = """

def drops(data):
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2))
"""
COMMON = ["--data", "own:load", "--model", "own:drops", "--batch_size", "10", "--quiet"]


@pytest.fixture
def mine(own):
    path = own / "own.py"
    path.write_text(path.read_text() + DROPS)
    return own


def trained(*more):
    fixed = curvature(more, "--damping", "1", "--kl_bound", "0.1")
    lr = ("--lr", "0.01" if "adam" in more else "0.1")
    return run(read(TrainConfig, [*COMMON, *lr, *fixed, *cadence(more), *more]))


@pytest.mark.parametrize("optim", ["sgd", "adam", "kfac", "exactNG"])
@pytest.mark.parametrize("part", [None, 6], ids=["whole batch", "Fisher of a part"])
def test_every_optimizer_trains_it(mine, optim, part):
    more = [] if part is None else ["--fisher_batch_size", str(part)]
    if part is not None and optim in ("sgd", "adam"):
        pytest.skip("has no Fisher")
    metrics = read_metrics(trained("--optim", optim, "--num_epochs", "8", "--result_name", "x", *more))
    assert metrics[-1]["train_loss"] < metrics[0]["train_loss"] and not metrics[-1]["skipped"]


@pytest.mark.parametrize("optim", ["sgd", "kfac"])
def test_a_resumed_run_is_the_straight_one(mine, optim):
    straight = trained("--optim", optim, "--num_epochs", "3", "--result_name", "straight")
    trained("--optim", optim, "--num_epochs", "1", "--result_name", "parts")
    parts = trained("--optim", optim, "--num_epochs", "3", "--result_name", "parts", "--resume")
    one, two = (load_checkpoint(folder / "checkpoint.pt")[0] for folder in (straight, parts))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert not any("dropout" in name for name in one)


def test_masks_change_from_step_to_step(mine, monkeypatch):
    seen = []
    draw = ff.dropout_seeds
    monkeypatch.setattr(ff, "dropout_seeds", lambda *given: seen.append(draw(*given)) or seen[-1])
    trained("--optim", "sgd", "--num_epochs", "2", "--result_name", "x")
    steps = [seeds for seeds in seen if len(seeds)]
    assert len(steps) == 8 and len({tuple(seeds.tolist()) for seeds in steps}) == 8
    assert [len(seeds) for seeds in steps] == [10, 10, 10, 2] * 2
