"""The adaptive optimizer against theory, as a pure function, and its settings."""

import pytest
import torch

import fisherfn as ff
from tests.adapt.problems import built, dense_fisher, flat, loss, mlp, quadratic, steps, unflat
from tests.zoo import as_installed

ALL = [name for name in ff.METHODS]


def frozen(problem, damping):
    """An optimizer whose inverses are those of one draw, and its state; λ is 0 in the model."""
    ng = built(problem)
    opt = ff.adaptive(ng, damping=0.0, model_examples=10**6, look_back=False)
    stats = ng.stats(problem.params, (problem.x, problem.y), generator=torch.Generator().manual_seed(0))
    curvature, _ = ng.update(ng.init(problem.params, damping=damping), stats)
    curvature, _ = ng.invert(curvature)
    return opt, opt.init(problem.params)._replace(
        curvature=curvature._replace(damping=torch.zeros_like(curvature.damping))
    )


def test_on_a_quadratic_the_iterates_are_those_of_preconditioned_conjugate_gradients():
    problem = quadratic()
    opt, state = frozen(problem, damping=0.05)
    F, theta = dense_fisher(problem), flat(problem.params)
    ng = opt.ng
    rhs = -flat(torch.func.grad(lambda p: loss(problem, p))(problem.params))

    def preconditioned(r):
        return flat(ng.precondition(state.curvature, unflat(problem, r)))

    r, params = rhs.clone(), problem.params
    z = preconditioned(r)
    p, before = z, r @ z
    for _ in range(6):
        alpha = before / (p @ F @ p)
        theta, r = theta + alpha * p, r - alpha * F @ p
        z = preconditioned(r)
        p, before = z + (r @ z) / before * p, r @ z
        params, state, info = opt.step(params, state, (problem.x, problem.y), update=False, invert=False)
        torch.testing.assert_close(flat(params), theta, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(float(info.adapted.reduction_ratio), 1.0, rtol=1e-6, atol=0)


def test_with_the_very_fisher_as_preconditioner_step_size_and_momentum_are_one_and_zero():
    problem = mlp(ff.Gaussian(), examples=40)
    ng = built(problem, ff.exact(), fisher="type2")
    opt = ff.adaptive(ng, rule="model", damping=0.1, look_back=False, model_examples=10**6)
    _, _, infos = steps(problem, opt, 3)
    for info in infos:
        assert float(info.adapted.learning_rate) == pytest.approx(1.0, abs=1e-8)
        assert float(info.adapted.momentum) == pytest.approx(0.0, abs=1e-8)


@pytest.mark.parametrize("method", ALL)
def test_every_method_lowers_the_loss(method):
    problem = mlp(examples=80)
    opt = ff.adaptive(built(problem, method), model_examples=80)
    params, _, infos = steps(problem, opt, 12)
    assert float(loss(problem, params)) < 0.9 * float(infos[0].loss)
    ff.check(infos[-1])


def test_classes_take_the_clip_and_images_the_model():
    assert ff.adaptive(built(mlp(ff.Categorical()))).rule == "clip"
    weighted = mlp(ff.Categorical())._replace(likelihood=ff.Weighted(ff.Categorical()))
    assert ff.adaptive(built(weighted)).rule == "clip"
    assert ff.adaptive(built(mlp())).rule == "model"
    assert ff.adaptive(built(mlp(), "exactNG")).rule == "line_search"
    assert ff.adaptive(built(mlp(ff.Categorical()), "exactNG")).rule == "clip"


def test_a_sequence_makes_the_step_that_its_positions_make_as_examples():
    """The loss, F̂, the automatic damping and the automatic KL bound grow with the number of positions alike."""
    flat = mlp(ff.Categorical(), examples=40)
    long = flat._replace(x=flat.x.reshape(8, 5, 3), y=flat.y.reshape(8, 5))
    steps = []
    for problem in (flat, long):
        opt = ff.adaptive(built(problem, fisher="type2"))
        new, _, info = opt.step(problem.params, opt.init(problem.params), (problem.x, problem.y))
        assert info.adapted.learning_rate < 1  # within the bound
        steps.append(ff.tree.add(new, problem.params, scale=-1))
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-9, atol=0)


def test_the_clip_is_that_of_kl_clip_with_momentum():
    problem = mlp(ff.Categorical(), examples=40)
    ng = built(problem)
    opt = ff.adaptive(ng, damping=0.1, kl_bound=1e-2, look_back=False, model_examples=40)
    params, state, _ = steps(problem, opt, 5)
    rng = torch.Generator().manual_seed(0)
    theta, curvature, v = problem.params, ng.init(problem.params, damping=0.1), ff.tree.zeros_like(problem.params)
    for _ in range(5):
        nat, curvature, info = ng.step(theta, curvature, (problem.x, problem.y), generator=rng, inner=True)
        v = ff.tree.add(ff.kl_clip(nat, info.inner, lr=1.0, kl_bound=1e-2), v, scale=0.9)
        theta = ff.tree.add(theta, v, scale=-1.0)
    torch.testing.assert_close(flat(params), flat(theta), rtol=1e-10, atol=1e-10)


def test_a_line_search_takes_the_best_of_its_grid():
    problem = mlp(examples=40)
    ng = built(problem, "exactNG")
    opt = ff.adaptive(ng, damping=1e-3)
    new, _, infos = steps(problem, opt, 1)
    nat = ng(
        problem.params,
        ng.stats(problem.params, (problem.x, problem.y), generator=torch.Generator().manual_seed(0)),
        damping=1e-3,
    )
    tried = {0.5**k: float(loss(problem, ff.tree.add(problem.params, nat, scale=-(0.5**k)))) for k in range(16)}
    assert float(infos[0].adapted.learning_rate) == min(tried, key=tried.get)
    assert float(loss(problem, new)) == pytest.approx(min(tried.values()))


# --------------------------------------------------------------------------------------------------- pure functions


@pytest.mark.parametrize("rule", ["model", "clip", "line_search"])
def test_vmapped_members_are_their_own_runs(rule):
    problems = [mlp(examples=80, seed=seed) for seed in range(3)]
    opt = ff.adaptive(built(problems[0]), rule=rule)
    batch = (problems[0].x, problems[0].y)
    noises = [opt.ng.noise(batch, torch.Generator().manual_seed(seed)) for seed in range(4)]
    stacked = ff.tree.map(lambda *each: torch.stack(each), *(p.params for p in problems))

    def run(params):
        state = opt.init(params)
        for noise in noises:
            params, state, info = opt.step(params, state, batch, noise=noise)
        return params, info.adapted

    together, adapted = torch.vmap(run)(stacked)
    for index, problem in enumerate(problems):
        alone, own = run(problem.params)
        torch.testing.assert_close(flat(ff.tree.map(lambda leaf, i=index: leaf[i], together)), flat(alone))
        torch.testing.assert_close(adapted.damping[index], own.damping)


def test_a_saved_run_goes_on_bit_for_bit():
    problem = mlp(examples=80)
    opt = ff.adaptive(built(problem), average=0.9)
    straight, _, _ = steps(problem, opt, 8, update=True)
    params, state, _ = steps(problem, opt, 4)
    restored = ff.tree.unflatten(opt.init(problem.params), ff.tree.flatten(state))
    rng = torch.Generator().manual_seed(0)
    for _ in range(4):
        opt.ng.noise((problem.x, problem.y), rng)
    for _ in range(4):
        params, restored, _ = opt.step(params, restored, (problem.x, problem.y), generator=rng)
    assert torch.equal(flat(params), flat(straight))


def test_a_compiled_step_is_the_plain_one():
    problem = mlp(examples=80)
    opt = ff.adaptive(built(problem))
    batch = (problem.x, problem.y)
    noise = opt.ng.noise(batch, torch.Generator().manual_seed(0))
    compiled = ff.compile(opt.step, backend="eager")
    plain, _, _ = opt.step(problem.params, opt.init(problem.params), batch, noise=noise)
    fast, _, _ = compiled(problem.params, opt.init(problem.params), batch, noise=noise)
    torch.testing.assert_close(flat(fast), flat(plain), rtol=1e-12, atol=1e-12)


def test_the_average_is_that_of_the_parameters():
    problem = mlp(examples=80)
    opt = ff.adaptive(built(problem), average=0.5)
    params, state, seen = problem.params, opt.init(problem.params), []
    rng = torch.Generator().manual_seed(0)
    for _ in range(3):
        params, state, _ = opt.step(params, state, (problem.x, problem.y), generator=rng)
        seen.append(flat(params))
    expected = 0.5 * (0.5 * seen[0] + 0.5 * seen[1]) + 0.5 * seen[2]
    torch.testing.assert_close(flat(state.average), expected)


def test_weight_decay_is_added_to_the_step():
    problem = mlp(examples=80)
    plain, _, (info,) = steps(problem, ff.adaptive(built(problem)), 1)
    decayed, _, _ = steps(problem, ff.adaptive(built(problem), weight_decay=0.1), 1)
    share = 0.1 * float(info.adapted.learning_rate)
    torch.testing.assert_close(flat(decayed), flat(plain) - share * flat(problem.params))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": "fast"}, "lr is a number or \"auto\", got 'fast'"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"momentum": 1.0}, "momentum must lie in"),
        ({"damping": -1.0}, "damping must be >= 0"),
        ({"rule": "model", "kl_bound": 0.1}, "a KL bound and the rule"),
        ({"kl_bound": -0.1}, "kl_bound must be positive"),
        ({"model_examples": 0}, "model_examples must be a whole number"),
        ({"average": 1.0}, "average must lie in"),
        ({"rule": "line_search", "momentum": 0.9}, "has no momentum"),
    ],
)
def test_settings_that_contradict_are_refused(options, words):
    with pytest.raises(ff.FisherfnError, match=words):
        ff.adaptive(built(mlp()), **options)


def test_unknown_rules_are_named():
    with pytest.raises(ff.errors.UnknownNameError, match="did you mean 'model'"), as_installed():
        ff.adaptive(built(mlp()), rule="modle")


@pytest.mark.parametrize("refresh", ["update", "invert"])
def test_a_refresh_of_some_blocks_is_refused(refresh):
    """The new λ is that of a refresh of all blocks."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    model, params, context = ff.functional(net)
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Gaussian(), fisher="type2", context=context)
    opt = ff.adaptive(ng)
    with as_installed(), pytest.raises(ff.errors.StructureError, match="all blocks"):
        opt.step(params, opt.init(params), (x, y), context=context, **{refresh: {"0"}})


@pytest.mark.parametrize("rule", ["model", "clip", "line_search"])
def test_a_state_has_no_graph_of_the_steps_before(rule):
    """Parameters that require grad would otherwise keep every earlier step in memory."""
    problem = mlp(ff.Gaussian(), examples=40)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in problem.params.items()}
    opt, rng = ff.adaptive(built(problem), rule=rule, average=0.9), torch.Generator().manual_seed(0)
    state = opt.init(leaves)
    assert not any(leaf.requires_grad for leaf in ff.tree.leaves(state))
    for _ in range(2):
        _, state, _ = opt.step(leaves, state, (problem.x, problem.y), generator=rng)
        assert not any(leaf.requires_grad for leaf in ff.tree.leaves(state))


@pytest.mark.parametrize(("made", "used"), [(None, 0.9), (0.9, None)])
def test_a_state_with_another_running_average_raises(made, used):
    problem = mlp(ff.Gaussian(), examples=40)
    ng = built(problem)
    state = ff.adaptive(ng, average=made).init(problem.params)
    with pytest.raises(ff.errors.StructureError, match="running average"):
        ff.adaptive(ng, average=used).step(problem.params, state, (problem.x, problem.y))


def test_targets_may_contain_a_number():
    """A number belongs to all examples, also where the trial uses some of them."""

    def nll(outputs, targets):
        return 0.5 * (outputs / targets[1] - targets[0]).square().sum(-1)

    problem = mlp(ff.Gaussian(), examples=80)
    ng = ff.natural_gradient(problem.model, problem.params, problem.x, likelihood=nll, fisher="empirical")
    opt, results = ff.adaptive(ng), []
    for two in (2.0, torch.tensor(2.0)):
        results.append(opt.step(problem.params, opt.init(problem.params), (problem.x, (problem.y, two)))[0])
    torch.testing.assert_close(*results)
