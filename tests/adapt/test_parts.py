"""The part of a batch on which a step is tried: batches with an order, of one example, without targets, not convex."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fisherfn as ff
from fisherfn.stats.processes import spread, squared_error
from tests.adapt.problems import Problem, built, flat, loss, mlp


@given(st.integers(1, 60), st.integers(0, 60))
def test_a_part_has_one_example_of_each_stretch(total, wanted):
    found = spread(wanted, total)
    size = min(wanted, total)
    assert len(found) == size
    for part, at in enumerate(found):
        assert part * total // size <= at < (part + 1) * total // size


@pytest.mark.parametrize("total", [64, 128, 256, 300, 512, 1024])
@pytest.mark.parametrize("period", range(2, 17))
def test_no_rhythm_of_a_batch_is_missed(period, total):
    """Every kind of example is in the part, in batches that repeat with a short period and in sorted ones."""
    found = torch.tensor(spread(max(total // 8, 32), total))
    expected = len(found) / period
    counts = torch.bincount(found % period, minlength=period)
    assert ((counts - expected) ** 2).sum() / expected <= 2.5 * (period - 1)  # random examples: period - 1
    assert expected < 4 or counts.min() >= 1
    ends = torch.bincount(found * period // total, minlength=period)
    assert (ends - expected).abs().max() < 2  # a stretch at either border may fall on the other side


def sorted_by_class(count, examples=256):
    """Noisy labels of a linear rule for a tanh net, and batches of which each is sorted by class."""
    g = torch.Generator().manual_seed(1)
    shapes = {"a": (16, 10), "b": (1, 16)}
    start = {name: torch.randn(shape, generator=g, dtype=torch.float64) / 4 for name, shape in shapes.items()}
    batches = []
    for _ in range(count):
        x = torch.randn(examples, 10, generator=g, dtype=torch.float64)
        y = (x.sum(1) + 6 * torch.randn(examples, generator=g, dtype=torch.float64) > 0).to(torch.float64)
        at = torch.argsort(y, stable=True)
        batches.append((x[at], y[at].unsqueeze(1)))
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return Problem(lambda p, x: torch.tanh(x @ p["a"].T) @ p["b"].T, start, x, y, ff.Bernoulli()), batches


def trained(problem, batches, **options):
    """The parameters, state and infos after a step on each batch."""
    opt = ff.adaptive(built(problem), **options)
    params, state, infos = problem.params, opt.init(problem.params), []
    for k, batch in enumerate(batches):
        params, state, info = opt.step(params, state, batch, generator=torch.Generator().manual_seed(k))
        infos.append(info)
    return params, state, infos


def test_batches_sorted_by_class_train_as_with_a_model_of_all_examples():
    """The model of the first eighth would be that of one class: its steps make all logits large."""
    problem, batches = sorted_by_class(60)
    part, whole = (trained(problem, batches, model_examples=number)[0] for number in (None, 256))
    assert float(loss(problem, part)) < 1.03 * float(loss(problem, whole))


def test_one_loss_says_nothing_about_its_spread():
    assert squared_error(torch.tensor(3.0), 4) == 1
    assert torch.isinf(squared_error(torch.tensor(0.0), 1))


@pytest.mark.parametrize("likelihood", [ff.Categorical(), ff.Gaussian()])
def test_batches_of_one_example_are_never_undone_because_the_next_example_is_harder(likelihood):
    problem = mlp(likelihood, examples=60)
    batches = [(problem.x[k : k + 1], problem.y[k : k + 1]) for k in range(60)]
    params, state, infos = trained(problem, batches)
    assert float(state.curvature.damping) < 1e3 * float(infos[0].adapted.damping)
    assert sum(bool(info.adapted.rejected) for info in infos) <= 3
    assert torch.isfinite(flat(params)).all()


def ignored(problem):
    """The same inputs with targets that do not count."""
    return problem.x, torch.full_like(problem.y, -100)


def test_a_batch_whose_targets_do_not_count_undoes_nothing():
    problem = mlp(ff.Categorical(), examples=40)
    batch = (problem.x, problem.y)
    params, state, _ = trained(problem, [batch] * 3)
    opt = ff.adaptive(built(problem))
    same, after, info = opt.step(params, state, ignored(problem), generator=torch.Generator())
    assert not info.adapted.rejected and float(info.loss) == 0
    # the momentum goes on, and nothing else moves
    torch.testing.assert_close(flat(same), flat(params) + info.adapted.momentum * flat(state.update))
    assert float(after.curvature.damping) <= float(state.curvature.damping)


def test_the_floor_of_lambda_is_that_of_the_first_batch_with_curvature():
    problem = mlp(ff.Categorical(), examples=40)
    batch = (problem.x, problem.y)
    _, usual, _ = trained(problem, [batch])
    _, empty, _ = trained(problem, [ignored(problem)])
    assert float(empty.first_curvature) == 0
    _, late, _ = trained(problem, [ignored(problem), batch])
    # the average of the factors holds the empty batch too, so its curvature is smaller
    assert 0 < float(late.first_curvature) <= float(usual.first_curvature)
    assert float(late.curvature.damping) == pytest.approx(20 * float(late.first_curvature))


def test_a_batch_after_one_without_targets_is_compared_with_the_one_before():
    problem = mlp(ff.Categorical(), examples=40)
    batch = (problem.x, problem.y)
    _, state, infos = trained(problem, [batch, ignored(problem), batch, ignored(problem), batch])
    assert not any(info.adapted.rejected for info in infos)
    assert float(state.loss) == float(infos[-1].loss) > 0


def test_where_the_loss_is_not_convex_the_damping_limits_the_step():
    """The entropy of the outputs is concave at its maximum; a model without a minimum gave steps of length zero."""
    problem = mlp(examples=40)._replace(likelihood=lambda f, y: -(f.softmax(-1) * f.log_softmax(-1)).sum(-1))
    flatter = problem._replace(params={name: 0.1 * leaf for name, leaf in problem.params.items()})
    ng = built(flatter, fisher="empirical")
    nat, _, _ = ng.step(flatter.params, ng.init(flatter.params, damping=1.0), (flatter.x, flatter.y))
    model = ff.quadratic_model(ng, flatter.params, (flatter.x, flatter.y), [nat])
    assert float(model.curvature) == 0 and float(model.slope) > 0
    weight = model.minimiser(torch.tensor(0.5))
    torch.testing.assert_close(weight, -model.slope / (0.5 * model.gram[0]))
    opt = ff.adaptive(ng)
    params, state = flatter.params, opt.init(flatter.params)
    for _ in range(10):
        params, state, info = opt.step(params, state, (flatter.x, flatter.y))
    first, last = (ng.likelihood.nll(flatter.model(p, flatter.x), flatter.y).mean() for p in (flatter.params, params))
    assert float(last) < 0.5 * float(first) and not info.adapted.rejected
