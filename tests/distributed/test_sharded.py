"""Parameters that `fully_shard` has sharded, against one process: the same steps, the same placement, typed errors."""

import pytest
import torch

import fisherfn as ff
from tests.distributed import sharded
from tests.distributed.ranks import together


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return together(3, "tests.distributed.sharded:everything", tmp_path_factory.mktemp("sharded"))


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("run", sharded.RUNS)
def test_sharded_parameters_take_the_steps_of_one_process(ranks, run):
    size, method, _ = run.split("/")
    ng, start = sharded.built(method), {name: p.detach() for name, p in sharded.net().named_parameters()}
    x, y = sharded.batch()
    params, state, stats = sharded.trained(ng, start, x, y)
    nat = ng.precondition(state, stats)
    for rank in ranks[: int(size)]:
        found = rank[run]
        close(found["params"], params)
        close(found["mixed"], params)
        close(found["grads"], stats.grads)
        close(found["nat"], nat)
        close(found["again"], nat)
        close(found["sgd"], ff.tree.add(start, nat, scale=-1.0))
        assert found["placed"] and not found["kept"]  # a whole tensor stays whole


@pytest.mark.parametrize("run", ["2/kfac/owner", "3/kfac/owner"])
def test_shards_are_uneven_and_inverses_on_one_rank(ranks, run):
    size = int(run[0])
    rows = {2: {5: [3, 2], 4: [2, 2], 3: [2, 1]}, 3: {5: [2, 2, 1], 4: [2, 2, 0], 3: [1, 1, 1]}}[size]
    for name, p in sharded.net().named_parameters():
        found = [rank[run]["local"][name] for rank in ranks[:size]]
        assert found == [(count, *p.shape[1:]) for count in rows[p.shape[0]]]
    blocks = sharded.built("kfac").layout.block_shapes
    assert sorted(key for rank in ranks[:size] for key in rank[run]["own"]) == sorted(blocks)


def test_parameters_travel_once_per_run_of_the_model(ranks):
    largest = {2: [3, 2, 2], 3: [2, 2, 1]}
    for size in (2, 3):
        first, second, third = largest[size]  # rows of the longest shards, of 5, 4 and 3
        numbers = first * (4 + 1 + 2) + second * (5 + 1) + third * (4 + 1)
        # four steps of the sharded run; in the mixed one the first weight is whole; one gather of gradients
        expected = 8 * (5 * numbers + 4 * (numbers - first * 4))
        assert ranks[0][f"{size}/kfac/owner"]["sent"]["parameters"] == expected


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("functional", "StructureError: '0.weight' is a DTensor"),
        ("build", "StructureError: '0.weight' is a DTensor"),
        ("alone", "StructureError: '0.weight' is a DTensor"),
        ("alone stats", "StructureError: '0.weight' is a DTensor"),
        ("adaptive", "StructureError: '0.weight' is a DTensor"),
        ("tree", "RankError: the call failed on ranks 0, 1 of 2, so no rank can go on. Rank 0: StructureError: '0.wei"),
        ("columns", "'2.weight' is placed as S(1): only tensors that are sharded on dimension 0"),
        ("copies", "'2.weight' is placed as R: only tensors that are sharded on dimension 0"),
        ("odd", "'2.weight' has 1 rows on rank 0, where torch.chunk gives 2 of 4"),
        ("one rank", "RankError: the ranks disagree on the arguments of ng.stats"),
        ("gradients", "'2.weight' is placed as S(1): only tensors"),
        ("2-d", "'0.weight' is placed on a mesh of 2 dimensions"),
        ("backwards", "'0.weight' is sharded over the ranks [2, 1, 0], and the batch over [0, 1, 2]"),
    ],
)
def test_what_is_not_supported_is_one_typed_error_on_every_rank(ranks, case, text):
    for rank in ranks[:2]:
        found = rank[f"error/{case}"]
        assert found.startswith(("RankError", "StructureError")) and text in found
