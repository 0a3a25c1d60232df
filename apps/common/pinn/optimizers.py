"""Optimizers of a physics-informed net, all with the same two functions: an initial state, and a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

import fisherfn as ff
from common.pinn.nets import Tree
from common.pinn.problems import Batch, Posed

GRID = 31
"""Step sizes 1, 1/2, …, 2⁻³⁰ of the published line search."""


@dataclass(frozen=True)
class Settings:
    """The settings of an optimizer; each uses those it has."""

    damping: float
    momentum: float
    lr: float | None
    grid: int = GRID
    ema: float = 0.0


class Optimizer(Protocol):
    """A pure step: from parameters, state and the points of the step to new ones and the loss before."""

    def init(self, params: Tree) -> Any:
        """Return the initial state, a tree of tensors."""
        ...

    def step(self, params: Tree, state: Any, batch: Batch) -> tuple[Tree, Any, Tensor]:
        """Return new parameters, new state, and the loss of the batch at the old parameters."""
        ...


class Natural:
    """Natural gradients with a line search or a fixed learning rate, and SPRING's momentum if `spring`."""

    def __init__(self, posed: Posed, params: Tree, settings: Settings, method: Any, spring: bool = False) -> None:
        self.settings = settings
        self.ng = ff.sum_of_terms(posed.terms, params, method=method)
        self.spring = ff.spring(self.ng, momentum=settings.momentum) if spring else None

    def init(self, params: Tree) -> Any:
        """Return the initial state; the exact methods keep no statistics of a batch in it, but an average does."""
        if self.spring is not None:
            return {"direction": ff.tree.zeros_like(params)}
        if self.settings.ema:
            return {"curvature": self.ng.init(params, damping=self.settings.damping, ema=self.settings.ema)}
        return {}

    def step(self, params: Tree, state: Any, batch: Batch) -> tuple[Tree, Any, Tensor]:
        """Solve, then search along the direction."""
        λ = self.settings.damping
        if self.spring is not None:
            start = self.spring.init(params, damping=λ)._replace(direction=state["direction"])
            direction, new, info = self.spring.step(params, start, batch)
            state = {"direction": new.direction}
        elif self.settings.ema:
            direction, curvature, info = self.ng.step(params, state["curvature"], batch)
            state = {"curvature": curvature}
        else:
            direction, _, info = self.ng.step(params, self.ng.init(params, damping=λ), batch)
        ff.check(info)
        if self.settings.lr is not None:
            return ff.tree.add(params, direction, scale=-self.settings.lr), state, info.loss
        sizes = [0.5**k for k in range(self.settings.grid)]
        found = ff.line_search(lambda p: self.ng.loss(p, batch), params, direction, sizes=sizes)
        if self.spring is not None:  # a short step must not leave the momentum of a long one
            state = {"direction": ff.tree.scale(state["direction"], found.size)}
        return found.params, state, info.loss


class Kronecker:
    """K-FAC with step size and momentum from the quadratic model of the same points, and a fixed λ."""

    def __init__(self, posed: Posed, params: Tree, settings: Settings, method: Any) -> None:
        self.settings = settings
        self.ng = ff.sum_of_terms(posed.terms, params, method=method)

    def init(self, params: Tree) -> Any:
        """Return the curvature and the last update."""
        return {
            "curvature": self.ng.init(params, damping=self.settings.damping, ema=self.settings.ema),
            "update": ff.tree.zeros_like(params),
        }

    def step(self, params: Tree, state: Any, batch: Batch) -> tuple[Tree, Any, Tensor]:
        """Take the combination of direction and last update that minimises the quadratic model."""
        nat, curvature, info = self.ng.step(params, state["curvature"], batch)
        ff.check(info)
        directions = [nat, state["update"]]
        weights = ff.quadratic_model(self.ng, params, batch, directions).minimiser(self.settings.damping)
        update = ff.tree.add(ff.tree.scale(nat, weights[0]), state["update"], scale=weights[1])
        return ff.tree.add(params, update), {"curvature": curvature, "update": update}, info.loss


class Torch:
    """An optimizer of torch, with its state as a tree of tensors between the steps."""

    def __init__(self, posed: Posed, params: Tree, make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> None:
        self.make = make
        self.ng = ff.sum_of_terms(posed.terms, params, method=ff.kfac())

    def init(self, params: Tree) -> Any:
        """Return an empty state."""
        return {}

    def step(self, params: Tree, state: Any, batch: Batch) -> tuple[Tree, Any, Tensor]:
        """Load the state into a fresh optimizer, step, and read it again."""
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        optimizer = self.make(list(leaves.values()))
        known = optimizer.state_dict()
        optimizer.load_state_dict({"state": _numbered(state), "param_groups": known["param_groups"]})

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.ng.loss(leaves, batch)
            loss.backward()
            return loss

        loss = optimizer.step(closure)  # type: ignore[arg-type]
        saved = {str(at): _tensors(each) for at, each in optimizer.state_dict()["state"].items()}
        return {name: p.detach() for name, p in leaves.items()}, saved, torch.as_tensor(loss).detach()


WHOLE = {"func_evals", "n_iter"}
"""Entries of a state that torch keeps as whole numbers."""


def _tensors(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of one parameter with every number as a tensor; lists become dicts."""
    found: dict[str, Any] = {}
    for name, entry in state.items():
        if isinstance(entry, list):
            found[name] = {f"{at:04}": torch.as_tensor(each) for at, each in enumerate(entry) if each is not None}
        elif entry is not None:
            found[name] = torch.as_tensor(entry, dtype=None if torch.is_tensor(entry) else torch.float64)
    return found


def _numbered(state: dict[str, Any]) -> dict[int, Any]:
    """Invert `_tensors` for all parameters."""
    return {int(at): {name: _entry(name, entry) for name, entry in each.items()} for at, each in state.items()}


def _entry(name: str, entry: Any) -> Any:
    if isinstance(entry, dict):
        values = [entry[at] for at in sorted(entry)]
        return values if name != "al" else values + [None] * (100 - len(values))
    if name in WHOLE:
        return int(entry)
    return float(entry) if entry.ndim == 0 and name in ("t", "prev_loss") else entry


DEFAULTS = {
    "exact": Settings(1e-10, 0.0, None),
    "exact_block": Settings(1e-10, 0.0, None),
    "spring": Settings(1e-10, 0.9, None),
    "dense": Settings(1e-10, 0.0, None, ema=0.6),
    "kfac": Settings(1e-1, 0.0, None, ema=0.95),
    "kfac_by_term": Settings(1e-3, 0.0, None, ema=0.95),
    "adam": Settings(0.0, 0.0, 1e-3),
    "lbfgs": Settings(0.0, 0.0, 1.0),
}
"""Settings of each optimizer on a net with one hidden layer."""

SEARCHING = ("damping", "lr", "grid")
AVERAGING = ("damping", "ema")
OPTIONS = {
    "exact": SEARCHING, "exact_block": SEARCHING, "spring": (*SEARCHING, "momentum"), "dense": (*SEARCHING, "ema"),
    "kfac": AVERAGING, "kfac_by_term": AVERAGING, "adam": ("lr",), "lbfgs": ("lr",),
}  # fmt: skip
"""Options of each optimizer."""


def optimizer_of(name: str, posed: Posed, params: Tree, settings: Settings) -> Optimizer:
    """Return the optimizer of this name."""
    if name in ("exact", "exact_block"):
        return Natural(posed, params, settings, ff.exact("full" if name == "exact" else "block"))
    if name == "dense":
        return Natural(posed, params, settings, ff.dense())
    if name == "spring":
        return Natural(posed, params, settings, ff.exact(), spring=True)
    if name in ("kfac", "kfac_by_term"):
        method = ff.kfac("eigen") if name == "kfac" else ff.kfac_by_term()
        return Kronecker(posed, params, settings, method)
    if name == "adam":
        return Torch(posed, params, lambda leaves: torch.optim.Adam(leaves, lr=settings.lr or 1e-3))
    return Torch(
        posed, params,
        lambda leaves: torch.optim.LBFGS(leaves, lr=settings.lr or 1.0, line_search_fn="strong_wolfe"),
    )  # fmt: skip
