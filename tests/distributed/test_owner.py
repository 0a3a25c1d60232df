"""Owners that precondition, against one process: the same steps, whole states for checkpoints, traffic and errors."""

import pytest
import torch

import fisherfn as ff
from tests.distributed import equal, owner
from tests.distributed.ranks import together


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return together(3, "tests.distributed.owner:everything", tmp_path_factory.mktemp("owner"))


def close(found, expected):
    assert found.keys() >= expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("run", owner.RUNS)
def test_owners_take_the_steps_of_one_process(ranks, run):
    problem, x, y = equal.batch()
    size, method, how = run.split("/")
    expected = equal.trained(problem.build(method=method), problem.params, x, y, how)
    for rank in ranks[: int(size)]:
        close(rank[run], expected)
        assert all(torch.equal(value, ranks[0][run][name]) for name, value in rank[run].items())


@pytest.mark.parametrize("name", owner.TWO_LEVEL)
def test_two_levels_precondition_with_their_owners(ranks, name):
    problem, x, y = equal.batch()
    expected = owner.one_step(problem.build(method=owner.TWO_LEVEL[name]), problem, x, y)
    for rank in ranks:
        close(rank[f"two-level/{name}"], expected)


@pytest.mark.parametrize("id", owner.NETS)
def test_other_layers_have_owners_too(ranks, id):
    problem, x, y = equal.batch(id)
    expected = owner.one_step(problem.build(method=owner.NETS[id]), problem, x, y)
    for rank in ranks:
        close(rank[f"net/{id}"], expected)


def test_a_few_blocks_are_inverted_by_their_owners(ranks):
    problem, x, y = equal.batch()
    expected = owner.one_step(problem.build(method="kfac"), problem, x, y, only=True)
    for rank in ranks:
        close(rank["some"], expected)


def test_single_precision_agrees_bit_for_bit(ranks):
    for rank in ranks:
        assert all(torch.equal(value, ranks[0]["single"][name]) for name, value in rank["single"].items())


def test_each_inverse_is_on_one_rank_only(ranks):
    problem, _, _ = equal.batch()
    blocks = problem.build(method="kfac").layout.block_shapes
    assert sorted(key for rank in ranks for key in rank["held"]) == sorted(blocks)
    assert all(len(rank["held"]) < len(blocks) for rank in ranks)


def test_a_gathered_state_is_that_of_one_process(ranks):
    problem, x, y = equal.batch()
    ng, random = problem.build(method="kfac"), torch.Generator().manual_seed(0)
    params, state = problem.params, ng.init(problem.params, damping=0.1)
    for step in range(4):
        nat, state, _ = ng.step(params, state, (x, y), generator=random)
        params = ff.tree.add(params, nat, scale=-0.05)
        if step == 1:
            inverses = ff.tree.flatten(state.inverses)
        if step == 2:
            logdet = ng.inverse(state).logdet()
    for rank in ranks:
        close(rank["whole"], inverses)
        assert rank["owned"].keys() == rank["mine"].keys() < inverses.keys()
        assert all(torch.equal(rank["owned"][name], value) for name, value in rank["mine"].items())
    for rank in ranks[:2]:  # 3 ranks, then 2, then 1
        close(rank["resumed"], params)
        torch.testing.assert_close(rank["logdet"], logdet)


def test_a_failed_inversion_is_seen_on_every_rank(ranks):
    problem, _, _ = equal.batch()
    first, *others = problem.build(method="kfac").layout.block_shapes
    for rank in ranks:
        assert rank["broken"] == {first: False} | dict.fromkeys(others, True) and rank["kept"]


def test_a_step_sends_preconditioned_gradients_and_no_inverses(ranks):
    problem, _, _ = equal.batch()
    ng = problem.build(method="kfac")
    entries = sum(s.k * s.o * s.i for s in ng.layout.block_shapes.values())
    assert ranks[0]["times"] == {"agreement": 2, "gradient": 1, "moments": 1, "checks": 1, "preconditioned": 1}
    assert ranks[0]["sent"]["checks"] == 8 * 3 * len(ng.layout.block_shapes)  # mask, jitter, condition
    assert 8 * entries <= 2 * ranks[0]["sent"]["preconditioned"] < 2 * 8 * entries  # padded to the longest part


def test_auto_chooses_fewer_bytes(ranks):
    assert ranks[0]["auto/1"] and not ranks[0]["auto/1000"] and not ranks[0]["auto/exact"]


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("whole state", "RankError: the call failed on ranks 0, 1 of 2, so no rank can go on. Rank 0: StructureError"),
        ("owner's state", "RankError: the call failed on ranks 0, 1 of 2, so no rank can go on. Rank 0: StructureErr"),
        ("one rank", "RankError: the call failed on rank 1 of 2, so no rank can go on. Rank 1: StructureError: the st"),
        ("logdet", 'StructureError: with precondition="owner" no rank has all inverses: use ng.local.inverse'),
        ("vmap", "StructureError: no message can be sent inside torch.vmap"),
        ("exact", "StructureError: exactNG solves one system for all blocks on every rank, so no rank owns a block"),
        ("nested", "StructureError: twolevel_kfac solves one system for all blocks on every rank"),
        ("not shared", 'StructureError: precondition="owner" needs blocks with owners, and share_inversions=False'),
        ("unknown", "UnknownNameError: unknown precondition 'owners'; did you mean 'owner'?"),
        ("auto", 'HyperparameterError: precondition="auto" compares inverses every few steps'),
        ("every", "HyperparameterError: invert_every must be a whole number >= 1"),
        ("differs", "RankError: the ranks disagree on share_inversions, precondition or invert_every"),
        ("local statistics", "RankError: the call failed on rank 1 of 2"),
    ],
)
def test_what_does_not_fit_is_one_typed_error_on_every_rank(ranks, case, text):
    for rank in ranks[:2]:
        assert rank[f"error/{case}"].startswith(text)
    if case == "whole state":
        assert "ng.owned(state)" in ranks[0]["error/whole state"]
    if case == "owner's state":
        assert "pass ng.gathered(state)" in ranks[0]["error/owner's state"]
