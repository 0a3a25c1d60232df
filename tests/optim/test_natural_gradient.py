"""The drop-in optimizer is the functional loop, and an optimizer as torch knows them."""

import copy

import pytest
import torch
from torch import nn

import fisherfn as ff
from tests.methods.protocol import METHODS
from tests.optim.problems import CLASSES, NETS, SEEDED, Loop, TwoInputs, problem, same
from tests.zoo import as_installed

LABELS = ff.Categorical()


def converted(net, loop, params=None, **more):
    groups = {"lr": loop.lr, "momentum": loop.momentum, "weight_decay": loop.weight_decay}
    groups = {name: value for name, value in groups.items() if not callable(value)}
    options = {"likelihood": LABELS, "kl_bound": loop.bound, "fisher": loop.fisher, **loop.options, **groups, **more}
    return ff.optim.NaturalGradient(net, params, **options)


def snapshot(net):
    return {name: leaf.clone() for name, leaf in net.state_dict().items()}


def unmoved(net, before):
    return all(torch.equal(leaf, before[name]) for name, leaf in net.state_dict().items())


# ------------------------------------------------------------------------------------------- the functional loop


@METHODS
def test_fifty_steps_are_those_of_the_functional_loop(method):
    loop = Loop(method, lr=0.3, weight_decay=0.01, bound=1e-2, update_every=3, invert_every=6)
    if method == "exactNG":  # its state follows the batch: statistics and inverses go together
        loop = Loop(method, lr=0.3, weight_decay=0.01, bound=1e-2)
    case = problem(steps=50)
    expected = loop.run(case.net, case.batches)
    opt = converted(case.net, loop)
    losses = torch.stack([opt.step(batch) for batch in case.batches])
    same(case.net, expected)
    torch.testing.assert_close(losses, expected[2], rtol=1e-10, atol=1e-10)
    assert opt.info.inner.ndim == 0 and opt.skipped == 0


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("fisher", ["mc", "type2", "empirical"])
def test_every_net_and_fisher(name, fisher):
    case = problem(name)
    loop = Loop(fisher=fisher, samples=2, seed=3, seeded=name in SEEDED, update_every=2, invert_every=4)
    expected = loop.run(case.net, case.batches)
    before = torch.get_rng_state()
    opt = converted(case.net, loop)
    for batch in case.batches:
        opt.step(batch)
    same(case.net, expected)
    assert torch.equal(before, torch.get_rng_state()), "the global generator is untouched"


def test_the_layers_may_be_found_at_once_or_at_the_first_batch():
    case, loop = problem(), Loop()
    early, late = case.again(), case.again()
    first = converted(early, loop, example_inputs=case.batches[3][0])
    second = converted(late, loop)
    assert "all" in str(first.layout)
    with pytest.raises(ff.errors.StructureError, match="example_inputs"):
        second.layout  # noqa: B018
    for batch in case.batches:
        assert torch.equal(first.step(batch), second.step(batch))
    assert unmoved(late, snapshot(early))


def test_without_clip_and_momentum():
    case, loop = problem(), Loop(bound=None, momentum=0.0, lr=0.1)
    expected = loop.run(case.net, case.batches)
    opt = converted(case.net, loop)
    for batch in case.batches:
        opt.step(batch)
    same(case.net, expected)
    assert not any(opt.state.values()), "no buffer where there is no momentum"


def test_the_automatic_bound_is_per_label_and_not_per_sequence():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(40) % 2
    start = nn.Linear(3, 2).double()
    found = []
    for inputs, labels, damping in ((x, y, 0.1), (x.reshape(8, 5, 3), y.reshape(8, 5), 0.5)):
        net = copy.deepcopy(start)
        opt = ff.optim.NaturalGradient(net, likelihood=LABELS, fisher="type2", lr=100.0, damping=damping)
        opt.step((inputs, labels))
        found.append(net.weight - start.weight)
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=0)


def test_in_chunks():
    case, loop = problem(), Loop()
    expected = loop.run(case.net, case.batches)
    opt = converted(case.net, loop, chunk_size=3)
    for batch in case.batches:
        opt.step(batch)
    same(case.net, expected)


def test_several_inputs_are_a_tuple_or_the_list_that_a_loader_makes_of_it():
    torch.manual_seed(1)
    x, z = torch.randn(32, 4), torch.randn(32, 2)
    pairs = list(zip(zip(x, z, strict=True), (torch.arange(32) % CLASSES).tolist(), strict=True))
    nets = TwoInputs(), TwoInputs()
    nets[1].load_state_dict(nets[0].state_dict())
    first, second = (ff.optim.NaturalGradient(net, likelihood=LABELS, lr=0.5) for net in nets)
    for (x, z), y in torch.utils.data.DataLoader(pairs, batch_size=16):
        assert torch.equal(first.step(((x, z), y)), second.step([[x, z], y]))
    assert unmoved(nets[0], nets[1].state_dict())


# --------------------------------------------------------------------------------------- groups, rates, schedulers


def test_groups_have_rates_momenta_and_decays_of_their_own():
    def of(first, rest):
        return lambda name, step: first if name.startswith("0.") else rest

    case = problem()
    loop = Loop(lr=of(0.1, 0.4), momentum=of(0.5, 0.9), weight_decay=of(0.1, 0.0))
    expected = loop.run(case.net, case.batches)
    groups = [
        {"params": case.net[0].parameters(), "lr": 0.1, "momentum": 0.5, "weight_decay": 0.1},
        {"params": list(case.net[2].parameters())},
    ]
    opt = converted(case.net, loop, groups, lr=0.4)
    for batch in case.batches:
        opt.step(batch)
    same(case.net, expected)


SCHEDULERS = {
    "step": lambda opt: torch.optim.lr_scheduler.StepLR(opt, 4, 0.3),
    "one-cycle": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, [0.4, 0.2], total_steps=12),
    "cosine": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 12),
    "warm-up": lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, [lambda s: s / 4, lambda s: 1.0]),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name):
    case = problem()

    def groups(net):
        return [{"params": list(net[0].parameters())}, {"params": list(net[2].parameters()), "lr": 0.2}]

    reference = torch.optim.SGD(groups(case.again()), lr=0.4, momentum=0.9)
    scheduler, plan = SCHEDULERS[name](reference), []
    for _ in case.batches:
        plan.append([(group["lr"], group["momentum"]) for group in reference.param_groups])
        reference.step()
        scheduler.step()

    def planned(index):
        return lambda parameter, step: plan[step][0 if parameter.startswith("0.") else 1][index]

    expected = Loop(lr=planned(0), momentum=planned(1)).run(case.net, case.batches)
    opt = converted(case.net, Loop(), groups(case.net), lr=0.4, momentum=0.9)
    scheduler = SCHEDULERS[name](opt)
    for batch in case.batches:
        opt.step(batch)
        scheduler.step()
    same(case.net, expected)


def test_a_learning_rate_of_zero_changes_nothing():
    case = problem()
    before = snapshot(case.net)
    opt = converted(case.net, Loop(lr=0.0))
    opt.step(case.batches[0])
    assert unmoved(case.net, before)


def test_a_rate_may_be_a_tensor():
    case, loop = problem(), Loop()
    expected = loop.run(case.net, case.batches)
    opt = converted(case.net, loop, lr=torch.tensor(0.5, dtype=torch.float64))
    for batch in case.batches:
        opt.step(batch)
    same(case.net, expected)


# --------------------------------------------------------------------------------------------- an optimizer of torch


def test_the_optimizer_is_a_torch_optimizer_and_does_not_change_grad():
    case = problem()
    opt = converted(case.net, Loop())
    assert isinstance(opt, torch.optim.Optimizer) and opt.defaults["lr"] == 0.5
    marks = {name: torch.randn_like(p) for name, p in case.net.named_parameters()}
    for name, p in case.net.named_parameters():
        p.grad = marks[name].clone()
    opt.step(case.batches[0])
    assert all(torch.equal(p.grad, marks[name]) for name, p in case.net.named_parameters())
    opt.zero_grad()
    assert all(p.grad is None for p in case.net.parameters())
    opt.step(case.batches[1])


def test_hooks_on_steps_run():
    case, seen = problem(), []
    opt = converted(case.net, Loop())
    opt.register_step_pre_hook(lambda opt, args, kwargs: seen.append("before"))
    opt.register_step_post_hook(lambda opt, args, kwargs: seen.append("after"))
    opt.step(case.batches[0])
    assert seen == ["before", "after"]


def test_damping_can_be_changed():
    case = problem()
    opt = converted(case.net, Loop(damping=0.1))
    assert opt.damping == 0.1
    opt.step(case.batches[0])
    opt.damping = 3.0
    assert opt.damping == 3.0 and float(opt.curvature.damping) == 3.0
    with pytest.raises(ff.errors.HyperparameterError, match="damping"):
        opt.damping = -1.0


def test_frozen_parameters_and_those_in_no_group_do_not_change():
    case = problem()
    case.net[0].weight.requires_grad_(False)
    before = snapshot(case.net)
    opt = converted(case.net, Loop(), [case.net[0].weight, case.net[0].bias, case.net[2].weight])
    for batch in case.batches:
        opt.step(batch)
    moved = {name for name, leaf in case.net.state_dict().items() if not torch.equal(leaf, before[name])}
    assert moved == {"0.bias", "2.weight"}


# ------------------------------------------------------------------------------------------------------ autocast


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_around_the_step_is_for_the_net_alone(low):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, CLASSES))
    x, y = torch.randn(32, 4), torch.arange(32) % CLASSES
    exact, mixed = (nn.Sequential(*map(_copy, net)) for _ in range(2))
    losses = []
    for net, enabled in ((exact, False), (mixed, True)):
        opt = ff.optim.NaturalGradient(net, likelihood=LABELS, lr=0.1, method="lanczos", fisher="type2")
        with torch.autocast("cpu", dtype=low, enabled=enabled):
            losses.append(torch.stack([opt.step((x, y)) for _ in range(5)]))
        leaves = [*ff.tree.leaves(opt.curvature), *net.parameters(), opt.info.loss]
        assert not {leaf.dtype for leaf in leaves} & {torch.bfloat16, torch.float16}
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0.0)
    assert not torch.equal(losses[1], losses[0]), "the net did compute in half precision"


@METHODS
def test_autocast_leaves_the_curvature_its_precision(method):
    case = problem()
    net, (x, y) = case.net.float(), case.batches[0]
    x = x.float()
    plain, params, context = ff.functional(net)

    def model(params, x, context):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs, context = plain(params, x, context)
        return outputs.float(), context

    options = {"likelihood": LABELS, "method": method, "fisher": "empirical"}
    ng = ff.natural_gradient(model, params, x, context=context, **options)
    nat, _, _ = ng.step(params, ng.init(params, damping=0.1), (x, y), context=context)
    opt = ff.optim.NaturalGradient(net, lr=1.0, momentum=0.0, kl_bound=None, damping=0.1, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        opt.step((x, y))
    for name, p in net.named_parameters():
        torch.testing.assert_close(params[name] - p, nat[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fixed", [{}, {"lr": 0.5, "damping": 0.1}], ids=["adaptive", "fixed"])
def test_inside_one_autocast_region_the_net_is_evaluated_with_its_new_weights(fixed):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, CLASSES))
    x, y = torch.randn(32, 4), torch.arange(32) % CLASSES
    opt = ff.optim.NaturalGradient(net, likelihood=LABELS, **fixed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = net(x)
        for _ in range(3):
            opt.step((x, y))
        after = net(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(after, net(x), rtol=0.0, atol=0.0)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("likelihood", [ff.Categorical(), ff.Gaussian()], ids=lambda one: type(one).__name__)
def test_a_step_after_the_weights_were_loaded_undoes_nothing(likelihood):
    """The loss of other weights says nothing about the last update, which would be subtracted from them."""
    torch.manual_seed(0)
    x, net = torch.randn(64, 4), nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, CLASSES))
    y = (x @ torch.randn(4, CLASSES)).argmax(1) if isinstance(likelihood, ff.Categorical) else x[:, :CLASSES]
    start = {name: leaf.clone() for name, leaf in net.state_dict().items()}
    opt = ff.optim.NaturalGradient(net, likelihood=likelihood)
    for _ in range(15):
        opt.step((x, y))
    ended = copy.deepcopy(opt.state_dict()), {name: leaf.clone() for name, leaf in net.state_dict().items()}
    net.load_state_dict(start)
    before = opt.step((x, y))
    after = likelihood.nll(net(x).detach(), y).mean()
    assert not opt.info.adapted.rejected and float(after) < float(before)
    # a step continues a run whose weights and state were loaded together: the look back is on
    net.load_state_dict(ended[1])
    opt.load_state_dict(ended[0])
    with torch.no_grad():
        net[0].weight.add_(5.0)
    opt.step((x, y))
    assert not opt.info.adapted.rejected, "the last update is not the reason"
    net.load_state_dict(ended[1])
    ended[0]["curvature"]["state"]["update/0.weight"] += 5.0
    opt.load_state_dict(ended[0])
    with torch.no_grad():
        net[0].weight.add_(5.0)
    opt.step((x, y))
    assert opt.info.adapted.rejected


def _copy(module):
    return copy.deepcopy(module)


# --------------------------------------------------------------------------------------------- what goes wrong


def bad(batch):
    x, y = batch
    return torch.full_like(x, torch.nan), y


def test_a_step_that_is_not_ok_raises_and_nothing_moved():
    case = problem("conv-batch-norm")
    good, other = case.again(), case.again()
    opt, twin = converted(good, Loop(fisher="type2")), converted(other, Loop(fisher="type2"))
    for index, batch in enumerate(case.batches):
        if index in (0, 5):
            before = snapshot(good)
            with pytest.raises(ff.errors.NonFiniteError, match="inputs"):
                opt.step(bad(batch))
            assert unmoved(good, before)
        opt.step(batch)
        twin.step(batch)
    assert unmoved(good, snapshot(other))


def test_bad_steps_may_be_skipped_but_not_for_ever():
    case = problem()
    opt = converted(case.net, Loop(), on_bad="skip", example_inputs=case.batches[0][0])
    before = snapshot(case.net)
    assert opt.step(bad(case.batches[0])).isnan()
    assert unmoved(case.net, before) and opt.skipped == 1 and not all(opt.info.ok.values())
    opt.step(case.batches[0])
    assert not unmoved(case.net, before)
    for _ in range(9):
        opt.step(bad(case.batches[0]))
    with pytest.raises(ff.errors.NonFiniteError):
        opt.step(bad(case.batches[0]))


def untrained(**more):
    net = nn.Linear(4, CLASSES)
    return ff.optim.NaturalGradient(net, more.pop("params", None), **{"likelihood": LABELS, "lr": 0.1, **more})


E = ff.errors
CONSTRUCTORS = {
    "no net": (lambda: ff.optim.NaturalGradient(None, likelihood=LABELS, lr=0.1), E.StructureError, "Module"),
    "no parameter": (lambda: untrained(params=[]), E.StructureError, "empty"),
    "another net's": (lambda: untrained(params=nn.Linear(4, 3).parameters()), E.StructureError, "of this net"),
    "a negative rate": (lambda: untrained(lr=-0.1), E.HyperparameterError, "lr"),
    "a rate in words": (lambda: untrained(lr="fast"), E.HyperparameterError, "lr"),
    "a momentum of 1": (lambda: untrained(momentum=1.0), E.HyperparameterError, "momentum"),
    "a negative decay": (lambda: untrained(weight_decay=-1.0), E.HyperparameterError, "weight_decay"),
    "no bound": (lambda: untrained(kl_bound=0.0), E.HyperparameterError, "kl_bound"),
    "a negative damping": (lambda: untrained(damping=-1.0), E.HyperparameterError, "damping"),
    "an ema of 1": (lambda: untrained(ema=1.0), E.HyperparameterError, "ema"),
    "no cadence": (lambda: untrained(update_every=0), E.HyperparameterError, "update_every"),
    "half a cadence": (lambda: untrained(invert_every=1.5), E.HyperparameterError, "invert_every"),
    "another method": (lambda: untrained(method="kfax"), E.UnknownNameError, "'kfac'"),
    "another fisher": (lambda: untrained(fisher="x"), E.UnknownNameError, "fisher"),
    "another remedy": (lambda: untrained(on_bad="ignore"), E.UnknownNameError, "on_bad"),
    "no generator": (lambda: untrained(generator="x"), E.HyperparameterError, "generator"),
}


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_an_unsupported_net_raises_at_construction(name):
    make, error, said = CONSTRUCTORS[name]
    with as_installed(), pytest.raises(error, match=said):
        make()


def test_a_step_without_arguments_raises_with_a_remedy():
    with pytest.raises(E.StructureError, match=r"loss = opt\.step\(\(x, y\)\)"):
        untrained().step()


def test_later_changes_of_the_trained_parameters_raise():
    case = problem()
    opt = converted(case.net, Loop())
    opt.step(case.batches[0])
    case.net[0].weight.requires_grad_(False)
    with pytest.raises(E.StructureError, match=r"0\.weight.*frozen or unfrozen"):
        opt.step(case.batches[1])
    case.net[0].weight.requires_grad_(True)
    with pytest.raises(E.StructureError, match="make a new optimizer"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    case.net[0] = nn.Linear(4, 5).double()
    with pytest.raises(E.StructureError, match="of this net"):
        opt.step(case.batches[1])
