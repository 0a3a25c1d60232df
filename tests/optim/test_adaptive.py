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


def groups_of(net, **numbers):
    """The first parameter in one group, the others in a second with the learning rate 0.5."""
    first, *others = net.parameters()
    return [{"params": [first], **numbers}, {"params": others, "lr": 0.5, **numbers}]


def moved(case, factor, **numbers):
    """The change of each parameter in one step; `factor` multiplies the learning rates of both groups."""
    net = case.again()
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    opt = ff.optim.NaturalGradient(net, groups_of(net, **numbers), likelihood=LABELS, kl_bound=None, damping=0.1)
    for group in opt.param_groups:
        group["lr"] *= factor
    opt.step(case.batches[0])
    return {name: p.detach() - start[name] for name, p in net.named_parameters()}, start, opt


def test_a_schedule_works_on_groups_with_different_learning_rates():
    case = problem(steps=1, examples=16)
    whole, part = (moved(case, factor)[0] for factor in (1.0, 0.1))
    for name in whole:
        torch.testing.assert_close(part[name], 0.1 * whole[name])


@pytest.mark.parametrize("factor", [1.0, 0.1])
def test_weight_decay_follows_the_learning_rate_of_its_group_once(factor):
    case = problem(steps=1, examples=16)
    plain, start, opt = moved(case, factor)
    decayed, _, _ = moved(case, factor, weight_decay=0.2)
    rate = float(opt.info.adapted.learning_rate)
    assert rate > 0
    for at, name in enumerate(plain):
        share = 0.2 * rate * (1.0 if at == 0 else 0.5)
        torch.testing.assert_close(decayed[name], plain[name] - share * start[name])


def test_one_momentum_for_all_groups_and_no_cycle():
    case = problem(steps=2)
    opt = ff.optim.NaturalGradient(case.net, groups_of(case.net, momentum=0.3), likelihood=LABELS)
    with pytest.raises(E.StructureError, match="has momentum 0.3"):
        opt.step(case.batches[0])
    net = case.again()
    opt = ff.optim.NaturalGradient(net, likelihood=LABELS)
    torch.optim.lr_scheduler.OneCycleLR(opt, 1.0, total_steps=4)
    with pytest.raises(E.StructureError, match="cycle_momentum=False"):
        opt.step(case.batches[0])


@pytest.mark.parametrize("options", [{}, {"lr": 0.1, "damping": 0.1}], ids=["adaptive", "fixed"])
@pytest.mark.parametrize("bad", [float("nan"), -1.0, "auto"])
def test_numbers_that_a_schedule_broke_are_refused_before_anything_changes(bad, options):
    case = problem(steps=2)
    opt = ff.optim.NaturalGradient(case.net, likelihood=LABELS, **options)
    opt.step(case.batches[0])
    before = [p.detach().clone() for p in case.net.parameters()]
    opt.param_groups[0]["lr"] = bad
    with pytest.raises(E.HyperparameterError, match="lr must be"):
        opt.step(case.batches[1])
    assert all(torch.equal(p, old) for p, old in zip(case.net.parameters(), before, strict=True))


def test_a_measured_damping_is_set_after_the_first_batch_or_loaded():
    case = problem(steps=3)
    opt = ff.optim.NaturalGradient(case.net, likelihood=LABELS)
    with pytest.raises(E.StructureError, match="measured at the first batch"):
        opt.damping = 7.0
    opt.step(case.batches[0])
    opt.damping = 7.0
    opt.step(case.batches[1])
    assert opt.damping in (7.0, 14.0)  # inverses are not due; a rejection doubles it
    other = ff.optim.NaturalGradient(case.net, likelihood=LABELS)
    other.load_state_dict(opt.state_dict())
    assert other.damping == opt.damping
    other.damping = 3.0
    other.step(case.batches[2])
    assert other.damping in (3.0, 6.0)


@pytest.mark.parametrize("options", [{}, {"lr": 0.1}, {"lr": 0.1, "damping": 0.1}], ids=str)
def test_a_given_damping_counts_whenever_it_is_set_before_the_first_batch(options):
    case = problem(steps=1)
    opt = ff.optim.NaturalGradient(case.net, likelihood=LABELS, **{"damping": 0.1, **options})
    opt.damping = 7.0
    opt.step(case.batches[0])
    assert opt.damping in (7.0, 14.0)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_watched_loss_measures_the_damping_once(scale):
    """With a given rate the curvature of the watched loss sets λ to 20 tr F̂ / n."""
    case = problem(steps=1)
    opt = ff.optim.NaturalGradient(case.net, likelihood=LABELS, lr=0.1, kl_bound=None, fisher="empirical")
    x, y = case.batches[0]
    before = [p.detach().clone() for p in case.net.parameters()]
    with opt.watch(x):
        loss = scale * F.cross_entropy(case.net(x), y)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in case.net.named_parameters()}
    opt.step()
    ng = opt._curvature.ng
    size = sum(p.numel() for p in case.net.parameters())
    assert opt.damping == pytest.approx(20 * float(ng.trace(opt.curvature)) / size)
    # and no bound shortens the step
    nat = ng.precondition(opt.curvature, grads)
    for (name, p), old in zip(case.net.named_parameters(), before, strict=True):
        torch.testing.assert_close(p.detach() - old, -0.1 * nat[name])


@pytest.mark.parametrize("options", [{}, {"lr": 0.1, "damping": 0.1}], ids=["adaptive", "fixed"])
def test_a_first_batch_that_is_not_finite_is_skipped_too(options):
    case = problem("patches", steps=2)
    opt = ff.optim.NaturalGradient(case.net, likelihood=LABELS, on_bad="skip", **options)
    x, y = case.batches[0]
    assert opt.step((x * torch.nan, y)).isnan() and opt.skipped == 1
    opt.step((x, y))
    assert opt.skipped == 1 and opt._curvature.steps == 1
    strict = ff.optim.NaturalGradient(case.again(), likelihood=LABELS, **options)
    with pytest.raises(E.NonFiniteError, match="first batch of this shape"):
        strict.step((x * torch.nan, y))


def test_a_net_whose_type_changes_after_the_first_batch_needs_a_new_optimizer():
    case = problem(steps=1)
    opt = ff.optim.NaturalGradient(case.net, likelihood=LABELS)
    x, y = case.batches[0]
    opt.step((x, y))
    case.net.float()
    with pytest.raises(E.StructureError, match="another type or device"):
        opt.step((x.float(), y))


def test_switching_dropout_off_and_on_again_keeps_the_steps():
    """A net that draws in its forward needs seeds in training only; each mode is built once."""
    case = problem("functional-dropout", steps=4)
    opt = ff.optim.NaturalGradient(case.net, likelihood=LABELS)
    for mode, batch in zip((True, False, True, False), case.batches, strict=True):
        case.net.train(mode)
        opt.step(batch)
    assert opt._curvature.steps == 4


def test_a_batch_in_two_arguments_is_explained():
    case = problem(steps=1)
    opt = ff.optim.NaturalGradient(case.net, likelihood=LABELS)
    with pytest.raises(E.StructureError, match=r"step\(\(x, y\)\)"):
        opt.step(*case.batches[0])


def test_no_learning_rate_is_not_a_number():
    with pytest.raises(E.HyperparameterError, match="lr is a number"):
        ff.optim.NaturalGradient(nn.Linear(2, 2), likelihood=LABELS, lr=None)


def test_a_group_that_is_refused_is_not_kept():
    case = problem(steps=3)
    first, *others = case.net.parameters()
    opt = ff.optim.NaturalGradient(case.net, [first], likelihood=LABELS)
    for refused in ([first], [nn.Parameter(torch.ones(2))]):  # twice, and of another net
        with pytest.raises(E.StructureError):
            opt.add_param_group({"params": refused})
    opt.step(case.batches[0])
    with pytest.raises(E.StructureError, match="new optimizer for more parameters"):
        opt.add_param_group({"params": others})
    assert len(opt.param_groups) == 1
    opt.step(case.batches[1])


def test_a_state_that_is_refused_changes_nothing():
    case = problem(steps=3)
    opt = ff.optim.NaturalGradient(case.net, likelihood=LABELS)
    opt.step(case.batches[0])
    net = case.again()
    two = ff.optim.NaturalGradient(net, groups_of(net), likelihood=LABELS)
    for batch in case.batches[:2]:
        two.step(batch)
    before = ff.tree.flatten(opt.curvature), opt.damping, opt._curvature.steps
    with pytest.raises(E.StructureError, match="parameter groups"):
        opt.load_state_dict(two.state_dict())
    after = ff.tree.flatten(opt.curvature), opt.damping, opt._curvature.steps
    assert after[1:] == before[1:] and all(torch.equal(after[0][path], leaf) for path, leaf in before[0].items())


def test_a_rate_in_a_tensor_follows_a_schedule():
    rates = []
    for lr in (0.1, torch.tensor(0.1)):
        case = problem(steps=3)
        opt = ff.optim.NaturalGradient(case.net, likelihood=LABELS, lr=lr, damping="auto", momentum=0.0, kl_bound=None)
        schedule = torch.optim.lr_scheduler.StepLR(opt, 1, 0.1)
        for batch in case.batches:
            opt.step(batch)
            schedule.step()
        rates.append(float(opt.info.adapted.learning_rate))
    assert rates[1] == pytest.approx(rates[0], rel=1e-6) and rates[0] < 0.01
