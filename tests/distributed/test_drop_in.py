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
        ("compiled", "StructureError: compile=True needs a single process"),
        ("other parameters", "RankError: the ranks disagree on the initial parameters"),
        ("watched", "StructureError: a watched pass needs a single process"),
        ("unbatched", "StructureError: a step without its batch needs a single process"),
    ],
)
def test_what_needs_one_process_is_refused_on_every_rank(ranks, case, text):
    assert ranks[0]["refused"][case].startswith(text)
    assert ranks[1]["refused"][case].startswith(text)
