"""The line search over a grid, on losses whose minimum is known."""

import pytest
import torch

import fisherfn as ff
from fisherfn.errors import HyperparameterError, StructureError


def parabola(params):
    return (params["w"] - 1).square().sum()


def test_it_takes_the_size_with_the_lowest_loss():
    params, direction = {"w": torch.tensor([5.0])}, {"w": torch.tensor([16.0])}
    found = ff.line_search(parabola, params, direction)
    assert (found.size, found.params["w"], found.loss) == (0.25, 1.0, 0.0)
    found = ff.line_search(parabola, params, direction, sizes=(1.0, 0.125))
    assert (found.size, found.params["w"], found.loss) == (0.125, 3.0, 4.0)
    assert params["w"] == 5.0


def test_steps_without_a_finite_loss_are_left_out():
    def loss(params):
        return torch.where(params["w"] < 0, torch.nan, params["w"] ** 2).sum()

    params, direction = {"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}
    assert ff.line_search(loss, params, direction).size == 0.25
    nowhere = ff.line_search(lambda p: p["w"].sum() * torch.nan, params, direction)
    assert (nowhere.size, nowhere.params["w"]) == (0, 1) and nowhere.loss.isnan()
    broken = ff.line_search(parabola, params, {"w": torch.tensor([torch.nan])})
    assert (broken.size, broken.params["w"]) == (0, 1)


def test_members_of_an_ensemble_have_their_own_sizes():
    params, direction = {"w": torch.tensor([[5.0], [5.0]])}, {"w": torch.tensor([[16.0], [64.0]])}
    sizes = torch.vmap(lambda p, d: ff.line_search(parabola, p, d).size)(params, direction)
    assert sizes.tolist() == [0.25, 0.0625]


def test_errors_teach():
    params = {"w": torch.ones(1)}
    with pytest.raises(HyperparameterError, match="needs a step size"):
        ff.line_search(parabola, params, params, sizes=())
    with pytest.raises(HyperparameterError, match="a step size must be >= 0"):
        ff.line_search(parabola, params, params, sizes=(1.0, -0.5))
    with pytest.raises(StructureError, match=r"ng\.step"):
        ff.line_search(parabola, params, torch.ones(1))
