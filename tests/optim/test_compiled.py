"""Compiled steps of the drop-in optimizer: the same run, one trace per kind of step, copies, errors that teach."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fisherfn as ff

FIXED = {"lr": 0.1, "damping": 0.1, "momentum": 0.9}
EAGER = {"backend": "eager"}


def batches(count=4):
    generator = torch.Generator().manual_seed(1)
    return [(torch.rand(6, 3, generator=generator), torch.randint(2, (6,), generator=generator)) for _ in range(count)]


def optimizer(compile, dropout=0.0, **settings):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 2))
    every = {"update_every": 2, "invert_every": 2}
    return net, ff.optim.NaturalGradient(net, likelihood=ff.Categorical(), compile=compile, **every, **settings)


def run(net, opt, given):
    losses = [float(opt.step(batch)) for batch in given]
    return losses, {name: p.detach().clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("settings", [{"dropout": 0.5}, FIXED], ids=["adaptive", "fixed"])
def test_a_compiled_optimizer_makes_the_steps_of_a_plain_one(settings):
    """With the same labels and masks, because both take them from the generator in the same order."""
    plain, compiled = (run(*optimizer(way, **settings), batches(3)) for way in (False, EAGER))
    assert plain[0] == pytest.approx(compiled[0], rel=1e-5)
    torch.testing.assert_close(plain[1], compiled[1])


@pytest.mark.parametrize("settings", [{}, FIXED], ids=["adaptive", "fixed"])
def test_autocast_and_rates_of_dropout_are_those_of_each_step(settings):
    """The first trace has its own as constants."""

    def losses(compile):
        net, opt = optimizer(compile, dropout=0.9, **settings)
        found = []
        for step, batch in enumerate(batches(4)):
            net[2].p = 0.9 if step < 2 else 0.01
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=step % 2 == 1):
                found.append(float(opt.step(batch)))
        return found

    assert losses(EAGER) == pytest.approx(losses(False), rel=1e-5)


def test_each_kind_of_step_is_traced_once_and_a_scheduler_changes_no_kind(monkeypatch):
    traced = []
    monkeypatch.setattr(torch, "compile", lambda graph, **options: traced.append(options) or graph)
    net, opt = optimizer(True)
    for batch in batches(4):
        opt.param_groups[0]["lr"] *= 0.9
        opt.step(batch)
    assert len(traced) == 2 and "backend" not in traced[0]  # with a refresh, and without


def pickled(both):
    return pickle.loads(pickle.dumps(both))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_traces_for_the_copied_net(copied):
    net, opt = optimizer(EAGER, **FIXED)
    run(net, opt, batches(2))
    other, twin = copied((net, opt))
    expected = run(net, opt, batches(2))
    found = run(other, twin, batches(2))
    assert found[0] == expected[0] and all(torch.equal(found[1][name], expected[1][name]) for name in found[1])


def test_options_of_another_kind_are_refused():
    with pytest.raises(ff.errors.HyperparameterError, match="compile is True, False or options"):
        optimizer("eager")


def test_without_a_compiler_the_first_step_says_what_to_do(monkeypatch):
    def fails(graph, **options):
        def run(*tensors):
            raise torch._inductor.exc.InvalidCxxCompiler

        return run

    monkeypatch.setattr(torch, "compile", fails)
    net, opt = optimizer(True, **FIXED)
    with pytest.raises(ff.errors.MissingPackageError, match="no C\\+\\+ compiler.*install one"):
        opt.step(batches(1)[0])
