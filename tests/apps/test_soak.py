"""The soak finds what it looks for."""

import random

import pytest
import torch

import soak
from common.checkpoints import load_checkpoint, save_checkpoint
from common.results import CHECKPOINT


@pytest.mark.parametrize(
    "optim, fault", [("kfac", "full disk"), ("kfac", "kill -9, checkpoint truncated"), ("gan:adam", "kill -9")]
)
def test_a_disturbed_run_ends_as_the_straight_one(tmp_path, optim, fault):
    assert soak.disturbed(tmp_path, optim, soak.FAULTS[fault], random.Random(1)) is None


def test_a_difference_is_seen(tmp_path):
    folders = [tmp_path / name for name in ("one", "two")]
    for folder, epochs in zip(folders, ([0, 1], [0, 2]), strict=True):
        folder.mkdir()
        save_checkpoint(folder / CHECKPOINT, {"w": torch.ones(2)}, {})
        lines = [f'{{"epoch": {epoch}, "step": 1, "train_loss": 0.5}}\n' for epoch in epochs]
        (folder / "metrics.jsonl").write_text("".join(lines))
    assert "metrics" in soak.difference(*folders)
    save_checkpoint(folders[1] / CHECKPOINT, {"w": torch.zeros(2)}, {})
    assert "checkpoint" in soak.difference(*folders)
    (folders[1] / CHECKPOINT).write_bytes(b"")
    assert "damaged" in soak.difference(*folders)
    assert torch.equal(load_checkpoint(folders[0] / CHECKPOINT)[0]["w"], torch.ones(2))
