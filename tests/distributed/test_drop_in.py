"""The drop-in classes in two processes against one: the same parameters, and typed errors for what is refused."""

import pytest
import torch

from tests.distributed import drop_in
from tests.distributed.ranks import together


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return together(2, "tests.distributed.drop_in:everything", tmp_path_factory.mktemp("drop_in"))


@pytest.mark.parametrize(
    ("case", "alone"),
    [
        ("adaptive", lambda: drop_in.optimized()),
        ("fixed", lambda: drop_in.optimized(**drop_in.FIXED)),
        ("wrapped", lambda: drop_in.optimized(**drop_in.FIXED)),
        ("preconditioned", drop_in.preconditioned),
        ("adaptive, built alone", lambda: drop_in.optimized()),
        ("fixed, built alone", lambda: drop_in.optimized(**drop_in.FIXED)),
    ],
)
def test_two_ranks_take_the_steps_of_one_process(ranks, case, alone):
    for name, value in alone().items():
        torch.testing.assert_close(ranks[0][case][name], value, rtol=1e-10, atol=1e-10)
        assert torch.equal(ranks[1][case][name], ranks[0][case][name])


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("batch norm", "StructureError: the net couples the examples of a batch (batch norm"),
        (
            "batch norm after a build in evaluation mode",
            "StructureError: the net couples the examples of a batch (batch norm",
        ),
        ("other lengths", "RankError: the ranks disagree on the shape of an example (pad the batches of all ranks"),
        ("steps alone", "RankError: the ranks disagree on the state before the first step"),
        ("compiled", "StructureError: compile=True needs a single process"),
        ("other parameters", "RankError: the ranks disagree on the initial parameters"),
        ("watched", "StructureError: a watched pass needs a single process"),
        ("unbatched", "StructureError: a step without its batch needs a single process"),
        ("unbatched optimizer", "StructureError: a step without its batch needs a single process"),
    ],
)
def test_what_needs_one_process_is_refused_on_every_rank(ranks, case, text):
    assert ranks[0]["refused"][case].startswith(text)
    assert ranks[1]["refused"][case].startswith(text)


def test_a_first_batch_that_is_bad_on_one_rank_is_skipped_on_all(ranks):
    for losses, skipped in (rank["bad"] for rank in ranks):
        assert losses[0].isnan() and skipped == 1
        assert losses[1:].isfinite().all() and torch.equal(losses[1:], ranks[0]["bad"][0][1:])


def test_weights_that_one_rank_edits_and_sends_are_changed_for_all(ranks):
    """If only some ranks looked back, these alone would send messages."""
    params, rejected = drop_in.edited()
    assert rejected == [False] * 5
    for found, its in (rank["edited"] for rank in ranks):
        assert its == rejected
        torch.testing.assert_close(found, params, rtol=1e-10, atol=1e-10)


def test_an_overflow_on_one_rank_skips_the_step_on_all(ranks):
    for params, scale in (rank["overflowed"] for rank in ranks):
        assert scale == 2.0**9
        assert all(torch.equal(p, ranks[0]["overflowed"][0][name]) for name, p in params.items())
