"""Refreshes of a few blocks at a time: after a period they are one refresh of all."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import fisherfn as ff
from fisherfn.methods import METHODS
from fisherfn.shares import MOVED, costs, dealt
from tests.oracles import close

SEPARATE = [name for name, build in METHODS.items() if not build().couples]


def small(method="kfac", widths=(5, 4, 3, 2)):
    """A net of three layers with statistics of two batches."""
    generator = torch.Generator().manual_seed(0)
    layers = [nn.Linear(i, o, dtype=torch.float64) for i, o in zip(widths, widths[1:], strict=False)]
    model, params, context = ff.functional(nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh()))))
    x = torch.randn(2, 6, widths[0], generator=generator, dtype=torch.float64)
    y = torch.randn(2, 6, widths[-1], generator=generator, dtype=torch.float64)
    ng = ff.natural_gradient(
        lambda params, x: model(params, x, context)[0],
        params,
        x[0],
        likelihood=ff.Gaussian(),
        method=method,
        fisher="empirical",
    )
    return ng, params, list(zip(x, y, strict=True))


def keys_of(ng):
    return [block.key for block in ng.layout.blocks]


@pytest.mark.parametrize("method", SEPARATE)
def test_groups_one_after_another_are_one_refresh_of_all(method):
    ng, params, batches = small(method)
    _, state, _ = ng.step(params, ng.init(params, damping=0.1), batches[0])
    state, _ = ng.update(state, ng.stats(params, batches[1]))
    state = state._replace(damping=torch.full_like(state.damping, 0.3))
    expected, whole = ng.invert(state)
    first, *rest = keys_of(ng)
    part, info = ng.invert(state, only={first})
    for key in rest:
        assert part.inverses[key] is state.inverses[key]
    close(ff.tree.flatten(part.inverses[first]), ff.tree.flatten(expected.inverses[first]))
    assert info.ok.keys() == whole.ok.keys() and all(info.ok.values())
    assert all(measured.keys() == {first} for measured in info.diagnostics.values())
    full, _ = ng.invert(part, only=rest)
    close(ff.tree.flatten(full), ff.tree.flatten(expected))


@pytest.mark.parametrize("method", ["kfac", "ekfac", "exactNG", "twolevel_kfac"])
@pytest.mark.parametrize("nothing", [set(), [], ()], ids=str)
def test_a_refresh_of_no_block_returns_the_state(method, nothing):
    """Other statistics and another λ, so that a refresh of any block would change the state."""
    ng, params, batches = small(method)
    _, state, _ = ng.step(params, ng.init(params, damping=0.1), batches[0])
    state = state._replace(damping=torch.full_like(state.damping, 0.3))
    without = ng.stats(params, batches[1], curvature=nothing)
    for new, info in (
        ng.invert(state, only=nothing),
        ng.update(state, ng.stats(params, batches[1]), only=nothing),
        ng.update(state, without, only=nothing),
    ):
        ff.check(info)
        assert list(info.ok) == keys_of(ng)
        for old, kept in zip(ff.tree.leaves(state), ff.tree.leaves(new), strict=True):
            assert torch.equal(old, kept)
    with pytest.raises(ff.errors.StructureError, match="no Fisher samples"):
        ng.update(state, without)


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_a_step_inverts_these_blocks_after_its_update(method):
    ng, params, batches = small(method)
    _, state, _ = ng.step(params, ng.init(params, damping=0.1), batches[0])
    first, second, _ = keys_of(ng)
    nat, new, _ = ng.step(params, state, batches[1], invert=frozenset({first}))
    _, none, _ = ng.step(params, state, batches[1], invert=False)
    _, every, _ = ng.step(params, state, batches[1], invert=True)
    for key, wanted in ((first, every), (second, none)):
        close(ff.tree.flatten(new.factors[key]), ff.tree.flatten(wanted.factors[key]))
        close(ff.tree.flatten(new.inverses[key]), ff.tree.flatten(wanted.inverses[key]))
    close(nat, ng.precondition(new, ng.stats(params, batches[1])))
    _, empty, _ = ng.step(params, state, batches[1], invert=frozenset())
    close(ff.tree.flatten(empty), ff.tree.flatten(none))


def test_a_block_that_fails_leaves_the_whole_state():
    ng, params, batches = small()
    _, state, _ = ng.step(params, ng.init(params, damping=0.1), batches[0])
    first, second, _ = keys_of(ng)
    broken = state._replace(factors=state.factors | {first: ff.tree.scale(state.factors[first], float("nan"))})
    kept, info = ng.invert(broken, only={first})
    leaves = (ff.tree.leaves(each.inverses) for each in (kept, state))
    assert all(a is b for a, b in zip(*leaves, strict=True))
    assert not info.ok[first] and info.ok[second]
    assert all(ng.invert(broken, only={second})[1].ok.values())


def test_vmapped_and_compiled_steps_are_the_plain_ones():
    ng, params, batches = small()
    _, state, _ = ng.step(params, ng.init(params, damping=0.1), batches[0])
    group = frozenset(keys_of(ng)[1:])
    _, expected, _ = ng.step(params, state, batches[1], invert=group)
    _, found, _ = ff.compile(ng.step, backend="eager")(params, state, batches[1], invert=group)
    close(ff.tree.flatten(found), ff.tree.flatten(expected))
    dampings = torch.tensor([0.1, 0.7], dtype=torch.float64)

    def member(damping):
        return ng.step(params, state._replace(damping=damping), batches[1], invert=group)[0]

    many = torch.vmap(member)(dampings)
    for index, damping in enumerate(dampings):
        close({name: leaf[index] for name, leaf in many.items()}, member(damping))


# ------------------------------------------------------------------------------------------- statistics of some blocks


@pytest.mark.parametrize("method", SEPARATE)
def test_a_block_updated_in_some_steps_is_that_of_a_run_in_which_all_are(method):
    """Batches of 6, 2 and 4 examples: each block counts its own updates, so its average starts with its first one."""
    ng, params, batches = small(method)
    sizes = (6, 2, 4, 6, 3)
    given = [tuple(part[:size] for part in batches[step % 2]) for step, size in enumerate(sizes)]
    due = dict(zip(keys_of(ng), ({0, 2, 3}, {1, 4}, {0, 1, 2, 3, 4}), strict=True))
    assert len(due) == 3

    def run(which):
        state = ng.init(params, damping=0.1, ema=0.6)
        for step, batch in enumerate(given):
            if which(step):
                _, state, info = ng.step(params, state, batch, update=which(step), invert=which(step))
                ff.check(info)
        return state

    mixed = run(lambda step: frozenset(key for key in due if step in due[key]))
    for place, (key, steps) in enumerate(due.items()):
        alone = run(lambda step, steps=steps: step in steps)
        close(ff.tree.flatten(mixed.factors[key]), ff.tree.flatten(alone.factors[key]))
        close(ff.tree.flatten(mixed.inverses[key]), ff.tree.flatten(alone.inverses[key]))
        assert int(mixed.block_count[place]) == len(steps)
        close(mixed.block_examples[place], alone.examples)
    assert int(mixed.count) == len(sizes)


@pytest.mark.parametrize("method", ["kfac", "kpsvd", "ekfac"])
def test_updates_of_some_blocks_leave_the_others(method):
    ng, params, batches = small(method)
    state, _ = ng.update(ng.init(params, damping=0.1), ng.stats(params, batches[0]))
    first, *rest = keys_of(ng)
    some, whole = ng.stats(params, batches[1], curvature={first}), ng.stats(params, batches[1])
    expected, _ = ng.update(state, whole)
    assert some.sampled == {first} and whole.sampled is True
    for found, info in (ng.update(state, some), ng.update(state, whole, only=[first])):
        close(ff.tree.flatten(found.factors[first]), ff.tree.flatten(expected.factors[first]))
        assert all(found.factors[key] is state.factors[key] for key in rest)
        assert info.ok.keys() == set(keys_of(ng)) and all(info.ok.values())
    close(ff.tree.flatten(some.grads), ff.tree.flatten(whole.grads))
    _, none, _ = ng.step(params, state, batches[1], update=frozenset(), invert=False)
    assert none is state


def test_no_tensor_is_kept_for_blocks_that_are_not_updated():
    ng, params, batches = small()
    first, *rest = keys_of(ng)
    ng = replace(ng, fisher_kind="type2")
    for chunk_size in (None, 4):
        stats = ng.stats(params, batches[0], curvature={first}, chunk_size=chunk_size)
        assert [len(stats.layers[key].grads) for key in (first, *rest)] == [1, 0, 0]
    again = ff.tree.map(lambda leaf: leaf, ff.join([stats, stats]))
    assert again.sampled == {first} and again.examples == 12


def test_statistics_of_some_blocks_are_of_these_in_every_term():
    """A weight that is a layer in both terms, and a bias that only one of them has."""
    ng, params, batches = small()
    x, y = batches[0]

    def first_layer(params, x):
        return nn.functional.linear(x, params["0.weight"])

    terms = {
        "net": ff.Term(ng.model, x, ff.Gaussian()),
        "layer": ff.Term(first_layer, x, ff.Gaussian(), weight=2.0),
    }
    both = ff.sum_of_terms(terms, params)
    batch = {"net": (x, y), "layer": (x[:3], x[:3, :4])}
    _, state, _ = both.step(params, both.init(params, damping=0.1), batch)
    batch = {"net": (x[1:], y[1:]), "layer": (x[3:], x[3:, :4])}
    _, expected, _ = both.step(params, state, batch)
    for key in keys_of(both):
        _, found, info = both.step(params, state, batch, update={key}, invert={key})
        ff.check(info)
        for other in keys_of(both):
            wanted = expected if other == key else state
            close(ff.tree.flatten(found.factors[other]), ff.tree.flatten(wanted.factors[other]))
            close(ff.tree.flatten(found.inverses[other]), ff.tree.flatten(wanted.inverses[other]))
    first, second, _ = keys_of(both)
    assert both.stats(params, batch, curvature={first}).terms["net"].sampled == {first}
    assert both.stats(params, batch, curvature={second}).terms["layer"].sampled is False
    assert both.stats(params, batch, curvature=set()).sampled is False


def test_vmapped_and_compiled_updates_of_some_blocks_are_the_plain_ones():
    ng, params, batches = small()
    _, state, _ = ng.step(params, ng.init(params, damping=0.1), batches[0])
    group = frozenset(keys_of(ng)[1:])
    _, expected, _ = ng.step(params, state, batches[1], update=group, invert=group)
    compiled = ff.compile(ng.step, backend="eager")
    for _ in range(2):
        _, found, _ = compiled(params, state, batches[1], update=group, invert=group)
        close(ff.tree.flatten(found), ff.tree.flatten(expected))
    scales = torch.tensor([1.0, 0.5], dtype=torch.float64)

    def member(scale):
        return ng.step(params, state, (scale * batches[1][0], batches[1][1]), update=group, invert=group)[1].factors

    many = torch.vmap(member)(scales)
    for index, scale in enumerate(scales):
        close({name: leaf[index] for name, leaf in ff.tree.flatten(many).items()}, ff.tree.flatten(member(scale)))


def test_a_block_that_fails_its_update_leaves_the_whole_state():
    ng, params, batches = small()
    _, state, _ = ng.step(params, ng.init(params, damping=0.1), batches[0])
    first, second, _ = keys_of(ng)
    stats = ng.stats(params, batches[1], curvature={first})
    broken = replace(
        stats, layers=stats.layers | {first: stats.layers[first]._replace(grads=(stats.layers[first].grads[0] / 0,))}
    )
    kept, info = ng.update(state, broken)
    assert not info.ok[first] and info.ok[second]
    assert all(a is b for a, b in zip(ff.tree.leaves(kept), ff.tree.leaves(state), strict=True))


def test_a_state_from_a_version_without_counts_of_blocks_goes_on():
    ng, params, batches = small()
    _, state, _ = ng.step(params, ng.init(params, damping=0.1), batches[0])
    old = ff.State(*state[:6])
    _, expected, _ = ng.step(params, state, batches[1], update={keys_of(ng)[0]})
    _, found, _ = ng.step(params, old, batches[1], update={keys_of(ng)[0]})
    close(ff.tree.flatten(found), ff.tree.flatten(expected))


def test_updates_of_some_blocks_that_cannot_be_are_typed_errors():
    ng, params, batches = small()
    state, (first, second, _) = ng.init(params), keys_of(ng)
    with pytest.raises(ff.errors.StructureError, match="keys '0', .*got 'no'"):
        ng.step(params, state, batches[0], update={"no"})
    with pytest.raises(ff.errors.StructureError, match="keys '0', .*got 'no'"):
        ng.stats(params, batches[0], curvature={"no"})
    with pytest.raises(ff.errors.StructureError, match="got '0'"):
        ng.step(params, state, batches[0], update="0")
    some = ng.stats(params, batches[0], curvature={first})
    with pytest.raises(ff.errors.StructureError, match=f"{second!r} has no Fisher samples.*other blocks"):
        ng.update(state, some, only={second})
    with pytest.raises(ff.errors.StructureError, match="no Fisher samples"):
        ng.fisher(some)
    with pytest.raises(ff.errors.StructureError, match="different nets or kinds"):
        ff.join([some, ng.stats(params, batches[0])])
    with pytest.raises(ff.errors.StructureError, match="all blocks"):
        ng.step_from(state, some, some, damping=lambda new: new.damping)
    for name in ("exactNG", "twolevel_kfac"):
        coupled, params, batches = small(name)
        state, keys = coupled.init(params), set(keys_of(coupled))
        with pytest.raises(ff.errors.StructureError, match=f"{name} couples"):
            coupled.step(params, state, batches[0], update=keys)
        with pytest.raises(ff.errors.StructureError, match=f"{name} couples"):
            coupled.update(state, coupled.stats(params, batches[0]), only=keys)
        with pytest.raises(ff.errors.StructureError, match=f"{name} couples"):
            coupled.update(state, coupled.stats(params, batches[0], curvature={"0"}))


# ------------------------------------------------------------------------------------------------- the cadence


def test_every_block_once_per_period_and_never_with_statistics_that_are_taken_together():
    ng, _, _ = small()
    cadence = ff.staggered(ng, update_every=2, invert_every=6, stagger_statistics=False)
    assert cadence(0) == (True, True)
    dues = [cadence(step) for step in range(6, 18)]
    assert [due.update for due in dues] == [True, False] * 6
    assert all(not due.invert for due in dues if due.update)
    for period in (dues[:6], dues[6:]):
        assert sorted(key for due in period for key in due.invert) == sorted(keys_of(ng))


def test_groups_cost_the_same():
    """Sixteen equal layers and a wide one, in five of six steps: no step has more than the wide one costs."""
    ng, _, _ = small(widths=(*[4] * 17, 9))
    groups = ff.staggered(ng, update_every=6, invert_every=6, stagger_statistics=False).groups
    work = costs(ng.layout.block_shapes, 100)
    shares = [sum(work[key] for key in group) for group in groups]
    largest = max(work.values())
    assert shares[0] == 0 and max(shares) == largest
    assert max(shares[1:]) - min(shares[1:]) <= largest


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_every_block_is_updated_and_inverted_as_often_as_by_a_usual_cadence(method):
    """Sixteen layers and a wide one; the loads are recomputed from the groups, by the definition of the costs."""
    ng, _, _ = small(method, widths=(*[4] * 17, 9))
    every, period, keys = 3, 6, keys_of(ng)
    shapes = ng.layout.block_shapes
    cadence = ff.staggered(ng, update_every=every, invert_every=period, examples=5)
    assert cadence(0) == (True, True)
    dues = [cadence(step) for step in range(period, 3 * period)]
    for start in range(0, len(dues), every):
        assert sorted(key for due in dues[start : start + every] for key in due.update) == sorted(keys)
    for start in range(0, len(dues), period):
        assert sorted(key for due in dues[start : start + period] for key in due.invert) == sorted(keys)
    if method == "ekfac":
        assert all(due.invert <= due.update for due in dues)
    inversions = {key: i**3.0 + o**3.0 for key, (_, o, i, _) in shapes.items()}
    moments = {key: 5.0 * (i**2 + o**2 + MOVED * (i + o)) for key, (_, o, i, _) in shapes.items()}
    backward = sum(5.0 * (i * o + MOVED * (i + o)) for _, o, i, _ in shapes.values())

    def longest(groups):
        return max(
            backward * bool(update) + sum(moments[key] for key in update) + sum(inversions[key] for key in invert)
            for update, invert in groups
        )

    together = [(set(keys) if step % every == 0 else (), set(keys) if step == 0 else ()) for step in range(period)]
    assert longest(dues[:period]) < 0.7 * longest(together)
    found = dealt(moments, inversions, backward, every, period, method == "ekfac")
    assert longest(zip(found.updates, found.inversions, strict=True)) == pytest.approx(found.longest)
    assert [*zip(found.updates, found.inversions, strict=True)] == [tuple(due) for due in dues[:period]]


def test_an_expensive_backward_pass_is_made_once_per_interval():
    """The number of steps with statistics is the smallest one that does not make the longest step longer."""
    moments, inversions = dict.fromkeys("abcd", 1.0), dict.fromkeys("abcd", 0.0)
    for backward, steps in ((1000.0, 1), (0.0, 4)):
        found = dealt(moments, inversions, backward, 4, 4)
        assert sum(map(bool, found.updates)) == steps
        assert found.longest == backward + 4 / steps
    assert sum(map(bool, dealt(moments, dict.fromkeys("abcd", 50.0), 0.5, 4, 4).updates)) <= 2


def test_statistics_of_a_layer_cost_more_with_more_positions():
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5))
    model, params, context = ff.functional(net)
    x = torch.randn(3, 2, 6, 6, generator=generator)
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Gaussian(), context=context)
    stats = ng.stats(params, (x, torch.zeros(3, 5)), context=context, generator=generator)
    for block in ng.layout.blocks:
        assert block.positions == stats.lazy_tap(block.key).sizes.t


def test_blocks_of_ekfac_are_inverted_where_their_eigenvectors_are_found():
    ng, params, batches = small("ekfac")
    cadence = ff.staggered(ng, update_every=2, invert_every=6)
    state = ng.init(params, damping=0.1)
    bases = []
    for step in range(7):
        x, y = batches[step % 2]
        _, state, info = ng.step(params, state, ((1 + step) * x, y), **cadence(step)._asdict())
        ff.check(info)
        bases.append({key: factors.QA for key, factors in state.factors.items()})
    assert all(due.update for due in map(cadence, range(12)) if due.invert)
    for key in keys_of(ng):
        assert sum(not torch.equal(now[key], before[key]) for before, now in zip(bases, bases[1:], strict=False)) == 1


def test_a_resumed_run_goes_on_with_the_same_blocks():
    ng, params, batches = small()
    cadence = ff.staggered(ng, update_every=1, invert_every=3)

    def run(state, steps):
        for step in steps:
            _, state, _ = ng.step(params, state, batches[step % 2], **cadence(step)._asdict())
        return state

    straight = run(ng.init(params, damping=0.1), range(7))
    saved = ff.tree.flatten(run(ng.init(params, damping=0.1), range(4)))
    resumed = run(ff.tree.unflatten(ng.init(params, damping=0.1), saved), range(4, 7))
    assert all(torch.equal(a, b) for a, b in zip(ff.tree.leaves(resumed), ff.tree.leaves(straight), strict=True))


def test_errors_teach():
    ng, params, batches = small()
    state = ng.init(params)
    with pytest.raises(ff.errors.StructureError, match="keys '0', .*got 'no'"):
        ng.invert(state, only={"no"})
    with pytest.raises(ff.errors.StructureError, match="got '0'"):
        ng.step(params, state, batches[0], invert="0")
    with pytest.raises(ff.errors.StructureError, match="all blocks"):
        ng.step_from(state, ng.stats(params, batches[0]), invert={"0"}, damping=lambda new: new.damping)
    for name in ("exactNG", "twolevel_kfac"):
        coupled, params, batches = small(name)
        with pytest.raises(ff.errors.StructureError, match="couples"):
            coupled.invert(coupled.init(params), only=set(keys_of(coupled)))
        with pytest.raises(ff.errors.StructureError, match=r"couples.*Cadence"):
            ff.staggered(coupled)
    with pytest.raises(ff.errors.HyperparameterError, match="multiple"):
        ff.staggered(ng, update_every=3, invert_every=10)
    with pytest.raises(ff.errors.HyperparameterError, match="update_every"):
        ff.staggered(ng, update_every=0)
    with pytest.raises(ff.errors.HyperparameterError, match="examples"):
        ff.staggered(ng, examples=0)
