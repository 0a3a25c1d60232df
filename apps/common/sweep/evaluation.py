"""Losses and accuracies of all members of a group, each on the data of its own seed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fisherfn as ff
from common.loop import Task
from common.steps import Tree
from common.sweep.group import Group, Snapshot


@torch.no_grad()
def measure(group: Group, at: Snapshot) -> list[dict[str, float]]:
    """Return the metrics of every member: losses and accuracies on its own training and test set."""
    parts = {part: _evaluate(group, at, part) for part in ("train", "test")}
    share = at.seconds / len(group.members)
    lines = []
    for place in range(len(group.members)):
        line: dict[str, float] = {"epoch": at.epoch, "step": at.step}
        for part, (losses, _) in parts.items():
            line[f"{part}_loss"] = float(losses[place])
        for part, (_, right) in parts.items():
            line |= {} if right is None else {f"{part}_accuracy": float(right[place])}
        lines.append(line | {"seconds": share, "skipped": int(at.skipped[place]), "active": int(at.active[place])})
    return lines


def _evaluate(group: Group, at: Snapshot, part: str) -> tuple[Tensor, Tensor | None]:
    problem, members = group.problem, group.members
    losses = torch.zeros(len(members), dtype=torch.float64)
    right = torch.zeros_like(losses)
    by_data: dict[int, list[int]] = {}
    for place, row in enumerate(members):
        by_data.setdefault(id(getattr(problem.task_of(row), part)[0]), []).append(place)
    for places in by_data.values():
        x, y = getattr(problem.task_of(members[places[0]]), part)
        some = ff.members.take((at.params, at.context), places)
        size = max(16, (2048 if x.ndim == 2 else 256) // len(places))
        for a, b in zip(x.split(size), y.split(size), strict=True):
            found = _predicted(problem.task, some, a, b)
            losses[places] += found[0].double().cpu()
            right[places] += found[1].double().cpu()
        losses[places] /= x.shape[0] * problem.task.per_output
        right[places] /= x.shape[0]
    return losses, None if problem.task.train[1].is_floating_point() else right


def _predicted(task: Task, some: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    def one(params: Tree, context: Tree) -> tuple[Tensor, Tensor]:
        outputs, _ = task.predict(params, x, context)
        nll = task.likelihood.nll(outputs, y).double().sum()
        return nll, torch.zeros_like(nll) if y.is_floating_point() else (outputs.argmax(-1) == y).sum()

    params, context = some
    found: tuple[Tensor, Tensor] = torch.vmap(one, in_dims=(0, 0 if context else None))(params, context)
    return found
