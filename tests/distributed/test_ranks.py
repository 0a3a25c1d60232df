"""Several ranks against one process: the same parameters for every method, and one typed error on every rank."""

import pytest
import torch

import fisherfn as ff
from fisherfn import errors as E
from fisherfn.distributed.owners import costs, owners
from fisherfn.types import Shape
from tests.distributed import equal
from tests.distributed.ranks import together


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The results of four ranks, which are started once for all tests."""
    return together(4, "tests.distributed.equal:everything", tmp_path_factory.mktemp("ranks"))


def close(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("run", equal.RUNS)
def test_uneven_shards_give_the_parameters_of_one_process(ranks, run):
    problem, x, y = equal.batch()
    method, how = run.split("/")
    expected = equal.trained(problem.build(method=method), problem.params, x, y, how)
    sizes = [size for size in equal.SHARDS if f"{size}/{run}" in ranks[0]]
    assert 3 in sizes
    for size in sizes:
        for rank in range(size):
            close(ranks[rank][f"{size}/{run}"], expected)


@pytest.mark.parametrize(("id", "method"), [(id, method) for id, methods in equal.NETS.items() for method in methods])
def test_other_layers_are_reduced_exactly(ranks, id, method):
    problem, x, y = equal.batch(id)
    expected = equal.trained(problem.build(method=method), problem.params, x, y, "step", steps=2)
    for rank in ranks[:2]:
        close(rank[f"{id}/{method}"], expected)


def test_parameters_are_equal_bit_for_bit(ranks):
    keys = [key for key in ranks[0] if key == "single" or key.endswith(("/step", "/adaptive"))]
    for key in keys:
        for rank in ranks:
            for name, value in rank.get(key, {}).items():
                assert torch.equal(value, ranks[0][key][name]), (key, name)


def test_unequal_microbatches_give_the_step_of_the_batch(ranks):
    problem, x, y = equal.batch()
    ng = problem.build(method="kfac")
    state, random = ng.init(problem.params, damping=0.1), torch.Generator().manual_seed(0)
    expected, _, _ = ng.step(problem.params, state, (x, y), generator=random)
    close(ranks[0]["micro"], expected)


def test_moments_of_two_batches_are_reduced_once(ranks):
    problem, x, y = equal.batch()
    ng, params, random = problem.build(method="kfac"), problem.params, torch.Generator().manual_seed(0)
    state, waiting = ng.init(params, damping=0.1), []
    for due in (False, True):
        waiting.append(ng.stats(params, (x, y), generator=random))
        nat, state, _ = ng.step_from(state, waiting[-1], ff.join(waiting) if due else None, invert=due)
        params = ff.tree.add(params, nat, scale=-0.05)
    close(ranks[0]["delayed"], params)
    close(ranks[1]["delayed/factors"], ff.tree.flatten(state.factors))
    assert ranks[0]["delayed/sent"].count("moments") == 1 and ranks[0]["delayed/sent"].count("gradient") == 3


def test_a_step_sends_gradient_moments_and_inverses_once(ranks):
    problem, _, _ = equal.batch()
    shapes = problem.build(method="kfac").layout.block_shapes.values()
    entries = sum(s.k * s.o * s.i for s in shapes)
    triangles = sum(s.k * (s.i * (s.i + 1) + s.o * (s.o + 1)) // 2 for s in shapes)
    sent = ranks[0]["sent/kfac"]
    assert set(sent) == {"agreement", "gradient", "moments", "inverses"}
    assert sent["moments"] == 8 * triangles  # nothing beyond the triangles
    assert 8 * entries < sent["gradient"] < 8 * (entries + 50)  # the scalars are in the same message
    assert sent["inverses"] < 8 * (triangles + 10 * len(shapes))
    assert ranks[0]["times/kfac"] == {"agreement": 2, "gradient": 1, "moments": 1, "inverses": 1}
    assert ranks[0]["times/ekfac"] == {"agreement": 2, "gradient": 1, "moments": 1, "mean": 1, "inverses": 1}
    assert ranks[0]["sent/ekfac"]["mean"] == 8 * entries  # the eigenvalues of all blocks


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("method", "RankError: the ranks disagree on model, method or likelihood"),
        ("model", "RankError: the ranks disagree on model, method or likelihood"),
        ("params", "RankError: the ranks disagree on the initial parameters"),
        ("shape", "RankError: the call failed on rank 1 of 2"),
        ("generator", "RankError: the ranks disagree on the generator"),
        ("arguments", "RankError: the ranks disagree on the arguments of ng.stats"),
        ("blocks", "RankError: the ranks disagree on the arguments of ng.stats"),
        ("empty", "EmptyBatchError: no rank has an example"),
        ("invert", "RankError: the ranks disagree on the arguments of a step (invert"),
        ("state", "RankError: the call failed on rank 1 of 2, so no rank can go on. Rank 1: StructureError"),
        ("unreduced", "RankError: the call failed on rank 1 of 2, so no rank can go on. Rank 1: StructureError"),
        ("norm", "StructureError: the net couples the examples of a batch (batch norm"),
        ("twice", "StructureError: this natural gradient is data-parallel already"),
    ],
)
def test_a_disagreement_is_one_typed_error_on_every_rank(ranks, case, text):
    assert ranks[0][f"error/{case}"].startswith(text)
    assert ranks[1][f"error/{case}"].startswith(text)
    assert case != "shape" or "ShapeError" in ranks[0]["error/shape"]  # the other rank's text is passed on


def test_the_most_expensive_blocks_go_to_different_owners():
    shapes = {"a": Shape(1, 2, 3), "b": Shape(1, 10, 10), "c": Shape(1, 9, 9), "d": Shape(1, 4, 99, one_hot=True)}
    found = costs(shapes, limit=50)
    assert found == {"a": 8 + 27, "b": 2000, "c": 2 * 729, "d": 64}
    assert owners(found, 2) == {"a": 1, "b": 0, "c": 1, "d": 1}
    assert owners(found, 1) == dict.fromkeys(shapes, 0)


def test_without_a_process_group_the_error_says_how_to_start():
    problem, _, _ = equal.batch()
    with pytest.raises(E.StructureError, match="torchrun"):
        ff.distributed.data_parallel(problem.build())
