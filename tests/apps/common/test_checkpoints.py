"""Checkpoints: whole or refused, in one step, and nothing in them is executed."""

import os
from pathlib import Path

import pytest
import torch

from common import checkpoints
from common.checkpoints import CheckpointError, load_checkpoint, save_checkpoint


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    tensors = {
        "params.0.weight": torch.randn(3, 4, dtype=torch.float64, requires_grad=True),
        "state.count": torch.tensor(7),
        "empty": torch.zeros(0, 2),
        "half": torch.randn(2).bfloat16(),
    }
    meta = {"epoch": 3, "seconds": 0.1, "names": ["a", "b"], "none": None}
    save_checkpoint(tmp_path / "c.pt", tensors, meta)
    back, back_meta = load_checkpoint(tmp_path / "c.pt")
    assert back_meta == meta and list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and not back[name].requires_grad
        assert torch.equal(back[name], tensor.detach())


def test_a_view_is_saved_without_the_rest_of_its_storage(tmp_path):
    save_checkpoint(tmp_path / "c.pt", {"row": torch.zeros(1000, 1000)[0]}, {})
    assert (tmp_path / "c.pt").stat().st_size < 20_000


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_checkpoint_is_named(tmp_path, keep):
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"w": torch.randn(50, 50)}, {"epoch": 0})
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"c\.pt is damaged or no checkpoint"):
        load_checkpoint(path)


def test_other_versions_and_other_files_are_named(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="format version None"):
        load_checkpoint(path)
    monkeypatch.setattr(checkpoints, "VERSION", 2)
    save_checkpoint(path, {}, {})
    monkeypatch.setattr(checkpoints, "VERSION", 1)
    with pytest.raises(CheckpointError, match="format version 2, this program reads version 1"):
        load_checkpoint(path)


class Payload:
    def __reduce__(self):
        return (os.system, ("exit 1",))


def test_nothing_in_a_checkpoint_is_executed(tmp_path, monkeypatch):
    torch.save({"version": 1, "meta": "{}", "tensors": Payload()}, tmp_path / "c.pt")
    monkeypatch.setattr(os, "system", lambda command: pytest.fail("executed"))
    with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
        load_checkpoint(tmp_path / "c.pt")


def test_a_checkpoint_is_on_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    order = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("sync"), sync(handle)))
    monkeypatch.setattr(Path, "replace", lambda self, target: (order.append("replace"), replace(self, target)))
    save_checkpoint(tmp_path / "c.pt", {}, {})
    assert order == ["sync", "replace", "sync"]
