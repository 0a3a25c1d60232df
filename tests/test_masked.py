"""A choice by masks: the same values in every transform, and no copy for a group of sound models."""

import pytest
import torch
from torch import Tensor

from fisherfn import masked

NAN = torch.nan


def expected(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.stack([new[row] if value else old[row] for row, value in enumerate(mask.tolist())])


@pytest.mark.parametrize("mask", [[True, True, True], [True, False, True], [False, False, False]])
def test_models_of_a_group_are_chosen_one_by_one(mask):
    """A tensor that is not chosen may contain NaN; a tensor may also belong to all models."""
    mask = torch.tensor(mask)
    rows = mask.reshape(3, 1)
    new, old = torch.where(rows, torch.arange(6.0).reshape(3, 2), NAN), torch.where(rows, NAN, torch.ones(3, 2))
    for position in (0, 1):
        moved = new.movedim(0, position).contiguous()
        (found,) = torch.vmap(lambda m, n, o: masked.where(m, [n], [o]), (0, position, 0))(mask, moved, old)
        assert torch.equal(found, expected(mask, new, old))
    shared, zeros = torch.full((2,), 7.0), torch.zeros(3, 2)
    first, second = torch.vmap(lambda m, o: masked.where(m, [shared, o], [o, shared]))(mask, zeros)
    assert torch.equal(first, expected(mask, shared.expand(3, 2), zeros))
    assert torch.equal(second, expected(mask, zeros, shared.expand(3, 2)))


def test_a_mask_of_all_models_chooses_for_all():
    found = torch.vmap(lambda n, o: masked.where(torch.tensor(False), [n], [o])[0])(torch.ones(3), torch.zeros(3))
    assert found.tolist() == [0, 0, 0]


def test_a_group_of_groups():
    mask = torch.tensor([[True, False], [True, True]])
    new, old = torch.ones(2, 2, 3), torch.zeros(2, 2, 3)
    found = torch.vmap(torch.vmap(lambda m, n, o: masked.where(m, [n], [o])[0]))(mask, new, old)
    assert torch.equal(found, mask.unsqueeze(-1).expand(2, 2, 3).float())


def test_sound_models_are_not_copied():
    new, old = torch.ones(3, 2), torch.zeros(3, 2)
    choose = torch.vmap(lambda m, n, o: masked.where(m, [n], [o])[0])
    assert choose(torch.tensor([True, True, True]), new, old).data_ptr() == new.data_ptr()
    assert choose(torch.tensor([True, False, True]), new, old).data_ptr() != new.data_ptr()


@pytest.mark.parametrize("mask", [[True, True], [True, False]])
def test_derivatives_pass_through_the_chosen_side(mask):
    mask, new, old = torch.tensor(mask), torch.tensor([2.0, 3.0]), torch.tensor([5.0, 7.0])

    def one(m: Tensor, n: Tensor, o: Tensor) -> Tensor:
        return masked.where(m, [n**2], [o**2])[0]

    mine, theirs = torch.vmap(torch.func.grad(one, argnums=(1, 2)))(mask, new, old)
    assert torch.equal(mine, torch.where(mask, 2 * new, 0.0)) and torch.equal(theirs, torch.where(mask, 0.0, 2 * old))
    ones = torch.ones(2)
    _, tangent = torch.func.jvp(lambda n, o: torch.vmap(one)(mask, n, o), (new, old), (ones, ones))
    assert torch.equal(tangent, torch.where(mask, 2 * new, 2 * old))


@pytest.mark.parametrize("mask", [True, False])
def test_derivatives_of_a_single_model(mask):
    mask, new, old = torch.tensor(mask), torch.tensor([2.0, 3.0]), torch.tensor([5.0, 7.0])

    def one(n: Tensor, o: Tensor) -> Tensor:
        return masked.where(mask, [n**2], [o**2])[0]

    mine, theirs = torch.func.grad(lambda n, o: one(n, o).sum(), argnums=(0, 1))(new, old)
    assert torch.equal(mine, torch.where(mask, 2 * new, 0.0)) and torch.equal(theirs, torch.where(mask, 0.0, 2 * old))
    _, tangent = torch.func.jvp(one, (new, old), (torch.ones(2), torch.ones(2)))
    assert torch.equal(tangent, torch.where(mask, 2 * new, 2 * old))


def test_a_compiled_group_has_the_same_values():
    mask, new, old = torch.tensor([True, False]), torch.ones(2, 3), torch.zeros(2, 3)
    choose = torch.vmap(lambda m, n, o: masked.where(m, [n], [o])[0])
    compiled = torch.compile(choose, backend="eager", fullgraph=True)
    assert torch.equal(compiled(mask, new, old), choose(mask, new, old))
