"""Groups of models: stacking, taking, selecting; what is wrong is said."""

import pytest
import torch
from torch import nn

import fisherfn as ff
from fisherfn import members


def trees():
    return [{"w": torch.full((2,), float(m)), "b": (torch.tensor(m),)} for m in range(3)]


def test_stacked_and_taken_is_each_tree():
    group = members.stack(trees())
    assert members.size(group) == 3
    for m, tree in enumerate(trees()):
        torch.testing.assert_close(members.take(group, m), tree)
    torch.testing.assert_close(members.take(group, [2, 0, 2]), members.stack([trees()[m] for m in (2, 0, 2)]))
    torch.testing.assert_close(members.take(group, torch.tensor([1])), members.stack(trees()[1:2]))
    assert members.take(group, [])["w"].shape == (0, 2)


def test_a_repeated_tree_has_its_own_memory():
    tree = {"w": torch.ones(2)}
    group = members.repeat(tree, 3)
    group["w"][0] = 5.0
    assert group["w"].tolist() == [[5, 5], [1, 1], [1, 1]] and tree["w"].tolist() == [1, 1]


def test_members_that_are_not_selected_stay_bit_for_bit():
    old = members.stack(trees())
    new = ff.tree.map(lambda leaf: leaf.double() * torch.nan, old)
    old = ff.tree.map(lambda leaf: leaf.double(), old)
    found = members.select(torch.tensor([False, True, False]), new, old)
    for m in (0, 2):
        torch.testing.assert_close(members.take(found, m), members.take(old, m), rtol=0, atol=0)
    assert members.take(found, 1)["w"].isnan().all()


def test_a_member_that_cannot_keep_its_old_leaf_is_marked():
    mask = torch.tensor([True, False])
    found = members.select(mask, {"taps": torch.ones(2, 3)}, {"taps": torch.ones(2, 5)})
    assert found["taps"][0].tolist() == [1, 1, 1] and found["taps"][1].isnan().all()


def test_sound_is_one_mask_per_member_and_check_explains_it():
    model, params, context = ff.functional(nn.Linear(3, 2).double())
    x = torch.ones(4, 3, dtype=torch.float64)
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Gaussian(), context=context)
    group = members.repeat(params, 3)
    group["weight"][1, 0, 0] = torch.nan
    states = torch.vmap(lambda p: ng.init(p, damping=0.1))(group)
    noise = ng.noise((x, x[:, :2]), torch.Generator().manual_seed(0))
    step = torch.vmap(lambda p, s: ng.step(p, s, (x, x[:, :2]), noise=noise, context=context))
    _, _, info = step(group, states)
    assert members.sound(info).tolist() == [True, False, True]
    ff.check(members.take(info._replace(context=()), 0))
    with pytest.raises(ff.errors.NonFiniteError, match="diverged"):
        ff.check(members.take(info._replace(context=()), 1))


def test_errors_teach():
    group = members.stack(trees())
    with pytest.raises(ff.errors.StructureError, match="no members"):
        members.stack([])
    with pytest.raises(ff.errors.StructureError, match="member 1 has another structure"):
        members.stack([{"w": torch.ones(1)}, {"v": torch.ones(1)}])
    with pytest.raises(ff.errors.ShapeError, match=r"shapes \[\(1,\), \(2,\)\]"):
        members.stack([{"w": torch.ones(1)}, {"w": torch.ones(2)}])
    with pytest.raises(ff.errors.StructureError, match="members 0 to 2"):
        members.take(group, [0, 3])
    with pytest.raises(ff.errors.StructureError, match="without leaves"):
        members.size({})
    for one in ({"w": torch.ones(2), "v": torch.tensor(1.0)}, {"v": torch.tensor(1.0)}):
        with pytest.raises(
            ff.errors.ShapeError, match="leaves with no.* members: every leaf needs the same first axis"
        ):
            members.take(one, 0)
    with pytest.raises(ff.errors.ShapeError, match="leaves with 2 and 3 members"):
        members.size({"w": torch.ones(2), "v": torch.ones(3)})
    with pytest.raises(ff.errors.ShapeError, match="there are 3 members"):
        members.select(torch.tensor([True]), group, group)
    with pytest.raises(Exception, match="info"):  # with types checked, jaxtyping raises first
        members.sound({"loss": 1})
