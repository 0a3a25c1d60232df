"""The pure optimizers against torch's own, and the natural gradient's step against its parts by hand."""

import functools

import pytest
import torch

import fisherfn as ff
from common import optimizers
from common.steps import compiled

STEPS = 7
COMPILE = ff.compile


@pytest.fixture
def problem():
    """A small classifier in float64, and a batch for each step."""
    generator = torch.Generator().manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
    batches = [
        (
            torch.randn(8, 5, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (8,), generator=generator),
        )
        for _ in range(STEPS)
    ]
    return net, batches


def run(optimizer, params, context, batches, generator=None):
    state = optimizer.init(params)
    for index, batch in enumerate(batches):
        noise = optimizer.draw(batch, generator)
        params, state, context, info = optimizer.step(params, state, batch, context, noise, index)
        ff.check(info)
    return params, state


def torch_run(net, make, batches):
    optimizer = make(net.parameters())
    for x, y in batches:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return {name: p.detach() for name, p in net.named_parameters()}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_torchs_on_a_decayed_problem(problem, nesterov, weight_decay):
    net, batches = problem
    model, params, context = ff.functional(net)
    ours, _ = run(
        optimizers.sgd(model, ff.Categorical(), lr=0.1, nesterov=nesterov, weight_decay=weight_decay),
        params, context, batches,
    )  # fmt: skip

    def step_by_hand():
        """Decoupled decay is torch's SGD on the gradient, and a shrinking of the parameters beside it."""
        current = {name: p.clone() for name, p in params.items()}
        velocity = {name: torch.zeros_like(p) for name, p in params.items()}
        for x, y in batches:
            leaves = {name: p.clone().requires_grad_() for name, p in current.items()}
            loss = torch.nn.functional.cross_entropy(torch.func.functional_call(net, leaves, (x,)), y)
            grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
            for name in current:
                velocity[name] = 0.9 * velocity[name] + grads[name]
                direction = grads[name] + 0.9 * velocity[name] if nesterov else velocity[name]
                current[name] = current[name] - 0.1 * (direction + weight_decay * current[name])
        return current

    expected = step_by_hand()
    if not weight_decay:
        theirs = torch_run(net, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=nesterov), batches)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_is_torchs_adamw(problem, weight_decay):
    net, batches = problem
    model, params, context = ff.functional(net)
    settings = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": weight_decay}
    ours, _ = run(optimizers.adam(model, ff.Categorical(), **settings), params, context, batches)
    theirs = torch_run(net, lambda p: torch.optim.AdamW(p, **settings), batches)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_the_natural_step_is_clip_then_momentum_then_decay(problem):
    net, batches = problem
    model, params, context = ff.functional(net)
    lr, κ, μ, decay = 0.5, 1e-3, 0.9, 0.1
    ng = ff.natural_gradient(model, params, batches[0][0], likelihood=ff.Categorical(), fisher="type2", context=context)
    optimizer = optimizers.natural(
        ng, lr=lr, damping=0.1, kl_bound=κ, momentum=μ, weight_decay=decay, cadence=ff.Cadence.fixed(2, 4)
    )
    ours, _ = run(optimizer, params, context, batches)

    state, velocity, clipped = ng.init(params, damping=0.1), ff.tree.zeros_like(params), 0
    for index, batch in enumerate(batches):
        stats = ng.stats(params, batch, context=context)
        state = ng.update(state, stats)[0] if index % 2 == 0 else state
        state = ng.invert(state)[0] if index % 4 == 0 else state
        nat = ng.precondition(state, stats.grads)
        ν = min(1.0, float((κ / (lr**2 * ff.tree.dot(stats.grads, nat).abs())).sqrt()))
        clipped += ν < 1
        velocity = {name: ν * nat[name] + μ * velocity[name] for name in params}
        params = {name: params[name] - lr * (velocity[name] + decay * params[name]) for name in params}
    assert clipped, "the clip has to bind somewhere for this test to see it"
    torch.testing.assert_close(ours, params, rtol=1e-9, atol=1e-12)


def test_a_part_of_the_batch_serves_the_statistics_and_all_of_it_the_gradient(problem):
    net, batches = problem
    model, params, context = ff.functional(net)
    ng = ff.natural_gradient(model, params, batches[0][0], likelihood=ff.Categorical(), fisher="type2", context=context)
    optimizer = optimizers.natural(ng, lr=1.0, damping=0.1, kl_bound=None, momentum=0.0, fisher_batch_size=3)
    ours, _ = run(optimizer, params, context, batches[:1])
    x, y = batches[0]
    state = ng.invert(ng.update(ng.init(params, damping=0.1), ng.stats(params, (x[:3], y[:3]), context=context))[0])[0]
    nat = ng.precondition(state, ng.stats(params, (x, y), context=context).grads)
    torch.testing.assert_close(ours, ff.tree.add(params, nat, scale=-1.0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["sgd", "adam", *ff.METHODS])
def test_runs_can_be_vmapped(problem, name):
    net, batches = problem
    model, params, context = ff.functional(net)
    if name in ff.METHODS:
        ng = ff.natural_gradient(
            model, params, batches[0][0], likelihood=ff.Categorical(), method=name, context=context
        )
        optimizer = optimizers.natural(ng, lr=0.1, damping=0.1, cadence=ff.Cadence.fixed(2, 3))
    else:
        optimizer = getattr(optimizers, name)(model, ff.Categorical(), lr=0.1)
    members = [{n: p + 0.1 * i for n, p in params.items()} for i in range(3)]
    draws = [[optimizer.draw(b, torch.Generator().manual_seed(i)) for b in batches] for i in range(3)]

    def whole_run(params, noises):
        state = optimizer.init(params)
        for index, (batch, noise) in enumerate(zip(batches, noises, strict=True)):
            params, state, *_ = optimizer.step(params, state, batch, context, noise, index)
        return params

    stacked = {n: torch.stack([m[n] for m in members]) for n in params}
    noises = [torch.stack([d[i] for d in draws]) for i in range(STEPS)] if name in ff.METHODS else [()] * STEPS
    together = torch.vmap(whole_run)(stacked, noises)
    for i, member in enumerate(members):
        alone = whole_run(member, draws[i])
        # Deflation's second term comes from what the first leaves, and has more rounding errors: up to 3e-10 here
        torch.testing.assert_close({n: t[i] for n, t in together.items()}, alone, rtol=1e-8, atol=1e-9)


def length(params, batch, context):
    """A penalty with a gradient everywhere: half the squared length, times what the batch brings along."""
    return batch[2].sum() * sum(p.square().sum() for p in params.values()) / 2


@pytest.mark.parametrize("make", ["sgd", "adam", "kfac"])
def test_a_penalty_is_part_of_loss_and_gradient_and_not_of_the_curvature(problem, make):
    net, batches = problem
    model, params, context = ff.functional(net)
    x, y = batches[0]
    weight = torch.tensor([0.25, 0.5], dtype=torch.float64)
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), context=context, fisher="type2")
    optimizer = {
        "sgd": lambda: optimizers.sgd(model, ff.Categorical(), lr=0.1, penalty=length),
        "adam": lambda: optimizers.adam(model, ff.Categorical(), lr=0.1, penalty=length),
        "kfac": lambda: optimizers.natural(ng, lr=0.1, damping=0.1, kl_bound=None, penalty=length),
    }[make]()
    stats = ng.stats(params, (x, y), context=context)
    total = ff.tree.add(stats.grads, params, scale=0.75)
    state = ng.init(params, damping=0.1)
    state, _ = ng.update(state, stats)
    state, _ = ng.invert(state)
    direction = {
        "sgd": total,
        "adam": ff.tree.map(lambda g: g / (g.abs() + 1e-8), total),
        "kfac": ng.precondition(state, total),
    }[make]
    new = optimizer.step(params, optimizer.init(params), (x, y, weight), context, (), 0)
    ff.check(new.info)
    torch.testing.assert_close(new.params, ff.tree.add(params, direction, scale=-0.1))
    squares = sum(p.square().sum() for p in params.values())
    torch.testing.assert_close(new.info.loss, stats.loss + 0.75 * squares / 2)


@pytest.mark.parametrize("make", ["sgd", "kfac"])
def test_an_infinite_gradient_of_a_finite_loss_is_a_mask(problem, make):
    net, batches = problem
    model, params, context = ff.functional(net)
    params = {**params, "0.bias": torch.zeros_like(params["0.bias"])}
    ng = ff.natural_gradient(model, params, batches[0][0], likelihood=ff.Categorical(), context=context, fisher="type2")

    def root(params, batch, context):
        return params["0.bias"].sum().abs().sqrt()

    optimizer = {
        "sgd": lambda: optimizers.sgd(model, ff.Categorical(), lr=0.1, penalty=root),
        "kfac": lambda: optimizers.natural(ng, lr=0.1, damping=0.1, penalty=root),
    }[make]()
    info = optimizer.step(params, optimizer.init(params), batches[0], context, (), 0).info
    assert torch.isfinite(info.loss) and not info.ok["gradient"]
    with pytest.raises(ff.errors.NonFiniteError, match="the gradient is NaN or infinite"):
        ff.check(info)


def penalised(ng, value):
    return optimizers.natural(ng, lr=0.1, damping=0.1, penalty=lambda params, batch, context: value(params["0.bias"]))


def with_last(batch, x=None, y=None):
    """The batch, with another input or label of its last example, which is not in the part for the statistics."""
    inputs, targets = (part.clone() for part in batch)
    inputs[-1] = inputs[-1] if x is None else x
    targets[-1] = targets[-1] if y is None else y
    return inputs, targets


BAD = {
    "an infinite gradient": (lambda b: b.sum().abs().sqrt(), {}, "gradient"),
    "an infinite loss": (lambda b: b.sum() + torch.inf, {}, "loss"),
    "an input of the gradient alone": (None, {"x": torch.nan}, "inputs"),
    "a label of the gradient alone": (None, {"y": 99}, "targets"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_natural_step_that_is_not_ok_leaves_the_curvature_as_it_was(problem, bad):
    value, last, check = BAD[bad]
    net, batches = problem
    model, params, context = ff.functional(net)
    params = {**params, "0.bias": torch.zeros_like(params["0.bias"])}
    ng = ff.natural_gradient(model, params, batches[0][0], likelihood=ff.Categorical(), context=context, fisher="type2")
    if value is None:
        optimizer = optimizers.natural(ng, lr=0.1, damping=0.1, fisher_batch_size=3)
    else:
        optimizer = penalised(ng, value)
    before = optimizer.init(params)
    new = optimizer.step(params, before, with_last(batches[0], **last), context, (), 0)
    assert not torch.stack(list(new.info.ok.values())).all() and not new.info.checks[check]
    torch.testing.assert_close(ff.tree.flatten(new.state.curvature), ff.tree.flatten(before.curvature), rtol=0, atol=0)
    fine = optimizer.step(params, before, batches[0], context, (), 0) if value is None else None
    assert fine is None or int(fine.state.curvature.count) == 1


def test_the_fisher_of_an_implicit_step_has_the_weights_of_the_targets(problem):
    """Class weights and an ignored target: a step solves `(F + λ I) nat = ∇` with the type-2 Fisher of statistics."""
    net, batches = problem
    model, params, context = ff.functional(net)
    x, y = batches[0][0], batches[0][1].clone()
    y[0] = -100
    likelihood = ff.Categorical(weight=torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64))
    ng = ff.natural_gradient(model, params, x, likelihood=likelihood, context=context, fisher="type2")
    optimizer = optimizers.implicit(ng, lr=0.1, damping=0.1, kl_bound=None, momentum=0.0, iterations=100)
    moved, _ = run(optimizer, params, context, [(x, y)])
    stats = ng.stats(params, (x, y), context=context)
    F = ng.fisher(stats).dense()
    gradient = torch.cat([g.flatten() for g in stats.grads.values()])
    nat = torch.linalg.solve(F + 0.1 * torch.eye(len(F), dtype=F.dtype), gradient)
    found = torch.cat([(params[name] - moved[name]).flatten() for name in params])
    torch.testing.assert_close(found, 0.1 * nat)


def test_compiled_optimizers_walk_the_same_way(problem, monkeypatch):
    net, batches = problem
    model, params, context = ff.functional(net)
    ng = ff.natural_gradient(model, params, batches[0][0], likelihood=ff.Categorical(), context=context)
    makers = {
        "sgd": functools.partial(optimizers.sgd, model, ff.Categorical(), lr=0.1),
        "adam": functools.partial(optimizers.adam, model, ff.Categorical(), lr=0.1),
        "natural": functools.partial(optimizers.natural, ng, lr=0.1, damping=0.1, cadence=ff.Cadence.fixed(2, 4)),
        "implicit": functools.partial(optimizers.implicit, ng, lr=0.1, damping=0.1),
    }
    traced = []

    def compile_eagerly(fn):
        traced.append(fn)
        return COMPILE(fn, backend="eager")

    monkeypatch.setattr(ff, "compile", compile_eagerly)
    for name, make in makers.items():
        sizes = (None, len(batches[0][0]))
        runs = [run(make(compiled_batch=n), params, context, batches, torch.Generator().manual_seed(0)) for n in sizes]
        torch.testing.assert_close(ff.tree.flatten(runs[1]), ff.tree.flatten(runs[0]), msg=name)
    assert len(traced) == len(makers)


def test_only_batches_of_the_given_size_run_compiled(monkeypatch):
    monkeypatch.setattr(ff, "compile", lambda step: lambda *args, **named: ("compiled", step(*args, **named)))
    step = compiled(lambda params, state, batch, context, flag=False: (len(batch[0]), flag), 4)
    batch = (torch.zeros(4, 2), torch.zeros(4))
    assert step({}, (), batch, (), flag=True) == ("compiled", (4, True))
    assert step({}, (), (batch[0][:3], batch[1][:3]), ()) == (3, False)
    assert compiled(step, None) is step
