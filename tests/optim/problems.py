"""Small nets with their batches, and the loop that the drop-in shell stands for, written with the pure functions."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import fisherfn as ff
from tests.nets import Patches, Tied, Transformer, mlp

CLASSES = 3


class FunctionalDropout(nn.Module):
    """A net that drops units without a module for it."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.last(F.dropout(torch.tanh(self.first(x)), 0.3, self.training))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, CLASSES), nn.Linear(2, CLASSES)

    def forward(self, x, z):
        return torch.tanh(self.left(x)) + self.right(z)


NETS = {
    "mlp": (lambda: mlp(4, 5, CLASSES), (4,)),
    "conv-batch-norm": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, CLASSES)
        ),
        (1, 3, 3),
    ),
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, CLASSES)), (4,)),
    "functional-dropout": (FunctionalDropout, (4,)),
    "tied": (lambda: nn.Sequential(Tied(), nn.Linear(2, CLASSES)), (3,)),
    "patches": (lambda: Patches(outputs=CLASSES), (2, 3)),
    "transformer": (lambda: Transformer(classes=CLASSES), None),
}
SEEDED = ("dropout", "functional-dropout")


@dataclass
class Problem:
    net: nn.Module
    batches: list[Any]

    def again(self):
        """The same net, to be trained another way."""
        return copy.deepcopy(self.net)


def problem(name="mlp", steps=12, examples=8, seed=0) -> Problem:
    """A net in float64 with parameters from one generator, and a batch for every step."""
    make, shape = NETS[name]
    generator = torch.Generator().manual_seed(seed)
    net = make().double()
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) / max(1, p.shape[-1]) ** 0.5

    def inputs():
        if shape is None:
            return torch.randint(5, (examples, 3), generator=generator)
        return torch.randn(examples, *shape, generator=generator, dtype=torch.float64)

    return Problem(net, [(inputs(), torch.randint(CLASSES, (examples,), generator=generator)) for _ in range(steps)])


@dataclass
class Loop:
    """Natural-gradient descent by `ng.step`, `kl_clip` and `tree.add`; rates may differ by name and step."""

    method: str = "kfac"
    lr: Any = 0.5
    momentum: Any = 0.9
    weight_decay: Any = 0.0
    bound: float | None = 1e-2
    damping: float = 0.1
    ema: float = 0.9
    update_every: int = 1
    invert_every: int = 1
    fisher: str = "mc"
    samples: int = 1
    seed: int = 0
    seeded: bool = False

    @property
    def options(self):
        """The same for the drop-in shell, but for what its groups hold."""
        return dict(
            method=self.method, damping=self.damping, ema=self.ema, update_every=self.update_every,
            invert_every=self.invert_every, samples=self.samples, generator=self.seed,
        )  # fmt: skip

    def run(self, net, batches):
        """(params, buffers, losses) after all batches; the net is left alone."""
        model, params, context = ff.functional(net)
        rng = torch.Generator().manual_seed(self.seed)
        x = batches[0][0]
        seeds = {"dropout": torch.arange(len(x))} if self.seeded else {}
        ng = ff.natural_gradient(
            model, params, x, likelihood=ff.Categorical(), method=self.method, fisher=self.fisher,
            samples=self.samples, context=context | seeds,
        )  # fmt: skip
        state, velocity = ng.init(params, damping=self.damping, ema=self.ema), ff.tree.zeros_like(params)
        losses = []
        for step, batch in enumerate(batches):
            lr, momentum, decay = (
                {name: _at(value, name, step) for name in params}
                for value in (self.lr, self.momentum, self.weight_decay)
            )
            if self.seeded:
                context = context | {"dropout": ff.dropout_seeds(len(batch[0]), rng)}
            nat, state, info = ng.step(
                params, state, batch, update=step % self.update_every == 0, invert=step % self.invert_every == 0,
                inner=True, generator=rng, context=context,
            )  # fmt: skip
            ff.check(info)
            if self.bound is not None:
                nat = ff.kl_clip(nat, info.inner, lr=max(lr.values()), kl_bound=self.bound)
            velocity = {name: nat[name] + momentum[name] * velocity[name] for name in params}
            params = {n: p - lr[n] * (velocity[n] + decay[n] * p) for n, p in params.items()}
            context = info.context
            losses.append(info.loss)
        return params, {name: context[name] for name, _ in net.named_buffers()}, torch.stack(losses)


def _at(value, name, step):
    value = value(name, step) if callable(value) else value
    return float(value)


def trained(net):
    """Its parameters and buffers."""
    return {n: p.detach() for n, p in net.named_parameters()}, dict(net.named_buffers())


def same(net, expected, tol=1e-10):
    """Raise unless the net's parameters and buffers are those of `Loop.run`."""
    params, buffers = trained(net)
    for found, wanted in ((params, expected[0]), (buffers, expected[1])):
        assert found.keys() == wanted.keys()
        for name, leaf in wanted.items():
            torch.testing.assert_close(found[name], leaf, rtol=tol, atol=tol, msg=lambda m, n=name: f"{n}: {m}")
