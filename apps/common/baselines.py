"""First-order optimizers of other libraries, as fast as they come, behind the trainers' `Optimizer`.

They train the module itself, in place: the parameters and buffers that a step returns are the module's own tensors.
Comparisons need them so that nobody has to ask whether the baseline was slow: torch's fused kernels, plain autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

import fisherfn as ff
from common.config import ConfigError
from common.steps import Batch, Optimizer, Stepped, Tree

Schedule = Literal["constant", "cosine"]

Make = Callable[[Iterable[Tensor], float], torch.optim.Optimizer]
"""(parameters, learning rate) to the optimizer."""


def _soap(parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    try:
        from pytorch_optimizer import SOAP
    except ImportError as error:
        raise ConfigError("SOAP needs: pip install --no-deps -r requirements-peers.txt") from error
    optimizer: torch.optim.Optimizer = SOAP(parameters, lr=lr, weight_decay=0.0)
    return optimizer


BASELINES: dict[str, Make] = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9, fused=True),
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr, fused=True),
    "adamw": lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, fused=True),
    "soap": _soap,
}
"""Baselines by name, with the default weight decay and other defaults of their libraries."""


def baseline(
    net: nn.Module, likelihood: ff.Likelihood, optim: str, *, lr: float, schedule: Schedule, steps: int,
    compile: bool = False,
) -> Optimizer:  # fmt: skip
    """Return a baseline that trains `net` in place.

    Args:
        net: the module; its parameters are those of the task.
        likelihood: of its outputs; the loss is the mean NLL.
        optim: a key of `BASELINES`.
        lr: learning rate at the start.
        schedule: "constant", or "cosine": down to zero over `steps`.
        steps: length of the run.
        compile: forward, loss and backward by `torch.compile`.
    """
    optimizer = BASELINES[optim](net.parameters(), lr)
    names = dict(net.named_parameters())

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return likelihood.nll(net(x), y).mean()

    loss_function = torch.compile(loss_of) if compile else loss_of

    def step(params: Tree, state: Any, batch: Batch, context: Any, noise: Any, index: int) -> Stepped:
        for group in optimizer.param_groups:
            group["lr"] = lr * (0.5 + 0.5 * math.cos(math.pi * index / steps) if schedule == "cosine" else 1.0)
        optimizer.zero_grad()
        loss = loss_function(batch[0], batch[1])
        loss.backward()
        optimizer.step()
        info = ff.Info(loss=loss.detach(), ok={"loss": torch.isfinite(loss.detach())})
        detached = {name: parameter.detach() for name, parameter in names.items()}
        return Stepped(detached, (), dict(net.named_buffers()), info)

    return Optimizer(lambda params: (), lambda batch, generator: (), step)
