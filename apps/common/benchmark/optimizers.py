"""Optimizers other than K-FAC: SGD and AdamW of torch, Muon, Shampoo and SOAP of pytorch_optimizer.

Periodic work depends on the step counter, which is set before each call, so that both kinds of step can be timed. SOAP
recomputes its bases every 10 steps (its default, and the cadence of its paper), like the statistics of others. Shampoo
computes its roots every 100 steps, like the inverses of others, as is usual for large nets. Its default, every step,
would cost the column "inverses" in every step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from common.benchmark.contenders import Contender, Parts, Step
from common.benchmark.peers import RATE
from common.benchmark.problems import Problem, Training

BASES_EVERY, ROOTS_EVERY = 10, 100


def stepping(train: Training, optimizer: Any, counter: int | None = None) -> Step:
    """Do forward, backward and update, with the given step counter if there is one."""

    def step() -> None:
        for group in optimizer.param_groups if counter is not None else ():
            group["step"] = counter
        train.backward()
        optimizer.step()

    return step


def sgd(problem: Problem) -> Contender:
    """Build the step that is the unit of every table."""
    train = problem.training()
    return Contender(Parts(stepping(train, torch.optim.SGD(train.net.parameters(), lr=RATE))))


def sgd_compiled(problem: Problem) -> Contender:
    """Build SGD with net and loss compiled by `torch.compile`."""
    train = problem.training()
    forward = torch.compile(lambda x, y: train.loss(train.net(x), y), dynamic=False)
    optimizer = torch.optim.SGD(train.net.parameters(), lr=RATE)

    def step() -> None:
        train.net.zero_grad(set_to_none=True)
        forward(train.x, train.y).backward()
        optimizer.step()

    return Contender(Parts(step))


def adamw(problem: Problem) -> Contender:
    """Build AdamW with its defaults: one parameter after the other on a CPU."""
    train = problem.training()
    return Contender(Parts(stepping(train, torch.optim.AdamW(train.net.parameters(), lr=RATE))))


def adamw_fused(problem: Problem) -> Contender:
    """Build AdamW with a fused kernel."""
    train = problem.training()
    return Contender(Parts(stepping(train, torch.optim.AdamW(train.net.parameters(), lr=RATE, fused=True))))


def muon(problem: Problem, single: bool = False) -> Contender:
    """Build Muon for all weights except the last layer's, and AdamW for the rest, as documented.

    Its Newton–Schulz iteration is in bfloat16, which many processors emulate, or in single precision.
    """
    from pytorch_optimizer import Muon

    train = problem.training()
    kind = in_single_precision(Muon) if single else Muon
    last = [module for module in train.net.modules() if isinstance(getattr(module, "weight", None), nn.Parameter)][-1]
    hidden = [p for p in train.net.parameters() if p.ndim >= 2 and p is not last.weight]
    rest = [p for p in train.net.parameters() if not any(p is other for other in hidden)]
    groups = [{"params": hidden, "lr": RATE, "use_muon": True}, {"params": rest, "lr": RATE, "use_muon": False}]
    return Contender(Parts(stepping(train, kind(groups))), "hidden weights", "the rest by AdamW")


def in_single_precision(kind: Any) -> Any:
    """Return Muon with its iteration in float32."""
    from pytorch_optimizer.optimizer.muon.base import zero_power_via_newton_schulz_5

    class Single(kind):  # type: ignore[misc]
        @staticmethod
        def _orthogonalize(group: dict[str, Any], updates: list[torch.Tensor]) -> list[torch.Tensor]:
            how = {"num_steps": group["ns_steps"], "weights": group["ns_coeffs"], "dtype": torch.float32}
            return [zero_power_via_newton_schulz_5(update.flatten(1), **how) for update in updates]

    return Single


def soap(problem: Problem) -> Contender:
    """Build SOAP, which recomputes its bases at multiples of `BASES_EVERY`."""
    from pytorch_optimizer import SOAP

    train = problem.training()
    optimizer = SOAP(train.net.parameters(), lr=RATE, precondition_frequency=BASES_EVERY)
    stepping(train, optimizer)()  # the first step only computes the bases
    parts = Parts(
        stepping(train, optimizer, BASES_EVERY + 1), step_with_statistics=stepping(train, optimizer, BASES_EVERY)
    )
    return Contender(parts, "weights", f"bases every {BASES_EVERY}")


def shampoo(problem: Problem) -> Contender:
    """Build Shampoo, which computes its roots at multiples of `ROOTS_EVERY`, counted from one."""
    from pytorch_optimizer import Shampoo

    train = problem.training()
    optimizer = Shampoo(train.net.parameters(), lr=RATE, preconditioning_compute_steps=ROOTS_EVERY)
    parts = Parts(
        stepping(train, optimizer, ROOTS_EVERY), step_with_inverses=stepping(train, optimizer, ROOTS_EVERY - 1)
    )
    return Contender(parts, note=f"roots every {ROOTS_EVERY}")


OPTIMIZERS: dict[str, Callable[[Problem], Contender]] = {
    "AdamW": adamw,
    "AdamW, fused": adamw_fused,
    "Muon": muon,
    "Muon, float32": partial(muon, single=True),
    "Shampoo": shampoo,
    "SOAP": soap,
}
"""The optimizers except SGD."""

COMPILED: dict[str, Callable[[Problem], Contender]] = {"SGD, compiled": sgd_compiled}
"""The unit with a compiler."""
