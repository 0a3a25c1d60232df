"""A compiled step is the step: the same numbers for every method, one trace a kind of call, errors that teach."""

import pytest
import torch
from torch import nn

import fisherfn as ff
from tests.methods.protocol import TRAINED


def shallow():
    torch.manual_seed(0)
    model, params, context = ff.functional(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    generator = torch.Generator().manual_seed(1)
    batch = torch.rand(6, 3, generator=generator), torch.randint(2, (6,), generator=generator)
    return model, params, context, batch


@pytest.mark.parametrize("method", TRAINED)
def test_a_compiled_step_is_the_step(method):
    model, params, context, batch = shallow()
    ng = ff.natural_gradient(model, params, batch[0], likelihood=ff.Categorical(), method=method, context=context)
    noise = ng.noise(batch, torch.Generator().manual_seed(2))
    given = {"noise": noise, "context": context, "inner": True}
    compiled = ff.compile(ng.step, backend="eager")
    state = ng.init(params, damping=0.1)
    for update in (True, False):
        expected = ng.step(params, state, batch, update=update, invert=update, **given)
        found = compiled(params, state, batch, update=update, invert=update, **given)
        torch.testing.assert_close(ff.tree.flatten(found), ff.tree.flatten(expected))
        state = expected[1]


@pytest.mark.parametrize("method", ["ekfac", "lanczos"])
def test_the_next_step_is_of_the_same_kind(method, monkeypatch):
    """Eigenvectors have columns in order, and views of a stack have gaps: another trace would take a minute."""
    traced = []
    monkeypatch.setattr(torch, "compile", lambda graph, **options: traced.append(options) or graph)
    model, params, context, batch = shallow()
    ng = ff.natural_gradient(model, params, batch[0], likelihood=ff.Categorical(), method=method, context=context)
    compiled, state = ff.compile(ng.step), ng.init(params, damping=0.1)
    for seed in range(3):
        noise = ng.noise(batch, torch.Generator().manual_seed(seed))
        _, state, _ = compiled(params, state, batch, noise=noise, context=context)
    assert len(traced) == 1


def test_calls_of_one_kind_share_a_trace():
    traced = []

    def fn(tree, factor):
        traced.append(factor)
        return {"w": tree["w"] * factor}

    compiled = ff.compile(fn, backend="eager")
    for value in (1.0, 2.0):
        found = compiled({"w": torch.full((2,), value)}, 3)
        torch.testing.assert_close(found["w"], torch.full((2,), 3 * value))
    assert traced == [3]
    compiled({"w": torch.ones(2)}, 4), compiled({"w": torch.ones(3)}, 3), compiled({"w": torch.ones(2).double()}, 3)
    assert traced == [3, 4, 3, 3]


def test_a_trace_with_one_tensor_twice_is_not_used_for_two():
    compiled = ff.compile(lambda x, y: x - y, backend="eager")
    one, two = torch.ones(2), torch.full((2,), 2.0)
    assert compiled(one, one).tolist() == [0, 0]
    assert compiled(two, one).tolist() == [1, 1]


def test_arguments_that_are_returned_stay_the_same_objects():
    x = torch.ones(2)
    compiled = ff.compile(lambda x, note: (x, note, None, -x), backend="eager")
    same, note, nothing, negative = compiled(x, "as it is")
    assert same is x and note == "as it is" and nothing is None
    assert negative.tolist() == [-1, -1]


def in_place(graph, **options):
    """Like a CUDA graph: each run writes its outputs to the same memory."""
    held = []

    def run(*tensors):
        made = graph(*tensors)
        held.extend(torch.empty_like(leaf) for leaf in made[len(held) :])
        for place, leaf in zip(held, made, strict=True):
            place.copy_(leaf)
        return held

    return run


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "reduce-overhead"},
        {"mode": "max-autotune"},
        {"backend": "cudagraphs"},
        {"options": {"triton.cudagraphs": True}},
    ],
    ids=str,
)
def test_a_result_survives_the_next_run_of_a_cuda_graph(options, monkeypatch):
    monkeypatch.setattr(torch, "compile", in_place)
    double = ff.compile(lambda tree: {"w": 2 * tree["w"]}, **options)
    first = double({"w": torch.ones(2)})
    second = double(first)
    assert first["w"].tolist() == [2, 2] and second["w"].tolist() == [4, 4]


def test_inside_vmap_it_is_the_function_itself():
    compiled = ff.compile(lambda x: x.sum(), backend="eager")
    assert torch.vmap(compiled)(torch.ones(3, 2)).tolist() == [2, 2, 2]


def test_errors_teach():
    with pytest.raises(ff.errors.NoiseError, match="noise=ng.noise"):
        ff.compile(lambda x, generator: x, backend="eager")(torch.ones(1), torch.Generator())
    with pytest.raises(ff.errors.StructureError, match="torch.where"):
        ff.compile(lambda x: x if x.sum() > 0 else -x, backend="eager")(torch.ones(1))
    with pytest.raises(ff.errors.StructureError, match="hashed"):
        ff.compile(lambda x, y: x, backend="eager")(torch.ones(1), set())
