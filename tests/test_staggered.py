"""Refreshes of a few blocks at a time: after a period they are one refresh of all."""

import pytest
import torch
from torch import nn

import fisherfn as ff
from fisherfn.methods import METHODS
from fisherfn.shares import costs
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


# ------------------------------------------------------------------------------------------------- the cadence


def test_every_block_once_per_period_and_never_with_statistics():
    ng, _, _ = small()
    cadence = ff.staggered(ng, update_every=2, invert_every=6)
    assert cadence(0) == (True, True)
    dues = [cadence(step) for step in range(6, 18)]
    assert [due.update for due in dues] == [True, False] * 6
    assert all(not due.invert for due in dues if due.update)
    for period in (dues[:6], dues[6:]):
        assert sorted(key for due in period for key in due.invert) == sorted(keys_of(ng))


def test_groups_cost_the_same():
    """Sixteen equal layers and a wide one, in five of six steps: no step has more than the wide one costs."""
    ng, _, _ = small(widths=(*[4] * 17, 9))
    groups = ff.staggered(ng, update_every=6, invert_every=6).groups
    work = costs(ng.layout.block_shapes, 100)
    shares = [sum(work[key] for key in group) for group in groups]
    largest = max(work.values())
    assert shares[0] == 0 and max(shares) == largest
    assert max(shares[1:]) - min(shares[1:]) <= largest


def test_blocks_of_ekfac_are_inverted_where_their_eigenvectors_are_found():
    ng, params, batches = small("ekfac")
    cadence = ff.staggered(ng, update_every=2, invert_every=6)
    state = ng.init(params, damping=0.1)
    bases = []
    for step in range(7):
        _, state, info = ng.step(params, state, batches[step // 2 % 2], **cadence(step)._asdict())
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
