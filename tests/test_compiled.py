"""A compiled step is the step: the same numbers for every method, one trace a kind of call, errors that teach."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

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


LENGTHS = torch.tensor([2, 3])
LABELS = torch.ones(2, 3, dtype=torch.int64)
BY_VALUE = {
    "bool": lambda x, n: x if n.sum() > 3 else -x,
    "int": lambda x, n: x * int(n[0]),
    "index": lambda x, n: x[: n[0]],
    "tolist": lambda x, n: torch.stack([part.sum() for part in x.split(n.tolist())]),
    "tolist of one": lambda x, n: x * n.sum().tolist(),
    "numpy": lambda x, n: x + float(n.numpy()[0]),
    "asarray": lambda x, n: x + float(np.asarray(n)[0]),
    "dlpack": lambda x, n: x + torch.from_dlpack(n).sum(),
    "nonzero": lambda x, n: x * len(n.nonzero()),
    "unique": lambda x, n: x * torch.unique(n).shape[0],
    "a mask": lambda x, n: x[x > 2].sum(),
    "masked_select": lambda x, n: x.masked_select(x > 2).sum(),
    "repeat_interleave": lambda x, n: x[:2].repeat_interleave(n),
    "tensor_split": lambda x, n: x.tensor_split(n)[0].sum(),
    "equal": lambda x, n: x * torch.equal(n, n[:1]),
    "ctc_loss": lambda x, n: F.ctc_loss(x.expand(5, 2, 6), LABELS, n, LENGTHS),
    "tolist in grad": lambda x, n: torch.func.grad(lambda z: (z * z.tolist()[0]).sum())(x),
    "after an operation in place": lambda x, n: x * torch.zeros(2, dtype=torch.int64).copy_(n).tolist()[0],
}


@pytest.mark.parametrize("fn", BY_VALUE.values(), ids=BY_VALUE)
def test_values_of_arguments_are_not_constants_of_a_graph(fn):
    """A graph traced for one value would give the result of that value for all others."""
    with pytest.raises(ff.errors.StructureError, match="torch.where"):
        ff.compile(fn, backend="eager")(torch.arange(6.0), torch.tensor([4, 2]))


MASK = torch.tensor([True, False, True])
OF_CONSTANTS = {
    "item": lambda x: x * MASK.sum().item(),
    "tolist": lambda x: x * MASK.tolist()[0],
    "numpy": lambda x: x * float(MASK.numpy()[0]),
    "nonzero": lambda x: x * len(MASK.nonzero()),
    "a mask": lambda x: x[MASK],
    "values made in the function": lambda x: x * torch.tensor([2.0, 3.0]).tolist()[1],
    "a mask made in the function": lambda x: x.outer(x)[torch.ones(3, 3).tril().bool()],
}


@pytest.mark.parametrize("fn", OF_CONSTANTS.values(), ids=OF_CONSTANTS)
def test_values_of_constants_may_be_read(fn):
    compiled = ff.compile(fn, backend="eager")
    for x in (torch.ones(3), torch.arange(3.0)):
        torch.testing.assert_close(compiled(x), fn(x))


def test_errors_teach():
    with pytest.raises(ff.errors.NoiseError, match="noise=ng.noise"):
        ff.compile(lambda x, generator: x, backend="eager")(torch.ones(1), torch.Generator())
    with pytest.raises(ff.errors.StructureError, match="torch.where"):
        ff.compile(lambda x: x if x.sum() > 0 else -x, backend="eager")(torch.ones(1))
    with pytest.raises(ff.errors.StructureError, match="hashed"):
        ff.compile(lambda x, y: x, backend="eager")(torch.ones(1), set())


def test_autocast_is_part_of_the_kind_of_a_call():
    compiled = ff.compile(lambda w, x: x @ w, backend="eager")
    w, x = torch.randn(4, 4), torch.randn(3, 4)
    for low in (torch.bfloat16, None, torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype=low, enabled=low is not None):
            found, expected = compiled(w, x), x @ w
        assert found.dtype == expected.dtype == (low or torch.float32)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
