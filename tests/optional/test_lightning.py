"""The drop-in shell in Lightning's conventions trains as a plain loop does."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

import fisherfn as ff
from tests.optim.problems import problem
from tests.optional.installed import need

lightning = need("lightning")
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers and logging is not tested here

EPOCHS = 2


class Manual(lightning.LightningModule):
    """Manual optimization: the batch goes to the optimizer by name."""

    def __init__(self, net):
        super().__init__()
        self.automatic_optimization = False
        self.net, self.losses = net, []

    def configure_optimizers(self):
        opt = natural(self.net)
        return [opt], [torch.optim.lr_scheduler.StepLR(opt, 3)]

    def training_step(self, batch, index):
        self.losses.append(self.optimizers().step(batch=batch))
        self.lr_schedulers().step()


class Watched(lightning.LightningModule):
    """Automatic optimization: Lightning calls backward and step, the forward is watched."""

    def __init__(self, net, example):
        super().__init__()
        self.net, self.example = net, example

    def configure_optimizers(self):
        return natural(self.net, example_inputs=self.example)

    def training_step(self, batch, index):
        x, y = batch
        with self.optimizers().watch():
            return F.cross_entropy(self.net(x), y)


class Preconditioned(lightning.LightningModule):
    """Any optimizer, its gradients made natural in the hook that stands before its step."""

    def __init__(self, net, watches):
        super().__init__()
        self.net, self.watches = net, watches
        self.pre = ff.optim.Preconditioner(self.net, likelihood=ff.Categorical())

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)

    def training_step(self, batch, index):
        self.x, y = batch
        with self.pre.watch(self.x):
            return F.cross_entropy(self.net(self.x), y)

    def on_before_optimizer_step(self, optimizer):
        self.pre.step(None if self.watches else self.x)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["preconditioner"] = self.pre.state_dict()

    def on_load_checkpoint(self, checkpoint):
        self.pre.load_state_dict(checkpoint["preconditioner"])


def natural(net, **more):
    return ff.optim.NaturalGradient(net, likelihood=ff.Categorical(), lr=0.2, damping=0.1, kl_bound=1e-2, **more)


def trainer(epochs=EPOCHS, **more):
    return lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, **{"enable_checkpointing": False, **more},
    )  # fmt: skip


def loader(case):
    return DataLoader(case.batches, batch_size=None)


def equal(net, other):
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_manual_optimization_takes_the_batch():
    case = problem()
    plain = case.again()
    opt = natural(plain)
    scheduler, losses = torch.optim.lr_scheduler.StepLR(opt, 3), []
    for _ in range(EPOCHS):
        for batch in case.batches:
            losses.append(opt.step(batch))
            scheduler.step()
    module = Manual(case.net)
    run = trainer()
    run.fit(module, loader(case))
    assert torch.equal(torch.stack(module.losses), torch.stack(losses))
    assert run.global_step == EPOCHS * len(case.batches)
    equal(case.net, plain)


@pytest.mark.parametrize("parts", [1, 3])
def test_automatic_optimization_is_watched(parts):
    case = problem()
    plain = case.again()
    opt = natural(plain, example_inputs=case.batches[0][0])
    for _ in range(EPOCHS):
        for start in range(0, len(case.batches), parts):
            opt.zero_grad()
            for x, y in case.batches[start : start + parts]:
                with opt.watch():
                    loss = F.cross_entropy(plain(x), y) / parts
                loss.backward()
            opt.step()
    trainer(accumulate_grad_batches=parts).fit(Watched(case.net, case.batches[0][0]), loader(case))
    equal(case.net, plain)


def preconditioned(net, batches, watches):
    pre = ff.optim.Preconditioner(net, likelihood=ff.Categorical())
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches:
        sgd.zero_grad()
        with pre.watch(x):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        pre.step(None if watches else x)
        sgd.step()


@pytest.mark.parametrize("watches", [True, False])
def test_a_preconditioner_runs_before_the_step(watches):
    case = problem()
    plain = case.again()
    preconditioned(plain, EPOCHS * case.batches, watches)
    trainer().fit(Preconditioned(case.net, watches), loader(case))
    equal(case.net, plain)


@pytest.mark.parametrize("make", [Manual, lambda net: Preconditioned(net, True)], ids=["natural", "preconditioner"])
def test_a_checkpoint_goes_on_as_the_straight_run(make, tmp_path):
    case = problem()
    straight, first, second = case.again(), case.again(), case.again()
    trainer(epochs=2).fit(make(straight), loader(case))
    run = trainer(epochs=1, enable_checkpointing=True, default_root_dir=tmp_path)
    run.fit(make(first), loader(case))
    run.save_checkpoint(tmp_path / "half.ckpt")
    trainer(epochs=2).fit(make(second), loader(case), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    equal(second, straight)


def test_bfloat16_mixed_precision_is_for_the_net():
    case = problem(steps=5)
    net, plain = case.net.float(), case.again()
    batches = [(x.float(), y) for x, y in case.batches]
    exact = natural(plain).step(batches[0])
    module = Manual(net)
    trainer(epochs=1, precision="bf16-mixed").fit(module, DataLoader(batches, None))
    torch.testing.assert_close(module.losses[0], exact, rtol=0.02, atol=0.0)
    assert not torch.equal(module.losses[0], exact)
    leaves = [*ff.tree.leaves(module.optimizers().curvature), *module.losses]
    assert {leaf.dtype for leaf in leaves} <= {torch.float32, torch.int64}
