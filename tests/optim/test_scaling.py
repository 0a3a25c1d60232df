"""Gradient scalers: unscaled once, an overflowed step is left out, and errors for what cannot be right."""

import pytest
import torch
import torch.nn.functional as F

import fisherfn as ff
from tests.optim.problems import problem

LABELS = ff.Categorical()


E = ff.errors


def test_a_scaler_skips_the_step_and_zero_grad_drops_what_was_watched():
    case = problem()
    (x, y), (x2, y2) = case.batches[:2]
    twin = case.again()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    fixed = {"likelihood": LABELS, "lr": 0.5, "damping": 0.1}
    opt = ff.optim.NaturalGradient(case.net, **fixed, example_inputs=x, scaler=scaler, generator=0)
    for batch_x, batch_y, weight in ((x, y, torch.inf), (x2, y2, 1.0)):
        opt.zero_grad()
        with opt.watch():
            loss = F.cross_entropy(case.net(batch_x), batch_y)
        scaler.scale(weight * loss).backward()
        scaler.step(opt)
        scaler.update()
    other = ff.optim.NaturalGradient(twin, **fixed, fisher="empirical")
    other.step((x2, y2))
    for a, b in zip(case.net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def scaled_steps(net, batches, how, weight=1.0, updated=True):
    """Parameters after watched steps with a gradient scaler, and the scaler's last scale."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=how != "a disabled scaler")
    scaler = None if how == "no scaler" else scaler
    fixed = {"lr": 0.5, "damping": 0.1, "kl_bound": None, "scaler": scaler}
    opt = ff.optim.NaturalGradient(net, likelihood=LABELS, **fixed, example_inputs=batches[0][0])
    for x, y in batches:
        opt.zero_grad()
        with opt.watch():
            loss = weight * F.cross_entropy(net(x), y)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if how == "unscaled by the caller":
            scaler.unscale_(opt)
        if how == "stepped by the scaler":
            scaler.step(opt)
        else:
            opt.step()
        if scaler is not None and updated:
            scaler.update()
    return [p.detach() for p in net.parameters()], scaler and scaler.get_scale()


@pytest.mark.parametrize(
    "how", ["stepped by the scaler", "unscaled by the caller", "unscaled by the step", "a disabled scaler"]
)
def test_a_scaled_loss_is_unscaled_once(how):
    case = problem(steps=3)
    expected, _ = scaled_steps(case.again(), case.batches, "no scaler")
    found, _ = scaled_steps(case.again(), case.batches, how)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_step_with_overflowed_gradients_is_left_out_and_lowers_the_scale():
    case = problem(steps=1)
    found, scale = scaled_steps(case.again(), case.batches, "unscaled by the step", weight=torch.inf)
    assert all(torch.equal(a, b) for a, b in zip(found, case.net.parameters(), strict=True)) and scale == 2.0**9


def test_a_loss_without_its_scale_is_an_error():
    case = problem(steps=1)
    (x, y), scaler = case.batches[0], torch.amp.GradScaler("cpu")
    opt = ff.optim.NaturalGradient(case.net, likelihood=LABELS, lr=0.5, damping=0.1, example_inputs=x, scaler=scaler)
    with opt.watch():
        loss = F.cross_entropy(case.net(x), y)
    loss.backward()
    with pytest.raises(E.StructureError, match=r"between backward\(\) of the scaled loss"):
        opt.step()


def test_a_scaler_that_is_not_updated_is_an_error():
    case = problem(steps=2)
    with pytest.raises(E.StructureError, match=r"call scaler\.update\(\) after each step"):
        scaled_steps(case.net, case.batches, "unscaled by the step", updated=False)
