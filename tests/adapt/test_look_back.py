"""The look back: which losses of the next batch undo the last update, and which do not."""

from dataclasses import replace

import pytest
import torch

import fisherfn as ff
from fisherfn.stats.processes import spread
from tests.adapt.problems import Problem, built, flat, mlp, steps, unflat


def test_the_next_batch_takes_back_a_step_that_its_own_examples_did_not_betray():
    problem = mlp(examples=80)
    opt = ff.adaptive(built(problem), damping=0.1)
    params, state, _ = steps(problem, opt, 3)
    jump = unflat(problem, 30 * torch.ones_like(flat(params)))
    damaged = ff.tree.add(params, jump)  # as if the last update had been this one
    fooled = state._replace(update=jump)
    back, new, info = opt.step(damaged, fooled, (problem.x, problem.y), update=False, invert=False)
    assert info.adapted.rejected
    torch.testing.assert_close(flat(back), flat(params))
    assert not flat(new.update).any() and float(new.curvature.damping) == pytest.approx(0.2)
    kept = replace(opt, look_back=False)
    there, _, _ = kept.step(damaged, fooled, (problem.x, problem.y), update=False, invert=False)
    assert (flat(there) - flat(params)).norm() > 1


def test_a_loss_that_became_nan_is_taken_back_but_a_broken_batch_is_not_the_steps_fault():
    problem = mlp(examples=80)
    opt = ff.adaptive(built(problem), damping=0.1)
    params, state, _ = steps(problem, opt, 2)
    jump = {name: torch.full_like(p, 1e308) for name, p in params.items()}
    fooled = state._replace(update=ff.tree.scale(jump, 1.0))
    broken = {name: torch.full_like(p, torch.inf) for name, p in params.items()}
    _, _, info = opt.step(broken, fooled, (problem.x, problem.y), update=False, invert=False)
    assert all(info.ok.values()) and info.adapted.rejected
    nan = problem.x.clone()
    nan[0, 0] = torch.nan
    same, kept, info = opt.step(params, state, (nan, problem.y), update=False, invert=False)
    assert not any(info.ok.values()) and torch.equal(flat(same), flat(params))
    assert float(kept.curvature.damping) == float(state.curvature.damping)
    with pytest.raises(ff.errors.NonFiniteError, match="inputs"):
        ff.check(info)


def batches_of(kind):
    """Two batches of 40 examples of one problem, the second with 8 times the target mass of the first."""
    flat = mlp(ff.Categorical(), examples=40 * 16)
    x, y = flat.x.reshape(40, 16, 3), flat.y.reshape(40, 16)
    if kind == "lengths":
        return ff.Categorical(), flat, (x[:, :2], y[:, :2]), (x, y)
    if kind == "ignored":
        some = torch.arange(16) < 2
        return ff.Categorical(), flat, (x, torch.where(some, y, -100)), (x, y)
    if kind == "pixels":
        some = torch.nn.functional.one_hot(y, 2).double()
        return ff.Bernoulli(), flat, (x[:, :2], some[:, :2]), (x, some)
    weights = torch.ones(40, dtype=torch.float64)
    return ff.Weighted(ff.Categorical()), flat, (x, (y, weights / 8)), (x, (y, weights))


@pytest.mark.parametrize("kind", ["lengths", "ignored", "pixels", "weights"])
def test_the_look_back_compares_losses_per_unit_of_target_mass(kind):
    likelihood, problem, small, large = batches_of(kind)
    ng = ff.natural_gradient(problem.model, problem.params, large[0], likelihood=likelihood)
    ng_small = ng.for_shape(problem.params, small[0]) if kind in ("lengths", "pixels") else ng
    generator = torch.Generator().manual_seed(0)
    params, state = problem.params, ff.adaptive(ng).init(problem.params)
    for own, batch in 4 * [(ng_small, small), (ng, large)]:
        params, state, info = ff.adaptive(own).step(params, state, batch, generator=generator)
        assert not info.adapted.rejected, "the loss is a sum of eight times as many terms"
    # a batch of the same kind whose loss per label is far higher still undoes the last update
    far = ff.tree.add(params, params, scale=-8.0)
    state = state._replace(update=ff.tree.map(lambda p: -8 * p, params))
    _, _, info = ff.adaptive(ng).step(far, state, large, generator=generator)
    assert info.adapted.rejected


def batches_of_two_kinds(kind):
    """Endless batches for a small autoencoder: drawn noise levels, or two sources of different scale in turn."""
    g = torch.Generator().manual_seed(0)
    basis = torch.randn(3, 12, generator=g, dtype=torch.float64)
    for index in range(120):
        clean = torch.tanh(torch.randn(64, 3, generator=g, dtype=torch.float64) @ basis)
        if kind == "noise":
            level = 2 * torch.rand(1, generator=g, dtype=torch.float64)
            yield clean + level * torch.randn(clean.shape, generator=g, dtype=torch.float64), clean
        else:
            scale = (0.3, 3.0)[index % 2]
            yield clean, scale * clean


def autoencoder(batches):
    """Losses of the last ten steps, numbers of rejections, and λ, of steps on these batches."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 12)).double()
    model, params, context = ff.functional(net)
    batches = list(batches)
    ng = ff.natural_gradient(model, params, batches[0][0], likelihood=ff.Gaussian(), context=context)
    opt, cadence, generator = ff.adaptive(ng), ff.Cadence(), torch.Generator().manual_seed(0)
    state, found = opt.init(params), []
    for index, batch in enumerate(batches):
        update, invert = cadence(index)
        again = bool(state.rejected)
        params, state, info = opt.step(
            params, state, batch, update=update or again, invert=invert or again, context=context, generator=generator
        )
        found.append(info)
    losses = torch.stack([info.loss for info in found])
    return losses, sum(bool(info.adapted.rejected) for info in found), state.curvature.damping / state.first_curvature


@pytest.mark.parametrize("kind", ["noise", "sources"])
def test_a_harder_batch_does_not_undo_the_last_update(kind):
    """Its loss is higher by far more than sampling explains, but going back would not lower it by as much."""
    losses, rejected, damping = autoencoder(batches_of_two_kinds(kind))
    assert (losses[1:] > 1.3 * losses[:-1]).sum() > 15, "many of the batches are harder than the one before"
    assert rejected <= 12 and damping < 100


def test_an_update_that_is_undone_leaves_no_trace_in_the_buffers():
    """Batch norm has seen the batch at the parameters that are given up."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    x, y = torch.randn(40, 3), torch.randn(40, 2)
    model, params, context = ff.functional(net)
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Gaussian(), context=context)
    opt, generator = ff.adaptive(ng), torch.Generator().manual_seed(0)
    state = opt.init(params)
    for _ in range(3):
        params, state, info = opt.step(params, state, (x, y), generator=generator, context=context)
        context = info.context
    jump = ff.tree.map(lambda leaf: 100 * torch.ones_like(leaf), params)
    damaged = ff.tree.add(params, jump)
    _, _, info = opt.step(damaged, state._replace(update=jump), (x, y), generator=generator, context=context)
    assert info.adapted.rejected
    for name, leaf in context.items():
        torch.testing.assert_close(info.context[name], leaf, rtol=0, atol=0)


def test_an_infinite_loss_of_an_example_outside_the_trial_undoes_the_update():
    """No example of the trial shows it, so going back would explain nothing."""
    problem = mlp(ff.Gaussian(), examples=256)
    start = {name: leaf / 10 for name, leaf in problem.params.items()}
    x = problem.x.clone()
    outside = next(n for n in range(256) if n not in spread(32, 256))
    x[outside] *= 1e30
    wide = Problem(lambda p, x: x @ p["a"].T @ p["b"].T, start, x, problem.y, problem.likelihood)
    mild = wide._replace(x=problem.x)
    opt = ff.adaptive(built(mild), damping=0.1)
    params, state, _ = steps(mild, opt, 3)
    jump = {name: 1e140 * torch.ones_like(leaf) for name, leaf in params.items()}
    back, _, info = opt.step(
        ff.tree.add(params, jump), state._replace(update=jump), (x, wide.y), update=False, invert=False
    )
    assert info.adapted.rejected and flat(back).abs().max() < 1e130
