"""The drop-in shell in Accelerate's conventions trains as a plain loop does."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

import fisherfn as ff
from tests.optim.problems import problem
from tests.optional.installed import need

accelerate = need("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def fresh():
    """Accelerate keeps one state per process: each test begins with none."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    yield lambda **more: accelerate.Accelerator(cpu=True, **more)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def natural(net, **more):
    return ff.optim.NaturalGradient(net, likelihood=ff.Categorical(), lr=0.2, damping=0.1, kl_bound=1e-2, **more)


def plain_loop(net, batches):
    opt = natural(net)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 5)
    losses = []
    for batch in batches:
        losses.append(opt.step(batch))
        scheduler.step()
    return losses


def equal(net, other):
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_prepared_optimizer_takes_the_batch(fresh):
    case = problem()
    plain = case.again()
    expected = plain_loop(plain, case.batches)
    accelerator, opt = fresh(), natural(case.net)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 5)
    net, opt, loader, scheduler = accelerator.prepare(case.net, opt, DataLoader(case.batches, None), scheduler)
    losses = []
    for batch in loader:
        opt.step(batch)
        losses.append(opt.optimizer.info.loss)
        scheduler.step()
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    equal(net, plain)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_watched_loop_with_accumulation(fresh, parts):
    case = problem()
    plain = case.again()
    opt = natural(plain)
    for start in range(0, len(case.batches), parts):
        opt.zero_grad()
        for x, y in case.batches[start : start + parts]:
            with opt.watch(x):
                loss = F.cross_entropy(plain(x), y) / parts
            loss.backward()
        opt.step()
    accelerator = fresh(gradient_accumulation_steps=parts)
    net, opt = accelerator.prepare(case.net, natural(case.net))
    for x, y in case.batches:
        with accelerator.accumulate(net):
            with opt.optimizer.watch(x):
                loss = F.cross_entropy(net(x), y)
            accelerator.backward(loss)
            opt.step()
            opt.zero_grad()
    equal(net, plain)


def test_a_preconditioner_before_a_prepared_optimizer(fresh):
    case = problem()
    plain = case.again()

    def train(net, sgd, pre, backward):
        for x, y in case.batches:
            sgd.zero_grad()
            backward(F.cross_entropy(net(x), y))
            pre.step(x)
            sgd.step()

    def made(net):
        sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        return sgd, ff.optim.Preconditioner(net, likelihood=ff.Categorical(), optimizer=sgd, kl_bound=1e-2)

    train(plain, *made(plain), torch.Tensor.backward)
    accelerator = fresh()
    sgd, pre = made(case.net)
    net, sgd = accelerator.prepare(case.net, sgd)
    train(net, sgd, pre, accelerator.backward)
    equal(net, plain)


def test_saved_states_go_on(fresh, tmp_path):
    case = problem()
    plain = case.again()
    plain_loop(plain, case.batches)

    def run(net, batches, folder=None, save=None):
        accelerator = fresh()
        opt = natural(net)
        scheduler = torch.optim.lr_scheduler.StepLR(opt, 5)
        net, opt, scheduler = accelerator.prepare(net, opt, scheduler)
        pre = ff.optim.Preconditioner(case.again(), likelihood=ff.Categorical())
        accelerator.register_for_checkpointing(pre)
        if folder:
            accelerator.load_state(folder)
        for batch in batches:
            opt.step(batch)
            scheduler.step()
        if save:
            accelerator.save_state(save)

    run(case.again(), case.batches[:7], save=str(tmp_path))
    run(case.net, case.batches[7:], folder=str(tmp_path))
    equal(case.net, plain)


def test_bfloat16_mixed_precision_is_for_the_net(fresh):
    case = problem(steps=5)
    net, plain = case.net.float(), case.again()
    batches = [(x.float(), y) for x, y in case.batches]
    exact = natural(plain).step(batches[0])
    net, opt = fresh(mixed_precision="bf16").prepare(net, natural(net))
    losses = []
    for batch in batches:
        opt.step(batch)
        losses.append(opt.optimizer.info.loss)
    torch.testing.assert_close(losses[0], exact, rtol=0.02, atol=0.0)
    assert not torch.equal(losses[0], exact)
    leaves = [*ff.tree.leaves(opt.optimizer.curvature), *losses]
    assert {leaf.dtype for leaf in leaves} <= {torch.float32, torch.int64}
