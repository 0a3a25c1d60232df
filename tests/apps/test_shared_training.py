"""Trainers under torchrun: the results of one process, stopped and resumed on other numbers of ranks."""

import pytest
import torch

from common.checkpoints import load_checkpoint
from common.results import read_metrics
from tests.apps import conftest, shared_training
from tests.distributed.ranks import together


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "own.py").write_text(conftest.OWN + shared_training.NET)
    return folder, together(4, "tests.apps.shared_training:everything", folder, seconds=400.0)


@pytest.mark.parametrize("optim", shared_training.OPTIMS)
def test_four_then_two_then_three_ranks_train_as_one_process(ranks, own, monkeypatch, optim):
    folder, found = ranks
    (own / "own.py").write_text(conftest.OWN + shared_training.NET)
    monkeypatch.setenv("FISHERFN_FOLDER", str(own))
    straight = shared_training.train(optim, optim)
    shared = folder / "train_mlp" / optim
    assert [rank["codes"] for rank in found] == [
        [143] * len(shared_training.OPTIMS)
    ] * 4  # rank 1 was told, all stopped
    one, two = (load_checkpoint(each / "checkpoint.pt") for each in (straight, shared))
    assert one[1]["step"] == two[1]["step"] == 12  # 32 examples, global batches of 9: the last one is shorter
    for path in (path for path in one[0] if path.startswith("params")):
        torch.testing.assert_close(two[0][path], one[0][path], rtol=1e-9, atol=1e-9)
    for mine, its in zip(read_metrics(shared), read_metrics(straight), strict=True):
        for name in ("epoch", "step", "train_loss", "test_loss", "train_accuracy", "test_accuracy"):
            assert mine[name] == pytest.approx(its[name], rel=1e-9), name


def test_only_the_first_rank_prints_and_writes(ranks):
    folder, _ = ranks
    assert (folder / "rank-0.log").read_text().count("Everything is in") == 2 * len(shared_training.OPTIMS)
    assert all("Everything is in" not in (folder / f"rank-{rank}.log").read_text() for rank in (1, 2, 3))
    assert {path.name for path in (folder / "train_mlp").iterdir()} == set(shared_training.OPTIMS)


def test_what_needs_one_process_is_refused(ranks):
    for rank in ranks[1][:2]:
        assert [text.split()[0] for text in rank["refused"]] == ["compile", "fisher_batch_size", "the"]
        assert "batch norm" in rank["refused"][2]


def test_a_silent_rank_is_named(ranks):
    for rank in (0, 2):
        assert "No word from rank 1. " in ranks[1][rank]["silent"]
