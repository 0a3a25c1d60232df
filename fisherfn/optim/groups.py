"""The parameter groups of the drop-in optimizer: their checks, their factors in an adaptive step, and fixed steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fisherfn.adapt.scales import decay
from fisherfn.errors import HyperparameterError, StructureError, expect, expect_number
from fisherfn.types import Tree

Groups = Sequence[dict[str, Any]]

RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (lambda v: v >= 0, "must be >= 0"),
    "momentum": (lambda v: 0 <= v < 1, "must lie in [0, 1)"),
    "weight_decay": (lambda v: v >= 0, "must be >= 0"),
}


def check_groups(groups: Groups, *, momentum: float | None = None) -> None:
    """Check the numbers of groups, which schedulers change between steps.

    Args:
        groups: the parameter groups.
        momentum: the momentum that all must have: that of an adaptive step, which has one for all parameters.

    Raises:
        HyperparameterError: a learning rate, momentum or weight decay outside its range.
        StructureError: another momentum.
    """
    for group in groups:
        for name, (holds, rule) in RULES.items():
            expect_number(name, group[name], holds, rule)
        if momentum is not None and group["momentum"] != momentum:
            raise StructureError(
                f"a parameter group has momentum {group['momentum']}, and an adaptive step has one momentum for all "
                "parameters: pass momentum= to the constructor, and cycle_momentum=False to schedulers."
            )


SHARED = ("damping", "kl_bound", "ema", "update_every", "invert_every", "method", "likelihood")
"""Settings of the constructor that all groups share."""


def check_new(param_group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Check a group that is added.

    Raises:
        HyperparameterError: a learning rate, momentum or weight decay outside its range.
        StructureError: a setting that all groups share.
    """
    check_groups([{**defaults, **param_group}])
    if shared := [name for name in SHARED if name in param_group]:
        raise StructureError(f"all parameter groups share {shared[0]}: pass it to the constructor, not in a group.")


def check_automatic(**settings: object) -> None:
    """Raise `HyperparameterError` unless each of these settings is one number or "auto"."""
    for name, value in settings.items():
        if value is None or (isinstance(value, str) and value != "auto"):
            raise HyperparameterError(f'{name} is a number or "auto", got {value!r}.')
        if not isinstance(value, str):
            expect_number(name, value, lambda v: True, 'must be a number or "auto"')


def check_saved(saved: Any, *, auto_lr: bool) -> None:
    """Raise `StructureError` unless this is the saved form of an optimizer with the same kind of learning rate."""
    expect(saved, dict, "a saved optimizer", "pass what state_dict() returned")
    if "curvature" not in saved:
        raise StructureError(f"the saved optimizer has no curvature, only {sorted(saved)}: it is another one.")
    if saved.get("auto_lr", auto_lr) != auto_lr:
        here, there = ("an automatic", "a given") if auto_lr else ("a given", "an automatic")
        raise StructureError(
            f"the saved optimizer had {there} learning rate, and this one has {here} one, so that lr of its groups "
            "means something else: build this optimizer with the same lr."
        )


def largest_lr(groups: Groups, names: Mapping[int, str]) -> Any:
    """Return the largest learning rate of the groups that have a parameter with a name; 0 if there is none."""
    return max((group["lr"] for group in groups if any(id(p) in names for p in group["params"])), default=0.0)


def listed(param_group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group with its parameters in a list, which can be read twice; torch refuses a set."""
    given = param_group["params"]
    return {**param_group, "params": given if isinstance(given, (Tensor, set)) else list(given)}


def tensors(param_group: Mapping[str, Any]) -> list[Tensor]:
    """Return the parameters of a group as given to `add_param_group`: one, several, or pairs with their names."""
    given = param_group["params"]
    return [each[1] if isinstance(each, tuple) else each for each in ([given] if isinstance(given, Tensor) else given)]


def flat(params: Iterable[Any]) -> list[Tensor]:
    """Return the parameters of a list of them, of pairs with their names, or of groups, as torch's optimizers take."""
    groups = [listed(each) if isinstance(each, dict) else {"params": [each]} for each in params]
    return [p for group in groups for p in tensors(group)]


def factors(groups: Groups, names: Mapping[int, str], lr: float) -> dict[str, float]:
    """Return by name the learning rate of every parameter in a group, relative to that of the constructor."""
    return {names[id(p)]: float(group["lr"]) / lr for group in groups for p in group["params"] if id(p) in names}


def decays(groups: Groups, learning_rate: Tensor, relative: Mapping[int, float]) -> dict[int, Tensor]:
    """Return by `id` the share α w by which parameters decay; `relative` has their learning rates over the largest."""
    return {
        id(p): decay(learning_rate * relative[id(p)], group["weight_decay"])
        for group in groups for p in group["params"] if group["weight_decay"] and id(p) in relative
    }  # fmt: skip


def descend(groups: Groups, states: Mapping[Tensor, dict[str, Any]], names: Mapping[int, str], nat: Tree) -> None:
    """Take a step with momentum and weight decay; parameters without a name are left as they are."""
    for group in groups:
        for p in (p for p in group["params"] if id(p) in names):
            direction, state = nat[names[id(p)]], states[p]
            if group["momentum"]:
                old = state.get("momentum_buffer")
                # the direction of a plain gradient is p.grad itself, which zero_grad may erase
                direction = direction.clone() if old is None else direction + group["momentum"] * old
                state["momentum_buffer"] = direction
            if group["weight_decay"]:
                direction = direction + group["weight_decay"] * p
            p.add_(direction * -group["lr"])
