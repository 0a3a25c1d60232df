"""The stages of a sweep: all runs to the end, successive halving, or population-based training.

A stage trains its groups to an epoch. Between stages, members are selected by indexing their trees. Groups are saved
after every epoch, so that a killed sweep goes on from there and ends with the same bits.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fisherfn as ff
from common.atomic import replace_text
from common.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from common.config import ConfigError
from common.damage import understood
from common.results import MetricsError
from common.sweep.evaluation import measure
from common.sweep.group import Group, Problem, Snapshot

TREES = ("params", "state", "context", "numbers")
MASKS = ("active", "failed", "skipped", "draws")
COUNTS = ("epoch", "step", "batches", "seconds")

PERTURBED = (0.8, 1.25)
"""Factors of population-based training on a copied member's numbers (of one minus the number, for averages)."""

AVERAGES = ("momentum", "ema", "beta_1", "beta_2")


class Stage(NamedTuple):
    """Training up to an epoch, and what follows: "keep" the best n, "copy" the best n over the worst n, or nothing."""

    until: int
    then: str = ""
    members: int = 0


def halving(members: int, epochs: int, factor: int) -> list[Stage]:
    """Return the stages of successive halving: each keeps one in `factor` and trains `factor` times as long."""
    rounds = min(int(math.log(max(members, 1), factor) + 1e-9), int(math.log(max(epochs, 1), factor) + 1e-9))
    stages = []
    for left in range(rounds, 0, -1):
        members = math.ceil(members / factor)
        stages.append(Stage(max(1, round(epochs / factor**left)), "keep", members))
    return [*stages, Stage(epochs)]


def population(members: int, epochs: int, every: int) -> list[Stage]:
    """Return the stages of population-based training: every few epochs the best quarter replaces the worst."""
    return [*(Stage(until, "copy", members // 4) for until in range(every, epochs, every)), Stage(epochs)]


class Member(NamedTuple):
    """A run between stages."""

    row: int
    at: Snapshot


@dataclasses.dataclass
class Sweep:
    """A sweep in a folder.

    Attributes:
        problem: the runs.
        rows: the runs of this process.
        stages: the stages.
        size: number of models per group.
        folder: folder of the checkpoints.
        by: metric for selections.
        record: function of every member's metrics, after every epoch.
        watch: function called after every step with the number of steps and a function that saves.
        seed: seed of the perturbations.
        last: the last metrics of every run.
        reasons: why runs were frozen.
    """

    problem: Problem
    rows: list[int]
    stages: list[Stage]
    size: int
    folder: Path
    by: str
    record: Callable[[list[dict[str, Any]]], None]
    watch: Callable[[int, Callable[[], None]], None] = lambda step, save: None
    seed: int = 0
    last: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    reasons: dict[int, str] = dataclasses.field(default_factory=dict)

    def run(self) -> None:
        """Train all stages; those that a checkpoint has are not repeated."""
        members: list[Member] | None = None
        done, rows = self._begun()
        for number, stage in list(enumerate(self.stages))[done:]:
            ends: list[Member] = []
            for place, part in enumerate(_parts(rows, self.size)):
                group = Group(self.problem, part)
                group.reasons.update({row: self.reasons[row] for row in part if row in self.reasons})
                start = None if members is None else _joined(members[place * self.size :][: len(part)])
                lines, at = self._train(group, stage, _path(self.folder, number, place), start)
                self.last.update({line["run"]: line for line in lines})
                self.reasons.update(group.reasons)
                if stage is not self.stages[-1]:  # at the end nothing is selected, and nothing stays in memory
                    ends += [Member(row, _member(at, m)) for m, row in enumerate(part)]
            for path in (path for earlier in range(number) for path in self._checkpoints(earlier)):
                path.unlink()  # that of the first group goes first: see `_begun`
            members = self._selected(ends, stage, number)
            rows = [member.row for member in members]

    def _checkpoints(self, stage: int) -> list[Path]:
        """Return the checkpoints of a stage, by group."""
        found = self.folder.glob(f"stage-{stage}-group-*.pt")
        return sorted(found, key=lambda path: int(path.stem.rpartition("-")[2]))

    def _begun(self) -> tuple[int, list[int]]:
        """Return the first stage that has a checkpoint of its first group, and the rows of its groups.

        The checkpoints of a stage are deleted when all groups of the next one have ended, so those of a first stage
        other than 0 are complete.
        """
        first = next((number for number in range(len(self.stages)) if _path(self.folder, number, 0).exists()), 0)
        rows = []
        for path in self._checkpoints(first) if first else ():
            with understood(path, CheckpointError):
                rows += [int(line["run"]) for line in load_checkpoint(path)[1]["lines"]]
        kept = min([stage.members for stage in self.stages[:first] if stage.then == "keep"], default=len(self.rows))
        if first and len(rows) != kept:
            raise CheckpointError(f"{self.folder} lacks checkpoints of stage {first}: start again with --overwrite")
        return first, rows or self.rows

    def _train(
        self, group: Group, stage: Stage, path: Path, start: Snapshot | None
    ) -> tuple[list[dict[str, Any]], Snapshot]:
        """Train a group to the end of a stage, from its checkpoint if there is one; return its last metrics."""
        like = group.start()
        at = start or like
        lines = self._lines(group, at)
        if path.exists():
            at, lines = _load(path, like, group)
            if at.batches == 0:  # a kill may have come between the checkpoint and this
                self.record(lines)
        elif start is None:
            self.record(lines)
        while at.epoch < stage.until:
            save = partial(_save, path, lines, group.reasons)
            at = group.epoch(at, partial(self._watched, save))
            lines = self._lines(group, at)
            _save(path, lines, group.reasons, at)
            self.record(lines)
            at = at._replace(skipped=torch.zeros_like(at.skipped))
        return lines, at

    def _watched(self, save: Callable[[Snapshot], None], at: Snapshot) -> None:
        self.watch(at.step, partial(save, at))

    def _lines(self, group: Group, at: Snapshot) -> list[dict[str, Any]]:
        numbers = {name: value.tolist() for name, value in at.numbers.items()}
        return [
            {"run": row, **line, **{name: values[m] for name, values in numbers.items()}}
            | ({"stopped": group.reasons[row]} if row in group.reasons else {})
            for m, (row, line) in enumerate(zip(group.members, measure(group, at), strict=True))
        ]  # fmt: skip

    def _selected(self, ends: list[Member], stage: Stage, number: int) -> list[Member]:
        """Return the members of the next stage."""
        ranked = sorted(ends, key=lambda member: (score(self.last[member.row], self.by), member.row))
        if stage.then == "keep":
            kept = {member.row for member in ranked[: stage.members]}
            return [member for member in ends if member.row in kept]
        if stage.then == "copy":
            sound = [member for member in ranked if math.isfinite(score(self.last[member.row], self.by))]
            worst = [member.row for member in ranked[: -stage.members - 1 : -1]]
            better = dict(zip(worst, itertools.cycle(sound[: stage.members]), strict=False)) if sound else {}
            for row in better:
                self.reasons.pop(row, None)  # it goes on as a copy
            return [self._copied(member, better.get(member.row), number) for member in ends]
        return ends

    def _copied(self, member: Member, best: Member | None, number: int) -> Member:
        """Return the best member in the place of another, with perturbed numbers; data and noise stay the other's."""
        if best is None:
            return member
        generator = torch.Generator().manual_seed(((self.seed * 1_000_003 + number) * 1_000_003 + member.row) % 2**63)
        at = best.at._replace(active=torch.ones_like(best.at.active), failed=torch.zeros_like(best.at.failed))
        for name, value in at.numbers.items():
            factor = PERTURBED[int(torch.randint(2, (), generator=generator))]
            new = 1 - factor * (1 - value) if name in AVERAGES else factor * value
            new = new.clamp(0, 1 - 1e-4) if name in AVERAGES else new
            at = at._replace(numbers={**at.numbers, name: new}, state=_with_number(at.state, name, factor, new))
        return Member(member.row, at)


def score(line: Mapping[str, Any], by: str) -> float:
    """Return the metric of a run; infinite if the run was frozen or the number is not finite."""
    value = line.get(by)
    bad = value is None or not math.isfinite(value) or not line.get("active", 1)
    return math.inf if bad else float(value)  # type: ignore[arg-type]


def _with_number(state: Any, name: str, factor: float, new: Tensor) -> Any:
    """Return the state of an optimizer whose curvature has the new damping or average weight."""
    curvature = getattr(state, "curvature", None)
    if curvature is None or name not in ("damping", "ema"):
        return state
    # an adaptive damping has moved away from its start, so it is multiplied
    value = factor * curvature.damping if name == "damping" else new.to(curvature.ema.dtype)
    return state._replace(curvature=curvature._replace(**{name: value}))


def _path(folder: Path, stage: int, group: int) -> Path:
    """Return the checkpoint of a group in a stage."""
    return folder / f"stage-{stage}-group-{group}.pt"


def _parts(rows: Sequence[int], size: int) -> Iterator[list[int]]:
    for first in range(0, len(rows), size):
        yield list(rows[first : first + size])


def _member(at: Snapshot, place: int) -> Snapshot:
    """Return one member of a snapshot as a group of one."""
    trees = {name: _taken(getattr(at, name), [place]) for name in (*TREES, "active", "failed", "skipped")}
    return at._replace(seconds=at.seconds / len(at.active), **trees)


def _joined(members: Sequence[Member]) -> Snapshot:
    """Return the snapshot of a group from those of its members."""
    first = members[0].at
    # the last batch of an epoch may be smaller: a member whose steps fail keeps statistics of another size
    like = next((member.at for member in members if not bool(member.at.failed.any())), first)

    def joined(example: Tensor, *leaves: Tensor) -> Tensor:
        return torch.cat([ff.tree.kept(example, leaf) for leaf in leaves])

    trees = {
        name: ff.tree.map(joined, getattr(like, name), *(getattr(member.at, name) for member in members))
        for name in (*TREES, "active", "failed", "skipped")
    }
    return first._replace(seconds=sum(member.at.seconds for member in members), **trees)


def _taken(tree: Any, places: list[int]) -> Any:
    return ff.members.take(tree, places) if ff.tree.leaves(tree) else tree


def _save(path: Path, lines: list[dict[str, Any]], reasons: Mapping[int, str], at: Snapshot) -> None:
    trees = {name: getattr(at, name) for name in (*TREES, *MASKS)}
    meta = {name: getattr(at, name) for name in COUNTS}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(
        path, ff.tree.flatten(trees), meta | {"lines": lines, "reasons": {str(k): v for k, v in reasons.items()}}
    )


def _load(path: Path, like: Snapshot, group: Group) -> tuple[Snapshot, list[dict[str, Any]]]:
    flat, meta = load_checkpoint(path)
    with understood(path, CheckpointError):
        draws, lines, counts = flat.pop("draws"), meta["lines"], {name: meta[name] for name in COUNTS}
        group.reasons.update({int(row): reason for row, reason in meta["reasons"].items()})
    trees = ff.tree.unflatten({name: getattr(like, name) for name in (*TREES, *MASKS) if name != "draws"}, flat)
    trees = ff.tree.map(lambda leaf: leaf.to(like.active.device), trees)
    at = Snapshot(**trees, draws=draws, **counts)
    if at.batches == 0:
        at = at._replace(skipped=torch.zeros_like(at.skipped))
    return at, lines


def append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Add metrics to a file, one line each, and write them to disk; numbers that are not finite become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clean = [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()} for line in lines
    ]
    text = "".join(json.dumps(line) + "\n" for line in clean)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            text = text if file.read() == b"\n" else "\n" + text  # after a line that was cut off
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """Return all metrics of a file, once per run and epoch: a resumed sweep writes some again; null becomes NaN."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    with understood(path, MetricsError):
        for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:  # cut off by a kill
                continue
            found[line["run"], line["epoch"]] = {k: math.nan if v is None else v for k, v in line.items()}
        return [found[key] for key in sorted(found)]


def plain(content: Any) -> Any:
    """Return what a JSON file makes of this: tuples become lists."""
    return json.loads(json.dumps(content))


def read_settings(path: Path) -> dict[str, Any]:
    """Read the JSON file of a sweep; its entry "settings" is a dict."""
    with understood(path, ConfigError):
        content: dict[str, Any] = json.loads(path.read_text())
        content["settings"].items()
    return content


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(content, indent=1) + "\n")
