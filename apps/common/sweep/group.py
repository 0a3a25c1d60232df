"""A group of runs that share every step: one vmapped optimizer, with its own numbers, start and data for each member.

A member's run equals the single run of its configuration, because every random number depends on its seed and epoch
alone. A member whose steps fail `PATIENCE` times in a row is frozen: it is computed on but no longer changes, so the
others are not touched.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fisherfn as ff
from common.config import ConfigError
from common.loop import PATIENCE, Task, generator_of
from common.steps import Optimizer, Stepped, Tree
from common.train_config import TrainConfig
from common.trainer import NUMBERS, natural_gradient, numbers, optimizer_with

MakeTask = Callable[[TrainConfig], Task]
"""Function from the configuration of a run to its model, start and data."""


class Snapshot(NamedTuple):
    """The state of a group after any step.

    Attributes:
        params: parameters, with the members as first axis, as everything in `state`, `context` and `numbers`.
        state: states of the optimizers.
        context: buffers.
        numbers: swept numbers by name.
        active: whether a member still changes.
        failed: number of its steps that failed, at the end of the run.
        skipped: number of steps of this epoch that failed.
        epoch: finished epochs.
        step: steps so far.
        batches: steps of the unfinished epoch.
        seconds: training time of the group.
        draws: states of the generators of labels and dropout, by seed; empty between epochs.
    """

    params: Tree
    state: Any
    context: Tree
    numbers: Tree
    active: Tensor
    failed: Tensor
    skipped: Tensor
    epoch: int = 0
    step: int = 0
    batches: int = 0
    seconds: float = 0.0
    draws: Tensor = torch.empty(0, dtype=torch.uint8)


Watch = Callable[[Snapshot], None]
"""Function called after every step."""


class Problem:
    """The runs of a sweep: their configurations and tasks, and the natural gradient that they share."""

    def __init__(
        self, config: TrainConfig, rows: Sequence[Mapping[str, Any]], make_task: MakeTask, *, shared_data: bool = False
    ) -> None:
        self.config, self.rows, self.make_task, self.shared_data = config, rows, make_task, shared_data
        self._tasks: dict[tuple[int, str], Task] = {}
        self.task = self.task_of(0)
        self.ng = natural_gradient(config, self.task) if config.optim in ff.METHODS else None
        self.swept = [name for name in NUMBERS if name in rows[0]]
        self.fixed = {name: value for name, value in numbers(config).items() if name not in self.swept}
        self.compiled = ff.compile(self.advance) if config.compile else None
        self.optimizer = optimizer_with(config, self.task, self.ng, numbers(config))
        if self.optimizer.move is None:
            raise ConfigError(f"{config.optim} has no step that can be vmapped")

    def seed(self, row: int) -> int:
        """Return the seed of a run."""
        return int(self.rows[row].get("seed", self.config.seed))

    def task_of(self, row: int) -> Task:
        """Return the task of a run; runs with the same start share it."""
        config = self.config_of(row)
        key = (config.seed, config.init_params)
        if key not in self._tasks:
            task = self.make_task(config)
            first = next(iter(self._tasks.values()), task)
            # most data do not depend on the seed: one copy is enough
            parts = [a if _same(a, b) else b for a, b in ((first.train, task.train), (first.test, task.test))]
            self._tasks[key] = task._replace(train=parts[0], test=parts[1])
        return self._tasks[key]

    def config_of(self, row: int) -> TrainConfig:
        """Return the configuration of the single run."""
        return dataclasses.replace(self.config, **self.rows[row])

    def with_numbers(self, given: Mapping[str, Any]) -> Optimizer:
        """Return the optimizer with these values of the swept numbers."""
        return optimizer_with(self.config, self.task, self.ng, {**self.fixed, **given})

    def advance(
        self, given: Tree, params: Tree, state: Any, context: Tree, drops: Any, batch: Any, labels: Any, *,
        own_seeds: bool, own_batches: bool, update: bool, invert: bool,
    ) -> Stepped:  # fmt: skip
        """Compute the step of all members of any group: a compiled step is traced once for groups of equal size.

        Each member has its own labels and dropout seeds with `own_seeds`, and its own batch with `own_batches`.
        """
        by_seed = 0 if own_seeds else None
        dims = (0, 0, 0, 0, by_seed, 0 if own_batches else None, by_seed)
        one = partial(self._one, update=update, invert=invert)
        everything = (given, params, state, context, drops, batch, labels)
        if ff.members.size(params) == 1:  # without vmap, whose overhead a single model would pay for nothing
            alone = [each if dim is None else ff.tree.map(lambda leaf: leaf[0], each)
                     for each, dim in zip(everything, dims, strict=True)]  # fmt: skip
            return ff.tree.map(lambda leaf: leaf.unsqueeze(0), one(*alone))
        filled = tuple(dim if ff.tree.leaves(each) else None for each, dim in zip(everything, dims, strict=True))
        new: Stepped = torch.vmap(one, in_dims=filled)(*everything)
        return ff.tree.map(lambda leaf: leaf.contiguous(), new)  # the strides, too, are those of the next step

    def _one(
        self, given: Tree, params: Tree, state: Any, context: Tree, drops: Any, batch: Any, labels: Any, *,
        update: bool, invert: bool,
    ) -> Stepped:  # fmt: skip
        move = self.with_numbers(given).move
        assert move is not None
        new = move(params, state, batch, {**context, **drops}, labels, update, invert)
        kept = {name: new.context[name] for name in context}
        return new._replace(context=kept, info=new.info._replace(context=()))


class Group:
    """Runs that take their steps together.

    Args:
        problem: the runs.
        members: the rows of this group.
        plain: True runs its steps uncompiled, even if the configuration compiles them.
    """

    def __init__(self, problem: Problem, members: Sequence[int], *, plain: bool = False) -> None:
        self.problem, self.members = problem, list(members)
        self.seeds = sorted({problem.seed(row) for row in members})
        self.seed_of = torch.tensor([self.seeds.index(problem.seed(row)) for row in members])
        self.reasons: dict[int, str] = {}
        self._compiled = None if plain else problem.compiled

    # ------------------------------------------------------------------------------------------------------- start

    def start(self) -> Snapshot:
        """Return the snapshot before the first step."""
        problem, like = self.problem, next(iter(self.problem.task.params.values()))
        tasks = [problem.task_of(row) for row in self.members]
        dtype, count = torch.promote_types(like.dtype, torch.float32), len(self.members)
        swept = {
            name: torch.tensor(
                [float(problem.rows[row][name]) for row in self.members], dtype=dtype, device=like.device
            )
            for name in problem.swept
        }
        params = ff.members.stack([task.params for task in tasks])
        context = ff.members.stack([task.context for task in tasks]) if problem.task.context else {}
        state = torch.vmap(lambda given, p: problem.with_numbers(given).init(p), in_dims=(0, 0))(swept, params)
        active = torch.ones(count, dtype=torch.bool, device=like.device)
        none = torch.zeros(count, dtype=torch.int64, device=like.device)
        state = ff.tree.map(lambda leaf: leaf.clone(memory_format=torch.contiguous_format), state)
        return Snapshot(params, state, context, swept, active, none, none)

    # -------------------------------------------------------------------------------------------------------- data

    @cached_property
    def data(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Inputs and targets by seed; a single entry if all seeds have the same."""
        problem = self.problem
        first = {problem.seed(row): problem.task_of(row).train for row in reversed(self.members)}
        if problem.shared_data:
            return (problem.task_of(0).train,)
        splits = tuple(first[seed] for seed in self.seeds)
        return splits[:1] if all(_same(splits[0], other) for other in splits[1:]) else splits

    def batches(self, epoch: int, done: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch after the first `done`: by seed if seeds differ in data or order."""
        size, examples = self.problem.config.batch_size, self.data[0][0].shape[0]
        seeds = [self.problem.seed(0)] if self.problem.shared_data else self.seeds
        orders = [torch.randperm(examples, generator=generator_of(seed, epoch, stream=0)) for seed in seeds]
        for first in range(done * size, examples, size):
            parts = [order[first : first + size] for order in orders]
            if len(parts) == 1:
                yield tuple(leaf[parts[0].to(leaf.device)] for leaf in self.data[0])  # type: ignore[misc]
                continue
            whole = [self.data[place if len(self.data) > 1 else 0] for place in range(len(parts))]
            found = [[leaf[part.to(leaf.device)] for leaf in split] for split, part in zip(whole, parts, strict=True)]
            yield tuple(torch.stack(leaves)[self.seed_of] for leaves in zip(*found, strict=True))  # type: ignore[misc]

    # ------------------------------------------------------------------------------------------------------- steps

    def epoch(self, at: Snapshot, watch: Watch = lambda at: None) -> Snapshot:
        """Train from a snapshot to the end of its epoch."""
        draws = [generator_of(seed, at.epoch, stream=1) for seed in self.seeds]
        for generator, state in zip(draws, at.draws, strict=False):
            generator.set_state(state.clone())  # a view into a larger tensor would be read from its start
        total = math.ceil(self.data[0][0].shape[0] / self.problem.config.batch_size)
        began = time.perf_counter() - at.seconds
        for batch in self.batches(at.epoch, at.batches):
            if not bool(at.active.any()):
                break
            at = self.step(at, batch, draws, patience=min(PATIENCE, total))
            at = at._replace(seconds=time.perf_counter() - began)
            watch(at._replace(draws=torch.stack([generator.get_state() for generator in draws])))
        rest = total - at.batches  # steps in which all members are frozen
        return at._replace(
            epoch=at.epoch + 1, step=at.step + rest, batches=0, draws=Snapshot._field_defaults["draws"]
        )  # fmt: skip

    def step(
        self, at: Snapshot, batch: tuple[Tensor, Tensor], draws: Sequence[torch.Generator], patience: int = PATIENCE
    ) -> Snapshot:
        """Take one step of every active member."""
        update, invert = self.problem.optimizer.cadence(at.step)
        random = self.random(batch, draws)
        moved = [(self._moved(at, batch, random, update, invert), torch.ones_like(at.active))]
        again = self.problem.optimizer.again
        if not (update and invert):
            mask = (torch.zeros_like(at.active) if again is None else again(at.state)) | lost(at)
            mask &= at.active
            if bool(mask.any()):  # the result of a member does not depend on whether others need this
                moved.append((self._moved(at, batch, random, True, True), mask))
        params, state, context = at.params, at.state, at.context
        sound = torch.zeros_like(at.active)
        for new, of in moved:
            sound = torch.where(of, ff.members.sound(new.info), sound)
        counts = sound & at.active
        if len(moved) == 1 and bool(counts.all()):
            params, state, context = new.params, new.state, new.context
        else:
            for new, of in moved:
                chosen = of & counts
                if bool(chosen.any()):  # else all keep what they have, also what has another shape
                    params, state, context = ff.members.select(
                        chosen, (new.params, new.state, new.context), (params, state, context)
                    )
        failed = torch.where(sound, 0, at.failed + 1)
        ends = at.active & (failed >= patience)
        for place in ends.nonzero().flatten().tolist():
            self._note(place, next(new.info for new, of in reversed(moved) if of[place]))
        return at._replace(
            params=params, state=state, context=context, active=at.active & ~ends,
            failed=torch.where(at.active, failed, at.failed), skipped=at.skipped + (at.active & ~sound).long(),
            step=at.step + 1, batches=at.batches + 1,
        )  # fmt: skip

    def random(self, batch: tuple[Tensor, Tensor], draws: Sequence[torch.Generator]) -> tuple[Any, Any]:
        """Draw labels and dropout seeds, by seed; a single one without an axis."""
        problem = self.problem
        one = batch if self._shared else tuple(leaf[0] for leaf in batch)
        labels, drops = [], []
        for generator in draws:
            labels.append(problem.optimizer.draw(one, generator))
            drops.append(problem.task.seeded({}, one[0].shape[0], generator))
        return self._by_member(labels), self._by_member(drops)

    def _by_member(self, found: list[Any]) -> Any:
        if len(found) == 1 or not ff.tree.leaves(found[0]):
            return found[0]
        return ff.members.take(ff.members.stack(found), self.seed_of)

    @property
    def _shared(self) -> bool:
        """Return True if all members have the same batches."""
        return self.problem.shared_data or len(self.seeds) == 1

    def _moved(self, at: Snapshot, batch: Any, random: tuple[Any, Any], update: bool, invert: bool) -> Stepped:
        labels, drops = random
        examples = batch[0].shape[0 if self._shared else 1]
        whole = min(self.problem.config.batch_size, self.data[0][0].shape[0])
        # as in the trainer, a smaller batch runs uncompiled: its graphs would double the minutes of compiling
        compiled = self._compiled if examples == whole else None
        return (compiled or self.problem.advance)(
            at.numbers, at.params, at.state, at.context, drops, batch, labels,
            own_seeds=len(self.seeds) > 1, own_batches=not self._shared, update=update, invert=invert,
        )  # fmt: skip

    def _note(self, place: int, info: ff.Info) -> None:
        """Remember why a member was frozen."""
        row = self.members[place]
        try:
            ff.check(ff.members.take(info, place))
        except ff.FisherfnError as error:
            self.reasons[row] = f"{type(error).__name__}: {error}"
        self.reasons.setdefault(row, "steps failed their checks")


def lost(at: Snapshot) -> Tensor:
    """Return for each active member whether its last step failed and left NaN where old statistics had another size.

    `ff.tree.kept` put it there. Only new statistics help, so these members do not wait for them.
    """
    failed = at.active & (at.failed > 0)
    if not bool(failed.any()):
        return failed
    count = len(failed)
    floating = [leaf for leaf in ff.tree.leaves(at.state) if leaf.is_floating_point()]
    nan = [leaf.reshape(count, leaf.numel() // count).isnan().any(1) for leaf in floating]
    return failed & torch.stack(nan).any(0) if nan else torch.zeros_like(failed)


def _same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    return all(a is b or (a.shape == b.shape and torch.equal(a, b)) for a, b in zip(one, other, strict=True))
