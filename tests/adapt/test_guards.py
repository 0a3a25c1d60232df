"""The guards of adaptive steps, one by one: rejection, damping, dead units, broken batches."""

from dataclasses import replace

import pytest
import torch

import fisherfn as ff
from fisherfn.stats.processes import spread
from tests.adapt.problems import Problem, built, flat, loss, mlp, steps


def test_a_step_that_raises_the_loss_is_rejected_and_doubles_lambda():
    problem = mlp()
    opt = ff.adaptive(built(problem), lr=1e4, momentum=0.0, damping=0.1)
    params, state, (info,) = steps(problem, opt, 1)
    assert info.adapted.rejected and state.rejected
    assert torch.equal(flat(params), flat(problem.params)) and not flat(state.update).any()
    assert float(state.curvature.damping) == pytest.approx(0.2) and float(state.shrink) == 0.5
    # a given rate is halved again, until inverses are refreshed
    _, again, _ = opt.step(params, state, (problem.x, problem.y), update=False, invert=False)
    assert float(again.shrink) == 0.25
    _, after, _ = steps(problem, opt, 1, state=again, params=params)
    assert float(after.shrink) == 0.5, "halved by this rejection alone"


@pytest.mark.parametrize(("ones", "rejected"), [(17, False), (22, True)])
def test_a_step_of_given_length_is_rejected_only_for_a_clear_increase(ones, rejected):
    """The step goes towards class 0, against the labels of a few more than half of the 32 examples of the trial."""
    start = {"w": torch.zeros(2, 1, dtype=torch.float64)}
    x = torch.ones(256, 1, dtype=torch.float64)
    y = torch.zeros(256, dtype=torch.int64)
    y[spread(32, 256)[:ones]] = 1
    problem = Problem(lambda p, x: x @ p["w"].T, start, x, y, ff.Categorical())
    mean = (ones - 16) / 16  # of the changes ±1 of the logit, with variance 1 − mean²
    assert rejected == (mean > 2 * ((1 - mean**2) / 31) ** 0.5)
    _, _, (info,) = steps(problem, ff.adaptive(built(problem)), 1)
    assert bool(info.adapted.rejected) == rejected
    assert info.adapted.reduction_ratio < 0  # their loss increased
    # a step that the model fits to these examples lowers their loss
    assert not steps(problem, ff.adaptive(built(problem), rule="model"), 1)[2][0].adapted.rejected


def test_a_small_increase_rejects_a_step_of_the_model_and_not_the_same_step_with_given_numbers():
    problem = mlp(examples=20, seed=8)
    far = {name: 3 * leaf for name, leaf in problem.params.items()}  # here the model is wrong
    problem = problem._replace(params=far)
    ng = built(problem, fisher="type2")
    _, _, (free,) = steps(problem, ff.adaptive(ng, damping=1e-6), 1)
    assert free.adapted.rejected
    alpha = float(free.adapted.learning_rate)
    for given in ({"lr": alpha}, {"lr": alpha, "momentum": 0.0}):
        params, _, (info,) = steps(problem, ff.adaptive(ng, damping=1e-6, **given), 1)
        assert not info.adapted.rejected and loss(problem, params) > loss(problem, far)
        assert float(info.adapted.learning_rate) == pytest.approx(alpha)


@pytest.mark.parametrize(
    ("examples", "positions", "expected"),
    [(20, 1, 20), (80, 1, 32), (320, 1, 40), (20, 2, 16), (20, 9, 8), (80, 9, 10)],
)
def test_the_model_has_an_eighth_of_the_batch_and_enough_labels(examples, positions, expected):
    flat = mlp(ff.Categorical(), examples=examples * positions)
    shape = (examples,) if positions == 1 else (examples, positions)
    problem = flat._replace(x=flat.x.reshape(*shape, 3), y=flat.y.reshape(shape))
    opt = ff.adaptive(built(problem), damping=0.1)
    found, same = (steps(problem, each, 1)[2][0].adapted for each in (opt, replace(opt, model_examples=expected)))
    assert torch.equal(found.reduction_ratio, same.reduction_ratio)
    other = steps(problem, replace(opt, model_examples=expected - 1), 1)[2][0].adapted
    assert not torch.equal(found.reduction_ratio, other.reduction_ratio)


def test_a_given_damping_is_left_alone_by_good_steps():
    problem = mlp(examples=80)
    _, state, infos = steps(problem, ff.adaptive(built(problem), damping=0.3), 8)
    assert not any(info.adapted.rejected for info in infos)
    assert float(state.curvature.damping) == pytest.approx(0.3)


def test_lambda_starts_and_ends_in_units_of_the_curvature():
    problem = mlp(examples=80)
    ng = built(problem)
    opt = ff.adaptive(ng)
    _, state, infos = steps(problem, opt, 1)
    unit = float(ng.trace(state.curvature)) / flat(problem.params).numel()
    assert float(infos[0].adapted.damping) == pytest.approx(20 * unit)
    _, state, infos = steps(problem, opt, 200)
    now = float(ng.trace(state.curvature)) / flat(problem.params).numel()
    assert float(state.curvature.damping) >= 0.999 * (float(state.first_curvature) * now) ** 0.5


@pytest.mark.parametrize(("examples", "part"), [(400, 50), (120, 32), (20, 20)])
def test_the_model_is_that_of_an_eighth_of_the_batch_but_of_thirty_two_examples(examples, part):
    problem = mlp(ff.Gaussian(), examples=examples)
    opt = ff.adaptive(built(problem), damping=0.1)
    found = steps(problem, opt, 2)[2][-1].adapted
    expected = steps(problem, replace(opt, model_examples=part), 2)[2][-1].adapted
    other = steps(problem, replace(opt, model_examples=part - 1), 2)[2][-1].adapted
    assert float(found.learning_rate) == float(expected.learning_rate) != float(other.learning_rate)


def rectifier(seed=0):
    """A ReLU net 3-4-2 with biases."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"a": (4, 3), "a0": (4,), "b": (2, 4), "b0": (2,)}
    params = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}

    def model(p, x):
        hidden = torch.nn.functional.linear(x, p["a"], p["a0"]).relu()
        return torch.nn.functional.linear(hidden, p["b"], p["b0"])

    x = torch.randn(80, 3, generator=g, dtype=torch.float64)
    y = torch.randn(80, 2, generator=g, dtype=torch.float64)
    return Problem(model, params, x, y, ff.Gaussian())


@pytest.mark.parametrize("method", ["kfac", "ekfac", "twolevel_kfac", "exactNG"])
def test_a_step_that_kills_all_units_is_taken_back_although_the_loss_is_fine(method):
    """A method that couples layers moves dead ones as well: their gradient shows it, not their step."""
    problem = rectifier()
    opt = ff.adaptive(built(problem, method), damping=0.1, rule="model")
    params, state, _ = steps(problem, opt, 2)
    assert state.alive.all()
    jump = ff.tree.zeros_like(params) | {"a0": torch.full((4,), -50.0, dtype=torch.float64)}
    dead = ff.tree.add(params, jump)
    fooled = state._replace(update=jump, loss=torch.full_like(state.loss, torch.inf))  # no limit on the loss
    back, new, info = opt.step(dead, fooled, (problem.x, problem.y), update=False, invert=False)
    assert info.adapted.rejected and float(new.curvature.damping) == pytest.approx(0.2)
    torch.testing.assert_close(flat(back), flat(params))
    assert not new.alive.any(), "where no step was taken, the next batch has none to blame"
    _, new, info = opt.step(back, new, (problem.x, problem.y), update=False, invert=False)
    assert not info.adapted.rejected and new.alive.all(), "the step after that is judged by itself"


def test_units_that_were_dead_before_the_step_are_not_its_fault():
    problem = rectifier()
    problem = problem._replace(params=problem.params | {"a0": torch.full((4,), -50.0, dtype=torch.float64)})
    _, state, infos = steps(problem, ff.adaptive(built(problem)), 4)
    assert not any(info.adapted.rejected for info in infos)
    assert state.alive.tolist() == [False, False, False, True]


@pytest.mark.parametrize("given", [{"rule": "clip"}, {"rule": "model", "momentum": 0.9}])
def test_a_bad_previous_update_is_dropped_where_the_momentum_is_fixed(given):
    problem = mlp(examples=80)
    opt = ff.adaptive(built(problem), **given)
    params, state, _ = steps(problem, opt, 3)
    uphill = torch.func.grad(lambda p: loss(problem, p))(params)
    state = state._replace(update=ff.tree.scale(uphill, 100.0))
    _, state, infos = steps(problem, opt, 2, state=state, params=params)
    assert [bool(info.adapted.rejected) for info in infos] == [True, False], "else λ would double for ever"


@pytest.mark.parametrize("average", [None, 0.9])
def test_a_step_that_is_not_ok_leaves_every_part_of_the_state_as_it_was(average):
    problem = mlp(examples=80)
    opt = ff.adaptive(built(problem), average=average)
    params, state, _ = steps(problem, opt, 3)
    params, state, _ = steps(problem, opt, 1, params=params, state=state, update=False, invert=False)
    broken = problem.x.clone()
    broken[0, 0] = torch.nan
    rng = torch.Generator().manual_seed(1)
    same, kept, info = opt.step(params, state, (broken, problem.y), generator=rng)
    assert not any(info.ok.values())
    leaves = torch.utils._pytree.tree_leaves
    for a, b in zip(leaves((same, kept)), leaves((params, state)), strict=True):
        assert torch.equal(a, b)


def test_both_losses_of_the_ratio_are_of_the_same_dropout():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 50), torch.nn.Dropout(0.5), torch.nn.Linear(50, 2)).double()
    model, params, context = ff.functional(net)
    problem = mlp(ff.Gaussian(), examples=80)
    context = context | {"dropout": ff.dropout_seeds(80, torch.Generator().manual_seed(0))}
    ng = ff.natural_gradient(model, params, problem.x, likelihood=ff.Gaussian(), context=context)
    opt = ff.adaptive(ng, lr=1e-9, momentum=0.0, damping=1.0, model_examples=80)
    _, _, info = opt.step(
        params, opt.init(params), (problem.x, problem.y), generator=torch.Generator().manual_seed(0), context=context
    )
    assert float(info.adapted.reduction_ratio) == pytest.approx(1.0, abs=1e-4), "a tiny step is as predicted"


def test_batch_norm_is_modelled_on_a_part_that_it_normalises_by_itself_and_moves_its_statistics_once():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Dropout(0.3), torch.nn.Linear(5, 2)
    ).double()
    model, params, context = ff.functional(net)
    problem = mlp(ff.Gaussian(), examples=300)
    context = context | {"dropout": ff.dropout_seeds(300, torch.Generator().manual_seed(0))}
    ng = ff.natural_gradient(model, params, problem.x, likelihood=ff.Gaussian(), context=context)
    assert ng.layout.couples
    batch, noise = (problem.x, problem.y), ng.noise((problem.x, problem.y), torch.Generator().manual_seed(0))
    tiny = ff.adaptive(ng, lr=1e-9, momentum=0.0, damping=1.0, model_examples=64)
    _, _, info = tiny.step(params, tiny.init(params), batch, noise=noise, context=context)
    assert float(info.adapted.reduction_ratio) == pytest.approx(1.0, abs=1e-4), "both losses are of one function"
    nat, _, _ = ng.step(params, ng.init(params, damping=1.0), batch, noise=noise, context=context)

    def size(part: int) -> float:
        """The minimiser of the model of a part of the examples, as a batch of their own."""
        some = spread(part, 300)
        own = context | {"dropout": context["dropout"][some]}

        def outputs(p):
            return model(p, problem.x[some], own)[0]

        f, moved = torch.func.jvp(outputs, (params,), (nat,))
        curvature = float(moved.square().sum()) / part + float(flat(nat).square().sum())
        return float((moved * (f - problem.y[some])).sum()) / part / curvature

    for asked, part in ((2, 32), (64, 64), (None, 37), (300, 300)):
        free = ff.adaptive(ng, momentum=0.0, damping=1.0, model_examples=asked)
        _, _, seen = free.step(params, free.init(params), batch, noise=noise, context=context)
        assert float(seen.adapted.learning_rate) == pytest.approx(size(part), rel=1e-9), asked
    net(problem.x)
    assert all(torch.equal(info.context[name], buffer) for name, buffer in net.named_buffers())


def test_lambda_returns_from_where_no_step_changes_the_loss():
    """Steps are then so short that their effect is rounding noise, and only rejections would move λ."""
    problem = mlp(ff.Gaussian(), examples=80)
    problem = problem._replace(
        params=ff.tree.map(lambda p: p.float(), problem.params), x=problem.x.float(), y=problem.y.float()
    )
    opt = ff.adaptive(built(problem))
    params, state, _ = steps(problem, opt, 3)
    state = state._replace(curvature=state.curvature._replace(damping=1e9 * state.first_curvature))
    _, after, _ = steps(problem, opt, 40, state=state, params=params)
    assert float(after.curvature.damping / state.first_curvature) == pytest.approx(1e9 * 0.95**40)


def test_lambda_follows_rho_where_nothing_can_be_looked_back_at():
    """The loss before is infinite after weights were changed by others, which is no numerical noise."""
    problem = mlp(examples=80)
    opt = ff.adaptive(built(problem))
    params, state, _ = steps(problem, opt, 5)
    unknown = state._replace(loss=torch.full_like(state.loss, torch.inf))
    (_, one, _), (_, other, _) = (steps(problem, opt, 1, state=each, params=params) for each in (state, unknown))
    assert (
        torch.equal(one.curvature.damping, other.curvature.damping) and one.curvature.damping < state.curvature.damping
    )


def test_a_rejected_step_raises_a_damping_of_zero():
    """Doubled, it would stay zero, and every step of too large a learning rate would be rejected."""
    problem = mlp(examples=80)
    opt = ff.adaptive(built(problem), lr=1e3, momentum=0.0, damping=0.0)
    params, state, infos = steps(problem, opt, 60)
    assert infos[0].adapted.rejected and not infos[-1].adapted.rejected
    assert float(infos[0].adapted.damping / state.first_curvature) == pytest.approx(1e-4)
    assert loss(problem, params) < loss(problem, problem.params)


@pytest.mark.parametrize("where", ["autocast", "net"])
def test_rounding_in_half_precision_raises_no_damping(where):
    """A fitted step near the optimum changes the loss by less than the rounding of weights and outputs."""
    dampings = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 12))
        x = torch.randn(64, 12)
        own = dtype if where == "net" else torch.float32
        net = net.to(own)
        opt = ff.optim.NaturalGradient(net, likelihood=ff.Gaussian())
        for _ in range(200):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != own):
                opt.step((x.to(own), x.to(own)))
        dampings[dtype] = opt.damping
    assert dampings[torch.bfloat16] < 20 * dampings[torch.float32]


@pytest.mark.parametrize("lr", [1e3, 1e6])
def test_a_step_that_makes_one_example_explode_is_rejected(lr):
    """The standard error of the increase is then as large as the increase itself."""
    problem = mlp(ff.Gaussian(), examples=10)
    x = problem.x.clone()
    x[0] *= 100
    wide = Problem(lambda p, x: x @ p["a"].T @ p["b"].T, problem.params, x, problem.y, problem.likelihood)
    params, _, (info,) = steps(wide, ff.adaptive(built(wide), lr=lr, momentum=0.0, damping=1e-3), 1)
    assert info.adapted.rejected and torch.equal(flat(params), flat(wide.params))
