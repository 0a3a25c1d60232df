"""The drop-in optimizer without numbers is `ff.adaptive`, and what a user may get wrong about it is named."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fisherfn as ff
from tests.optim.problems import problem, same, trained
from tests.zoo import as_installed

E = ff.errors
LABELS = ff.Categorical()


def functional(net, batches, **options):
    """Parameters, buffers and losses of the loop that the shell stands for."""
    model, params, context = ff.functional(net)
    ng = ff.natural_gradient(model, params, batches[0][0], likelihood=LABELS, context=context)
    opt, due = ff.adaptive(ng, **options), ff.Cadence()
    state, rng, losses = opt.init(params), torch.Generator().manual_seed(0), []
    for step, batch in enumerate(batches):
        again = bool(state.rejected)
        update, invert = (flag or again for flag in due(step))
        params, state, info = opt.step(
            params, state, batch, update=update, invert=invert, generator=rng, context=context
        )
        context = info.context
        losses.append(info.loss)
    return params, context, torch.stack(losses)


@pytest.mark.parametrize("bound", ["auto", None], ids=["clip", "model"])
@pytest.mark.parametrize("name", ["mlp", "conv-batch-norm"])
def test_thirty_steps_are_those_of_the_functional_loop(name, bound):
    case = problem(name, steps=30, examples=16)
    expected = functional(case.again(), case.batches, rule="auto" if bound else "model")
    opt = ff.optim.NaturalGradient(case.net, likelihood=LABELS, kl_bound=bound)
    losses = torch.stack([opt.step(batch) for batch in case.batches])
    same(case.net, expected)
    torch.testing.assert_close(losses, expected[2], rtol=1e-10, atol=1e-10)
    assert opt.damping == float(opt.info.adapted.damping)


def test_a_group_s_learning_rate_is_a_factor_on_the_step():
    case = problem(steps=1, examples=16)
    nets = [case.again() for _ in range(2)]
    starts = [trained(net)[0] for net in nets]
    starts = [{name: p.clone() for name, p in start.items()} for start in starts]
    for net, factor in zip(nets, (1.0, 0.25), strict=True):
        opt = ff.optim.NaturalGradient(net, likelihood=LABELS, kl_bound=None)
        assert [group["lr"] for group in opt.param_groups] == [1.0]
        opt.param_groups[0]["lr"] = factor
        opt.step(case.batches[0])
    moves = [{n: trained(net)[0][n] - start[n] for n in start} for net, start in zip(nets, starts, strict=True)]
    for name, move in moves[0].items():
        torch.testing.assert_close(moves[1][name], 0.25 * move)


def test_groups_may_have_factors_of_their_own():
    case = problem(steps=3, examples=16)
    first = case.net[0]
    still = {name: p.clone() for name, p in first.named_parameters()}
    groups = [{"params": first.parameters(), "lr": 0.0}, {"params": case.net[2].parameters()}]
    opt = ff.optim.NaturalGradient(case.net, groups, likelihood=LABELS, kl_bound=None)
    for batch in case.batches:
        opt.step(batch)
    assert all(torch.equal(p, still[name]) for name, p in first.named_parameters())


def test_an_increased_damping_is_reported_once():
    case = problem(steps=6, examples=16)
    opt = ff.optim.NaturalGradient(case.net, likelihood=LABELS, lr="auto", damping=1e-30, momentum=0.0)
    opt._curvature._adaptive |= {"rule": "model", "lr": 1e6}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in case.batches:
            opt.step(batch)
    said = [str(each.message) for each in caught if "the damping rose from 1e-30" in str(each.message)]
    assert len(said) == 1 and opt.damping > 1e-30


def test_a_step_without_a_batch_needs_a_learning_rate():
    case = problem(examples=16)
    x, y = case.batches[0]
    opt = ff.optim.NaturalGradient(case.net, likelihood=LABELS, example_inputs=x)
    with opt.watch():
        loss = F.cross_entropy(case.net(x), y)
    loss.backward()
    with pytest.raises(E.StructureError, match="cannot find a learning rate"):
        opt.step()


def test_damping_of_a_watched_step_is_measured_once_in_units_of_the_curvature():
    case = problem(examples=16)
    (x, y), (x2, y2) = case.batches[:2]
    pre = ff.optim.Preconditioner(case.net, damping="auto", example_inputs=x)
    found = []
    for each_x, each_y in ((x, y), (x2, y2)):
        case.net.zero_grad()
        with pre.watch():
            loss = F.cross_entropy(case.net(each_x), each_y)
        loss.backward()
        pre.step()
        found.append(pre.damping)
    ng = pre._curvature.ready()
    assert found[0] == found[1]
    assert found[0] == pytest.approx(
        20 * float(ng.trace(pre.curvature)) / sum(p.numel() for p in case.net.parameters())
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": "fast"}, 'lr is a number or "auto"'),
        ({"momentum": "much"}, 'momentum is a number or "auto"'),
        ({"damping": "none"}, 'damping is a number or "auto"'),
        ({"kl_bound": "tight"}, "kl_bound must be positive"),
    ],
)
def test_other_words_are_refused(options, words):
    with pytest.raises(E.HyperparameterError, match=words), as_installed():
        ff.optim.NaturalGradient(nn.Linear(4, 3), likelihood=LABELS, **options)
