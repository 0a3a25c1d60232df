"""Every member of a group is its own single run; a member that diverges leaves the others bit for bit as they are."""

import dataclasses
import functools

import pytest
import torch
from torch import nn

import fisherfn as ff
from common import loop
from common.sweep.evaluation import measure
from common.sweep.group import Group, Problem
from common.train_config import TrainConfig
from common.trainer import numbers, optimizer_with

STEPS, BATCH = 10, 6  # two epochs; every number is updated twice, every inverse three times
FIXED = {"lr": 0.3, "damping": 0.05, "kl_bound": 0.01}


@functools.cache
def task(seed, init_params, kind, bad=False):
    """A classifier or an autoencoder in float64, whose data, order and start depend on the seed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    hidden = {
        "plain": [nn.Linear(5, 4), nn.Tanh()],
        "norm": [nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.25)],
        "code": [nn.Linear(5, 4), nn.Tanh()],
        "image": [nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 2, 2), nn.ReLU(), nn.Flatten()],
    }[kind]
    width = 8 if kind == "image" else 4
    net = nn.Sequential(*hidden, nn.Linear(width, 5 if kind == "code" else 3)).double()
    for parameter in net.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    if bad:
        net[0].weight.data[0, 0] = torch.nan
    y = x.sigmoid() if kind == "code" else torch.randint(3, (30,), generator=generator)
    model, params, context = ff.functional(net)
    predict, _, _ = ff.functional(net.eval())
    likelihood = ff.Bernoulli() if kind == "code" else ff.Categorical()
    return loop.Task(model, predict, params, context, likelihood, (x, y), (x, y), 1, drops=kind == "norm")


def problem(config, rows, kind="plain", bad=()):
    return Problem(config, rows, lambda c: task(c.seed, c.init_params, kind, c.seed in bad))


def grouped(config, rows, kind="plain", bad=(), epochs=STEPS // 5):
    group = Group(problem(config, rows, kind, bad), range(len(rows)))
    at = group.start()
    for _ in range(epochs):
        at = group.epoch(at)
    return group, at


def alone(config, row, kind, ng, epochs=STEPS // 5):
    """The last epoch of a single run, with the trainer's loop; the net and its layout are the group's."""
    config = dataclasses.replace(config, **row)
    its = task(config.seed, config.init_params, kind)
    settings = loop.Settings(epochs, config.batch_size, config.seed, progress=False)
    optimizer = optimizer_with(config, its, ng, numbers(config))
    *_, last = loop.train(its, optimizer, loop.start(its, optimizer), settings)
    return last


def config(optim, **given):
    return TrainConfig(optim=optim, batch_size=BATCH, update_every=2, invert_every=4, **given)


ROWS = {
    "fixed": [{"lr": 0.3, "damping": 0.05, "seed": 0}, {"lr": 0.1, "damping": 0.2, "seed": 1}],
    "adaptive": [{"ema": 0.9, "seed": 0}, {"ema": 0.8, "seed": 1}],
    "first-order": [{"lr": 0.05, "seed": 0}, {"lr": 0.2, "seed": 1}],
}
CASES = [
    *[(method, "fixed", "norm") for method in ff.METHODS if method != "exactNG"],
    *[(method, "adaptive", "code") for method in ff.METHODS],
    ("exactNG", "fixed", "plain"),
    ("kfac", "adaptive", "norm"),
    ("kfac", "adaptive", "plain"),
    ("kfac", "fixed", "image"),
    ("sgd", "first-order", "norm"),
    ("adam", "first-order", "code"),
]


@pytest.mark.parametrize(("optim", "given", "kind"), CASES, ids=lambda part: part)
def test_a_member_is_its_single_run(optim, given, kind):
    options = {"fixed": FIXED, "first-order": {"lr": 0.1}, "adaptive": {}}
    shared, rows = config(optim, **options[given]), ROWS[given]
    group, at = grouped(shared, rows, kind)
    lines = measure(group, at)
    assert at.step == STEPS and at.active.all()
    for member, row in enumerate(rows):
        single = alone(shared, row, kind, group.problem.ng)
        found = ff.members.take((at.params, at.context), member)
        torch.testing.assert_close(found, (single.snapshot.params, single.snapshot.context), rtol=1e-10, atol=1e-10)
        for name in ("train_loss", "test_loss", "skipped"):
            assert lines[member][name] == pytest.approx(single.metrics[name], rel=1e-9)
    assert lines[0]["train_loss"] != lines[1]["train_loss"]


def test_a_seed_for_all_is_the_single_run_too():
    """Batches, labels and dropout seeds are then shared, without an axis of members."""
    shared, rows = config("kfac", **FIXED), [{"momentum": 0.9}, {"momentum": 0.5}, {"momentum": 0.0}]
    group, at = grouped(shared, rows, "norm")
    for member, row in enumerate(rows):
        torch.testing.assert_close(
            ff.members.take(at.params, member),
            alone(shared, row, "norm", group.problem.ng).snapshot.params,
            rtol=1e-10,
            atol=1e-10,
        )


@pytest.mark.parametrize("optim", ["kfac", "lanczos"])
@pytest.mark.parametrize("given", [FIXED, {}], ids=["fixed", "adaptive"])
def test_a_member_that_diverges_is_frozen_and_leaves_the_others_bit_for_bit(optim, given):
    shared, rows = config(optim, **given), [{"seed": seed} for seed in range(4)]
    _, healthy = grouped(shared, rows, epochs=3)
    group, ill = grouped(shared, rows, bad=(2,), epochs=3)
    assert ill.active.tolist() == [True, True, False, True] and healthy.active.all()
    for member in (0, 1, 3):
        found, expected = (ff.members.take((at.params, at.state), member) for at in (ill, healthy))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert list(group.reasons) == [2] and "NonFiniteError" in group.reasons[2]
    frozen = ff.members.take(ill.params, 2)
    torch.testing.assert_close(frozen, task(2, "xavier_uniform", "plain", True).params, equal_nan=True)
    assert [line["active"] for line in measure(group, ill)] == [1, 1, 0, 1]


def test_one_member_runs_without_vmap_and_is_the_same():
    shared, rows = config("kfac", **FIXED), [{"lr": 0.3}]
    group, at = grouped(shared, rows, "norm")
    single = alone(shared, rows[0], "norm", group.problem.ng).snapshot
    torch.testing.assert_close(ff.members.take(at.params, 0), single.params, rtol=1e-10, atol=1e-10)


@pytest.fixture
def advanced(monkeypatch):
    """The calls of the function that advances a group; a compiled step runs its trace as it is."""
    calls, advance = [], Problem.advance
    monkeypatch.setattr(torch, "compile", lambda graph, **options: graph)
    monkeypatch.setattr(Problem, "advance", lambda *a, **k: calls.append(k) or advance(*a, **k))
    return calls


def test_compiled_groups_of_equal_size_share_one_trace_per_kind_of_step(advanced):
    shared, rows = config("kfac", **FIXED), [{"seed": seed} for seed in range(4)]
    runs = problem(dataclasses.replace(shared, compile=True), rows)
    for members in ([0, 1], [2, 3]):
        group, at = Group(runs, members), None
        plain = Group(runs, members, plain=True)
        at, expected = group.start(), plain.start()
        for _ in range(2):
            at = group.epoch(at)
        traces, advanced[:] = len(advanced), []
        for _ in range(2):
            expected = plain.epoch(expected)
        torch.testing.assert_close(at.params, expected.params, rtol=1e-10, atol=1e-10)
        assert len(advanced) == 10
        assert traces == (3 if members == [0, 1] else 0), "both, statistics only, neither"
        advanced.clear()


def test_the_short_batch_at_the_end_of_an_epoch_runs_uncompiled(advanced):
    """Every epoch of 30 examples has three batches of 8, and one of 6."""
    runs = problem(dataclasses.replace(config("kfac", **FIXED), compile=True, batch_size=8), ROWS["fixed"])
    group = Group(runs, [0, 1])
    at = group.start()
    for _ in range(4):
        at = group.epoch(at)
    assert at.active.all() and len(advanced) == 3 + 4


def test_a_group_of_frozen_members_computes_nothing(advanced):
    group = Group(problem(config("kfac", **FIXED), [{"seed": 0}, {"seed": 1}]), range(2))
    at = group.start()
    bad = {name: leaf * torch.nan for name, leaf in at.params.items()}
    at = group.epoch(group.epoch(at._replace(params=bad)))
    assert not at.active.any() and (at.epoch, at.step) == (2, 10) and len(advanced) == 5
    advanced.clear()
    later = group.epoch(group.epoch(at))
    assert not advanced and (later.epoch, later.step, later.batches) == (4, 20, 0)
    torch.testing.assert_close(later.params, at.params, rtol=0, atol=0, equal_nan=True)


def test_equal_data_of_seeds_are_kept_once():
    first = task(0, "xavier_uniform", "plain")
    copies = {seed: first._replace(train=tuple(leaf.clone() for leaf in first.train)) for seed in range(3)}
    runs = Problem(config("kfac", **FIXED), [{"seed": seed} for seed in range(3)], lambda c: copies[c.seed])
    assert len({id(runs.task_of(row).train) for row in range(3)}) == 1
    other = Problem(config("kfac", **FIXED), ROWS["fixed"], lambda c: task(c.seed, c.init_params, "plain"))
    assert other.task_of(0).train is not other.task_of(1).train


def test_an_epoch_goes_on_from_any_step_bit_for_bit():
    shared = config("kfac")
    group = Group(problem(shared, ROWS["adaptive"], "norm"), range(2))
    seen = []
    end = group.epoch(group.epoch(group.start()), seen.append)
    again = group.epoch(seen[2])
    torch.testing.assert_close((again.params, again.state), (end.params, end.state), rtol=0, atol=0)
    assert again.step == end.step == 10


def test_numbers_that_are_tensors_are_the_numbers():
    its, shared = task(0, "xavier_uniform", "plain"), config("sgd", lr=0.1)
    batch = tuple(leaf[:BATCH] for leaf in its.train)
    given = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.1}
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in given.items()}
    found = [optimizer_with(shared, its, None, each) for each in (given, tensors)]
    one, other = (o.step(its.params, o.init(its.params), batch, its.context, (), 0).params for o in found)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_failed_step_with_a_short_batch_costs_one_step():
    """The statistics of two-level methods have the size of the batch: those of a failed member cannot be kept."""
    group = Group(problem(config("twolevel_kfac", **FIXED), [{"seed": 0}, {"seed": 1}]), range(2))
    at, batch = group.start(), next(group.batches(0, 0))
    draws = [loop.generator_of(seed, 0, stream=1) for seed in group.seeds]
    for _ in range(4):
        at = group.step(at, batch, draws)
    assert group.problem.optimizer.cadence(at.step) == (True, True)
    short = tuple(leaf[:, :3] for leaf in batch)
    none = group.step(at, (short[0] * torch.nan, short[1]), draws)
    assert none.failed.tolist() == [1, 1]
    for after, before in zip(ff.tree.leaves(none.state), ff.tree.leaves(at.state), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)

    broken = {name: torch.stack([leaf[0], leaf[1] * torch.nan]) for name, leaf in at.params.items()}
    hurt = group.step(at._replace(params=broken), short, draws)
    assert hurt.failed.tolist() == [0, 1]
    assert group.step(hurt._replace(params=at.params), batch, draws).failed.tolist() == [0, 0]
