"""The contract calls of `natural_gradient`: what step is made of, KL clip, masks, and every typed error."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import fisherfn as ff
from tests import oracles, zoo
from tests.oracles import close, vec

errors = ff.errors
IDS = pytest.mark.parametrize("id", ["mlp-categorical", "sequence-pooled", "scale-vector"])


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True))


# ----------------------------------------------------------------------------------------------------- the step


@IDS
@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("invert", [True, False])
def test_step_is_its_four_parts(id, update, invert):
    problem = zoo.pick(id)
    run = zoo.sampled(problem)
    ng, batch = run.ng, problem.batch
    _, warm, _ = ng.step(problem.params, ng.init(problem.params, damping=0.1), batch, generator=zoo.generator(8))
    nat, state, info = ng.step(problem.params, warm, batch, noise=run.noise, update=update, invert=invert, inner=True)
    expected = ng.update(warm, run.stats)[0] if update else warm
    expected = ng.invert(expected)[0] if invert else expected
    close(ff.tree.flatten(state), ff.tree.flatten(expected), tol=1e-12)
    close(nat, ng.precondition(expected, run.stats), tol=1e-12)
    close(info.loss, run.stats.loss, tol=1e-12)
    close(info.inner, vec(oracles.mean_gradient(problem)) @ vec(nat))


def test_a_step_without_update_needs_no_draw():
    problem = zoo.pick("mlp-categorical")
    run = zoo.sampled(problem)
    _, warm, _ = run.ng.step(problem.params, run.ng.init(problem.params), problem.batch, noise=run.noise)
    nat, state, _ = run.ng.step(problem.params, warm, problem.batch, update=False, invert=False)
    close(nat, run.ng.precondition(warm, run.stats.grads))
    assert equal(state, warm)


@pytest.mark.parametrize(
    "options", [{"fisher": "type2"}, {"samples": 3}, {"fisher": "empirical", "chunk_size": 2}], ids=str
)
def test_step_passes_on_what_stats_takes(options):
    problem = zoo.pick("mlp-categorical")
    ng = problem.build(fisher="mc")
    init = ng.init(problem.params)
    _, state, _ = ng.step(problem.params, init, problem.batch, generator=zoo.generator(2), **options)
    stats = ng.stats(problem.params, problem.batch, generator=zoo.generator(2), **options)
    expected = ng.invert(ng.update(init, stats)[0])[0]
    close(ff.tree.flatten(state), ff.tree.flatten(expected), tol=1e-12)


def test_the_former_name_of_step_from_is_an_alias():
    assert ff.NaturalGradient.advance is ff.NaturalGradient.step_from


def test_inner_is_left_out_unless_asked_for():
    problem = zoo.pick("mlp-categorical")
    ng = problem.build(fisher="type2")
    _, _, info = ng.step(problem.params, ng.init(problem.params), problem.batch)
    assert not isinstance(info.inner, torch.Tensor)


@pytest.mark.parametrize(
    "widths", [(40, 30, 20), (2, 3, 2)], ids=["wide: factored is cheaper", "narrow: the matrix is"]
)
@pytest.mark.parametrize("size", [2, 60])
@pytest.mark.parametrize("form", ["factored", "eigen"])
def test_inner_and_nat_by_either_route(widths, size, form):
    problem = zoo.from_net(zoo.mlp(*widths), (size, widths[0]), "categorical")
    ng = problem.build(fisher="empirical", method=ff.kfac(damping_form=form))
    nat, state, info = ng.step(problem.params, ng.init(problem.params, damping=0.1), problem.batch, inner=True)
    grads = oracles.mean_gradient(problem)
    close(nat, ng.precondition(state, grads))
    close(info.inner, vec(grads) @ vec(nat))


def test_the_contracts_loop_runs_and_learns():
    problem = zoo.from_net(zoo.mlp(4, 6, 3), (32, 4), "categorical")
    ng = problem.build(method="kfac")
    params, state, rng, losses = problem.params, ng.init(problem.params, damping=1e-2, ema=0.95), zoo.generator(), []
    for step in range(30):
        nat, state, info = ng.step(
            params, state, problem.batch, generator=rng, update=step % 2 == 0, invert=step % 4 == 0, inner=True
        )
        nat = ff.kl_clip(nat, info.inner, lr=0.3, kl_bound=1e-1)
        params = ff.tree.add(params, nat, scale=-0.3)
        losses.append(info.loss.item())
    assert losses[-1] < 0.8 * losses[0]


# --------------------------------------------------------------------------------------------------- KL clip, init


@given(st.floats(-10, 10), st.floats(1e-3, 10), st.floats(1e-4, 10))
def test_kl_clip_is_its_formula(inner, lr, bound):
    nat = {"w": torch.tensor([1.0, -2.0], dtype=torch.float64)}
    factor = 1.0 if inner == 0 else min(1.0, (bound / (lr**2 * abs(inner))) ** 0.5)
    clipped = ff.kl_clip(nat, torch.tensor(inner, dtype=torch.float64), lr=lr, kl_bound=bound)
    close(clipped, {"w": factor * nat["w"]})
    assert nat["w"].tolist() == [1, -2]


def test_kl_clip_takes_its_bound_under_the_former_name_too():
    nat, inner = {"w": torch.tensor([3.0])}, torch.tensor(5.0)
    assert torch.equal(
        ff.kl_clip(nat, inner, lr=2.0, bound=0.1)["w"], ff.kl_clip(nat, inner, lr=2.0, kl_bound=0.1)["w"]
    )
    for bounds in ({}, {"bound": 0.1, "kl_bound": 0.1}):
        with pytest.raises(ff.errors.HyperparameterError, match="needs one bound: pass kl_bound="):
            ff.kl_clip(nat, inner, lr=2.0, **bounds)


def test_a_step_is_not_ok_if_the_batch_of_its_gradient_is_not_though_that_of_its_statistics_is():
    x, y, net = torch.ones(4, 3), torch.tensor([0, 1, 0, 99]), torch.nn.Linear(3, 2)
    model, params, context = ff.functional(net)
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), fisher="type2", context=context)
    whole, part = (ng.stats(params, (x[:n], y[:n]), context=context) for n in (4, 3))
    state = ng.init(params)
    for grads, stats in ((whole, part), (part, whole)):
        _, new, info = ng.advance(state, grads, stats)
        assert not any(info.ok.values()) and int(new.count) == 0
        with pytest.raises(ff.errors.TargetError):
            ff.check(info)
    _, new, info = ng.advance(state, part, part)
    assert all(info.ok.values()) and int(new.count) == 1


def test_kl_clip_bounds_the_quadratic_change():
    """lr² |⟨∇, ν·nat⟩ ν| ≤ bound after clipping, with equality when it acts."""
    nat, inner = {"w": torch.tensor([3.0])}, torch.tensor(5.0)
    clipped = ff.kl_clip(nat, inner, lr=2.0, kl_bound=0.1)
    nu = clipped["w"].item() / 3.0
    assert abs(4.0 * 5.0 * nu**2 - 0.1) < 1e-6


def test_init_holds_tensors_without_dimensions():
    problem = zoo.pick("mlp-categorical")
    state = problem.build().init(problem.params, damping=0.2, ema=0.7)
    assert (state.damping.shape, state.ema.shape, state.count.shape) == ((), (), ())
    assert (state.damping.item(), state.ema.item(), int(state.count)) == (0.2, 0.7, 0)
    assert set(state.factors) == set(state.inverses) == {"0", "2"}
    default = problem.build().init(problem.params)
    assert (default.damping.item(), default.ema.item()) == (1e-3, 0.95)
    given = problem.build().init(problem.params, damping=torch.tensor(0.2), ema=torch.tensor(0.7))
    assert abs(given.damping.item() - 0.2) < 1e-6


def test_count_counts_updates_only():
    problem = zoo.pick("mlp-categorical")
    run = zoo.sampled(problem)
    state = run.ng.init(problem.params)
    state = run.ng.invert(run.ng.update(run.ng.update(state, run.stats)[0], run.stats)[0])[0]
    assert int(state.count) == 2


# ------------------------------------------------------------------------------------------------------ bad values


def test_one_bad_layer_is_named_and_the_whole_state_is_kept():
    """A layer whose second moment overflows, while the loss is finite."""
    problem = zoo.pick("scale-vector")

    def model(params, x):
        small = {name: leaf for name, leaf in params.items() if name != "big.weight"}
        return problem.model(small, x[:, :3]) + torch.nn.functional.linear(x[:, 3:], params["big.weight"])

    params = {**problem.params, "big.weight": torch.zeros(2, 1, dtype=torch.float64)}
    x = torch.cat([problem.x, torch.ones(5, 1, dtype=torch.float64)], dim=1)
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), fisher="type2")
    _, state, info = ng.step(params, ng.init(params, damping=0.1), (x, problem.y))
    ff.check(info)
    huge = torch.cat([problem.x, torch.full((5, 1), 1e200, dtype=torch.float64)], dim=1)
    _, after, info = ng.step(params, state, (huge, problem.y))
    assert [key for key, ok in info.ok.items() if not ok] == ["big"]
    assert equal(after, state)
    with pytest.raises(errors.NonFiniteError, match="big"):
        ff.check(info)


def test_check_names_the_cause():
    problem = zoo.pick("mlp-categorical")
    ng = problem.build(fisher="type2")
    state = ng.init(problem.params)
    nan = problem.x.clone()
    nan[0] = torch.nan
    for batch, error in (
        ((nan, problem.y), errors.NonFiniteError),
        ((problem.x, problem.y + 3), errors.TargetError),
        ((problem.x, problem.y - 3), errors.TargetError),
    ):
        _, after, info = ng.step(problem.params, state, batch)
        assert equal(after, state)
        with pytest.raises(error):
            ff.check(info)


def test_bernoulli_targets_lie_between_zero_and_one():
    problem = zoo.pick("mlp-bernoulli")
    ng = problem.build(fisher="type2")
    _, _, info = ng.step(problem.params, ng.init(problem.params), (problem.x, problem.y + 1))
    with pytest.raises(errors.TargetError):
        ff.check(info)


@pytest.mark.parametrize("form", ["factored", "eigen"])
def test_zero_damping_on_singular_factors_is_no_silent_garbage(form):
    """For one datum F = ∇∇ᵀ in every block, and ∇ᵀ F⁺ ∇ = 1; in eigenvectors, noise is of the size of this step."""
    problem = zoo.pick("one-datum")
    ng = problem.build(fisher="empirical", method=ff.kfac(damping_form=form))
    nat, _, info = ng.step(problem.params, ng.init(problem.params, damping=0.0), problem.batch)
    ff.check(info)
    found, grads = (ng.layout.matrices(each) for each in (nat, oracles.mean_gradient(problem)))
    for key, gradient in grads.items():
        assert torch.isfinite(found[key]).all()
        if form == "eigen":
            close((found[key] * gradient).sum(), torch.ones((), dtype=torch.float64), tol=1e-6)
            assert found[key].norm() < 10 / gradient.norm()


@pytest.mark.parametrize(
    "method", [*ff.METHODS, ff.two_level(coarse="residual")], ids=lambda m: getattr(m, "coarse", m)
)
def test_a_bad_batch_of_another_size_does_not_change_the_next_step(method):
    """The statistics of the exact and the two-level methods have the shape of the batch."""
    problem = zoo.pick("mlp-categorical")
    ng = problem.build(method=method, fisher="type2")
    params, (x, y) = problem.params, problem.batch
    few = ff.tree.map(lambda leaf: leaf[:3], (x, y))
    bad = ff.tree.map(lambda leaf: leaf * torch.nan, few[0]), few[1]

    def then(state):
        return ng.step(params, state, (x, y), update=False, invert=False)

    empty = ng.init(params, damping=0.1)
    assert equal(then(ng.step(params, empty, bad)[1])[0], then(empty)[0])
    _, warm, _ = ng.step(params, empty, (x, y))
    assert equal(ng.step(params, warm, bad)[1], warm)

    both = torch.stack([bad[0], few[0]]), ff.members.repeat(few[1], 2)
    _, states, info = torch.vmap(lambda s, batch: ng.step(params, s, batch))(ff.members.repeat(warm, 2), both)
    assert ff.members.sound(info).tolist() == [False, True]
    nat, _, info = then(ff.members.take(states, 0))
    assert not torch.stack(list(info.ok.values())).all() or equal(nat, then(warm)[0])


def test_a_failed_invert_keeps_the_old_inverses():
    problem = zoo.pick("one-datum")
    run = zoo.sampled(problem, "empirical", method=ff.kfac(damping_form="eigen"))
    state = run.ng.invert(run.ng.update(run.ng.init(problem.params, damping=1.0), run.stats)[0])[0]
    state = state._replace(damping=-torch.ones_like(state.damping))
    after, info = run.ng.invert(state)
    assert not any(bool(ok) for ok in info.ok.values()) and equal(after, state)


def test_overflowing_half_precision_sums_raise_no_false_alarm():
    """100,000 entries of size 1 are finite, though their sum is no float16."""
    problem = zoo.from_net(zoo.mlp(100, 2), (1024, 100), "categorical")
    problem = zoo.to(zoo.replace(problem, x=torch.ones_like(problem.x)), torch.float16)
    ng = problem.build(fisher="empirical")
    nat, _, info = ng.step(problem.params, ng.init(problem.params, damping=0.1), problem.batch)
    ff.check(info)


# ------------------------------------------------------------------------------------------------ the surroundings


def test_gradient_modes_of_the_caller_do_not_matter():
    problem = zoo.pick("scale-vector")
    ng = problem.build(fisher="type2")
    state = ng.init(problem.params, damping=0.1)
    plain = ng.step(problem.params, state, problem.batch, inner=True)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in problem.params.items()}
    with torch.no_grad():
        silent = ng.step(problem.params, state, problem.batch, inner=True)
    recorded = ng.step(leaves, state, problem.batch, inner=True)
    assert equal(silent, plain)
    # torch may fold the products of recorded tensors in another way, so that the last bit differs
    close(ff.tree.flatten(recorded), ff.tree.flatten(plain), tol=1e-14)
    assert all(leaf.grad is None for leaf in leaves.values())


@pytest.mark.parametrize("method", list(ff.METHODS))
def test_a_state_has_no_graph_of_the_steps_before(method):
    """Parameters that require grad would otherwise keep every earlier step in memory."""
    problem = zoo.pick("mlp-categorical")
    ng = problem.build(method=method, fisher="type2")
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in problem.params.items()}
    nat, state, info = ng.step(leaves, ng.init(leaves), problem.batch)
    updated, _ = ng.update(state, ng.stats(leaves, problem.batch))
    fitted, _ = ng.fit(leaves, [problem.batch, problem.batch])
    for each in (state, updated, ng.invert(updated)[0], fitted):
        assert not any(leaf.requires_grad for leaf in ff.tree.leaves(each))
    assert all(leaf.requires_grad for leaf in nat.values()) and info.loss.requires_grad


@pytest.mark.parametrize("method", ["ekfac", "exactNG"])
def test_a_step_is_differentiable_in_parameters_and_damping(method):
    """Along a line, against central differences: torch.func for the parameters, autograd for the damping too."""
    problem = zoo.pick("mlp-categorical")
    ng = problem.build(method=method, fisher="type2")
    way, h = zoo.random_tree(problem.params), 1e-5

    def slope(t, λ):
        params = ff.tree.add(problem.params, way, scale=t)
        return vec(ng.step(params, ng.init(params, damping=λ), problem.batch)[0]).square().sum()

    t, λ = torch.zeros((), dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    found = torch.func.grad(slope, (0, 1))(t, λ)
    recorded = λ.clone().requires_grad_()
    (own,) = torch.autograd.grad(slope(t, recorded), recorded)
    close(found[0], (slope(t + h, λ) - slope(t - h, λ)) / (2 * h), tol=1e-5)
    close(found[1], (slope(t, λ + h) - slope(t, λ - h)) / (2 * h), tol=1e-5)
    close(own, found[1])


@pytest.mark.parametrize("builder", ["kfac_corrected", "two_level", "exact"])
def test_the_name_of_a_builder_is_a_name_of_its_method(builder):
    problem = zoo.pick("mlp-categorical")
    assert problem.build(method=builder).method == getattr(ff, builder)()
    assert builder not in ff.METHODS, "a loop over METHODS runs nothing twice"


# --------------------------------------------------------------------------------------- what belongs to another net


@pytest.mark.parametrize("method", [name for name in ff.METHODS if name != "exactNG"])  # its sizes are the batch's
def test_a_state_of_other_widths_or_another_type_raises(method):
    """Equal names and layers are not enough: factors would be broadcast to other widths silently."""

    def build(width, dtype):
        params = {"a": torch.ones(width, 4, dtype=dtype)}
        x = torch.ones(5, 4, dtype=dtype)
        made = ff.natural_gradient(
            lambda p, x: x @ p["a"].T, params, x, likelihood=ff.Gaussian(), method=method, fisher="type2"
        )
        return made, params, (x, x[:, :width])

    ng, params, batch = build(3, torch.float64)
    for width, dtype in ((1, torch.float64), (3, torch.float32)):
        other, others, examples = build(width, dtype)
        _, foreign, _ = other.step(others, other.init(others), examples)
        with pytest.raises(errors.StructureError, match="another method, net or dtype"):
            ng.step(params, foreign, batch)


def test_a_call_without_a_state_checks_its_statistics():
    problem = zoo.pick("mlp-categorical")
    ng = problem.build(fisher="type2")
    stats = ng.stats(problem.params, (problem.x, problem.y + 3))
    with pytest.raises(errors.TargetError):
        ng(problem.params, stats)
    good = ng.stats(problem.params, problem.batch)
    batched = torch.vmap(lambda y: ng(problem.params, ng.stats(problem.params, (problem.x, y))))
    both = batched(torch.stack([problem.y, problem.y + 3]))
    close({name: leaf[0] for name, leaf in both.items()}, ng(problem.params, good), tol=1e-12)
    assert all(leaf[1].isnan().all() for leaf in both.values())
