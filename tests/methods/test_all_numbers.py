"""Whatever the numbers are: a step is sound, or marked as not ok with the state left as it was; and it goes on."""

import pytest
import torch
from torch.utils import _pytree as pytree

import fisherfn as ff
from tests import zoo
from tests.methods.protocol import METHODS
from tests.oracles import close

HOSTILE = {
    "NaN": lambda x: x.index_fill(0, torch.tensor([1]), float("nan")),
    "inf": lambda x: x.index_fill(0, torch.tensor([0]), float("inf")),
    "zero": torch.zeros_like,
    "constant": torch.ones_like,
    "one example": lambda x: x[:1],
    "one example many times": lambda x: x[:1].expand_as(x).clone(),
    "enormous": lambda x: x * 1e20,
    "tiny": lambda x: x * 1e-20,
    "denormal": lambda x: x * 1e-42,
    "one huge": lambda x: torch.cat([x[:1] * 1e18, x[1:]]),
}


def finite(tree):
    return all(bool(torch.isfinite(leaf).all()) for leaf in pytree.tree_leaves(tree) if leaf.is_floating_point())


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True))


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("id", ["mlp-categorical", "conv"])
@METHODS
def test_a_step_is_sound_or_marked(method, id, what):
    problem = zoo.to(zoo.pick(id), torch.float32)
    ng = problem.build(fisher="mc", method=ff.METHODS[method]())
    params, (x, y) = problem.params, problem.batch
    generator = torch.Generator().manual_seed(0)
    _, state, info = ng.step(params, ng.init(params, damping=0.1), (x, y), generator=generator)
    ff.check(info)
    hostile = HOSTILE[what](x)
    nat, new, info = ng.step(params, state, (hostile, y[: len(hostile)]), inner=True, generator=generator)
    ok = all(bool(mask) for mask in info.ok.values())
    if ok:
        assert finite((nat, new, info.inner))
    else:
        assert same(new, state)
        with pytest.raises(ff.FisherfnError):
            ff.check(info)
    assert ok or what not in ("zero", "constant", "one example", "one example many times", "tiny", "denormal")
    nat, _, info = ng.step(params, new, (x, y), generator=generator)
    ff.check(info)
    assert finite(nat)


@METHODS
def test_a_dead_unit_and_a_dead_layer(method):
    """Zero weights in front of a ReLU with a negative bias: its outputs, and all gradients behind, are zero."""
    net = torch.nn.Sequential(
        torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)
    )
    with torch.no_grad():
        net[2].weight.zero_()
        net[2].bias.fill_(-1.0)
    model, params, context = ff.functional(net)
    x, y = torch.randn(8, 4), torch.arange(8) % 2
    ng = ff.natural_gradient(
        model, params, x, likelihood=ff.Categorical(), method=ff.METHODS[method](), context=context
    )
    state = ng.init(params, damping=0.1)
    for seed in range(3):
        nat, state, info = ng.step(
            params, state, (x, y), generator=torch.Generator().manual_seed(seed), context=context
        )
        ff.check(info)
        assert finite((nat, state))
    assert float(nat["0.weight"].abs().max()) == 0.0


@pytest.mark.parametrize("gap", [45.0, 48.0, 51.0, 60.0])
@METHODS
def test_a_saturated_classifier_steps_by_the_damped_gradient(method, gap):
    """Output-gradients of exp(-gap): F is zero next to λ, its factors are denormal or zero."""
    torch.manual_seed(0)
    x, params = torch.randn(32, 4), {"weight": torch.zeros(3, 4), "bias": torch.tensor([0.0, -gap, -gap])}

    def model(params, x):
        return torch.nn.functional.linear(torch.relu(x), params["weight"], params["bias"])

    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), fisher="mc", method=ff.METHODS[method]())
    stats = ng.stats(params, (x, torch.zeros(32, dtype=torch.int64)), generator=torch.Generator().manual_seed(0))
    nat, _, info = ng.step_from(ng.init(params, damping=1e-3), stats, stats)
    ff.check(info)
    assert stats.grads["weight"].any()
    if gap < 60:  # beyond it the square of an output-gradient is zero, and with it one factor: π is 1
        for name, grad in stats.grads.items():
            close(nat[name], grad / 1e-3, tol=1e-4)
