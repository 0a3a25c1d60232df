"""The training loop of all trainers: a generator of epochs, which can be resumed from any snapshot.

Every random number derives from (seed, epoch): the order of the examples and the labels of the Fisher, whose generator
is part of a snapshot. A run that resumes from any step is therefore identical to the uninterrupted run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, TensorDataset
from tqdm.auto import tqdm

import fisherfn as ff
from common import ranks
from common.steps import Optimizer, Tree
from fisherfn.errors import HyperparameterError

PATIENCE = 10
"""Number of consecutive steps (or a whole epoch) that may fail their checks before the run stops with the reason."""


class Task(NamedTuple):
    """A training task: the model in training and in evaluation mode, the data, and the scale of reported losses.

    Attributes:
        model: `(params, x, context) -> (outputs, context)` in training mode.
        predict: the same in evaluation mode.
        params: initial parameters.
        context: initial buffers.
        likelihood: likelihood of the outputs.
        train: inputs and targets, in memory.
        test: the same, held out.
        per_output: divisor of reported losses: outputs per example for autoencoders, else 1.
        drops: True if the model has dropout, so that each step needs seeds for its examples.
    """

    model: Any
    predict: Any
    params: Tree
    context: Tree
    likelihood: ff.Likelihood
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    per_output: int
    drops: bool = False

    def seeded(self, context: Tree, examples: int, generator: torch.Generator) -> Tree:
        """Return the context of one step, with dropout seeds for its examples if the model needs them."""
        return context | {"dropout": ff.dropout_seeds(examples, generator)} if self.drops else context


class Snapshot(NamedTuple):
    """The state of a run after any step: the contents of a checkpoint.

    Attributes:
        params: the parameters; for several nets, by player.
        context: the buffers, likewise.
        state: state of the optimizer.
        epoch: finished epochs.
        step: steps so far, including skipped ones.
        seconds: training time.
        batches: steps of the unfinished epoch.
        skipped: number of these that failed a check.
        in_a_row: number of consecutive failures at the end.
        draws: state of the generator of the Fisher's labels; empty between epochs.
    """

    params: Any
    context: Any
    state: Any
    epoch: int
    step: int
    seconds: float
    batches: int = 0
    skipped: int = 0
    in_a_row: int = 0
    draws: Tensor = torch.empty(0, dtype=torch.uint8)


Watch = Callable[[int, Callable[[], Snapshot]], None]
"""Function called after every step with its number and access to the snapshot; it may save it or end the run."""


class Epoch(NamedTuple):
    """A finished epoch: the snapshot, and one line of metrics."""

    snapshot: Snapshot
    metrics: dict[str, float]


class Settings(NamedTuple):
    """Settings of the loop: epochs, batches and data loading."""

    num_epochs: int
    batch_size: int
    seed: int = 0
    num_workers: int = 0
    progress: bool = True
    label: str = ""


def start(task: Task, optimizer: Optimizer) -> Snapshot:
    """Return the snapshot before the first step."""
    return Snapshot(task.params, task.context, optimizer.init(task.params), 0, 0, 0.0)


def train(
    task: Task, optimizer: Optimizer, snapshot: Snapshot, settings: Settings, watch: Watch = lambda step, at: None
) -> Iterator[Epoch]:
    """Train from `snapshot` and yield each epoch; a new run yields its starting point first.

    `seconds` counts training only, not evaluation. A step that fails a check is skipped, with params and state
    unchanged. After `PATIENCE` failures in a row the typed error is raised.

    Raises:
        HyperparameterError: all steps of a new run were rejected.
    """
    if snapshot.step == 0:
        yield Epoch(snapshot, measure(task, snapshot, skipped=0))
    first, rejected, failed = snapshot.step, 0, 0
    while snapshot.epoch < settings.num_epochs:
        snapshot, skipped, more = _epoch(task, optimizer, snapshot, settings, watch)
        rejected, failed = rejected + more, failed + skipped
        yield Epoch(snapshot, measure(task, snapshot, skipped))
    if first == 0 and rejected and rejected + failed == snapshot.step:
        raise HyperparameterError(
            f"all {rejected} steps were rejected, because they increased the loss, so the net has not changed: give a "
            "smaller learning rate or a larger damping, or neither."
        )


def sound(info: ff.Info) -> bool:
    """Return True if the step passed its checks, with one synchronisation instead of one per layer."""
    return bool(torch.stack(list(info.ok.values())).all())


def measure(task: Task, snapshot: Snapshot, skipped: int) -> dict[str, float]:
    """Compute losses over the whole training and test set, in nats per output or example."""
    train_loss, train_accuracy = evaluate(task, snapshot, task.train)
    test_loss, test_accuracy = evaluate(task, snapshot, task.test)
    metrics = {"epoch": snapshot.epoch, "step": snapshot.step, "train_loss": train_loss, "test_loss": test_loss}
    if train_accuracy is not None and test_accuracy is not None:
        metrics |= {"train_accuracy": train_accuracy, "test_accuracy": test_accuracy}
    return metrics | {"seconds": snapshot.seconds, "skipped": skipped}


@torch.no_grad()
def evaluate(task: Task, snapshot: Snapshot, data: tuple[Tensor, Tensor]) -> tuple[float, float | None]:
    """Return the mean loss, and the accuracy if the targets are classes."""
    total, right, examples = 0.0, 0.0, data[0].shape[0]
    classes = not data[1].is_floating_point()
    data = data[0][ranks.part(examples)], data[1][ranks.part(examples)]
    batch_size = 2048 if data[0].ndim == 2 else 256  # the outputs of a convolution are many times the size of an image
    for x, y in zip(data[0].split(batch_size), data[1].split(batch_size), strict=True):
        outputs, _ = task.predict(snapshot.params, x, snapshot.context)
        total += float(task.likelihood.nll(outputs, y).double().sum())
        right += int((outputs.argmax(-1) == y).sum()) if classes else 0
    total, right = ranks.added("evaluation", total, right)
    return total / examples / task.per_output, right / examples if classes else None


def _epoch(
    task: Task, optimizer: Optimizer, at: Snapshot, settings: Settings, watch: Watch
) -> tuple[Snapshot, int, int]:
    """Run the rest of an epoch; return the snapshot at its end, and the numbers of skipped and of rejected steps."""
    draws = generator_of(settings.seed, at.epoch, stream=1)
    if at.draws.numel():
        draws.set_state(at.draws)
    total = math.ceil(task.train[0].shape[0] / settings.batch_size)
    batches = _batches(task, settings, generator_of(settings.seed, at.epoch, stream=0), at.batches)
    title = f"{settings.label} epoch {at.epoch + 1}/{settings.num_epochs}"
    # None: no bar if the output is not a terminal
    quiet = None if settings.progress else True
    bar = tqdm(batches, desc=title, disable=quiet, leave=False, unit="step", initial=at.batches, total=total)
    began, first, rejected = time.perf_counter(), at, 0
    for batch in bar:
        labels = optimizer.draw(batch, draws)
        context = _context(task, at, settings, draws)
        new = optimizer.step(at.params, at.state, batch, context, labels, at.step)
        at = at._replace(step=at.step + 1, batches=at.batches + 1)
        if sound(new.info):
            buffers = {name: new.context[name] for name in at.context}  # everything except the seeds
            at = at._replace(params=new.params, state=new.state, context=buffers, in_a_row=0)
        else:
            at = at._replace(skipped=at.skipped + 1, in_a_row=at.in_a_row + 1)
        rejected += bool(new.info.adapted and new.info.adapted.rejected)
        if at.in_a_row >= min(PATIENCE, total):
            bar.close()
            ff.check(new.info)
        seconds = time.perf_counter() - began
        rate = (at.step - first.step) * settings.batch_size / seconds
        bar.set_postfix_str(f"loss {float(new.info.loss) / task.per_output:.4g}, {rate:,.0f} examples/s", refresh=False)
        now = at._replace(seconds=first.seconds + seconds)
        watch(at.step, partial(with_draws, now, draws))
    done = Snapshot(at.params, at.context, at.state, at.epoch + 1, at.step, first.seconds + time.perf_counter() - began)
    return done._replace(in_a_row=at.in_a_row), at.skipped, rejected


def _context(task: Task, at: Snapshot, settings: Settings, draws: torch.Generator) -> Tree:
    """Return the context of the next step; seeds are drawn for the global batch, of which this process has a part."""
    examples = min(settings.batch_size, task.train[0].shape[0] - at.batches * settings.batch_size)
    context = task.seeded(at.context, examples, draws)
    return context | {"dropout": context["dropout"][ranks.part(examples)]} if task.drops else context


def with_draws(at: Snapshot, draws: torch.Generator) -> Snapshot:
    """Return a snapshot within an epoch, with the current state of the generator."""
    return at._replace(draws=draws.get_state())


def _batches(task: Task, settings: Settings, generator: torch.Generator, done: int) -> DataLoader[Any]:
    """Yield this process's part of shuffled batches, without those that are done; the last one may be shorter.

    A batch is one indexing operation, not one per example.
    """
    order = torch.randperm(task.train[0].shape[0], generator=generator).tolist()[done * settings.batch_size :]
    whole = BatchSampler(order, settings.batch_size, drop_last=False)
    sampler = [batch[ranks.part(len(batch))] for batch in whole]
    # its own generator: the loader would take its base seed from the global one
    own = torch.Generator().manual_seed(0)
    dataset = TensorDataset(*task.train)
    # examples on a GPU are indexed there; a forked process could not access them
    workers = settings.num_workers if task.train[0].device.type == "cpu" else 0
    # tuples, because a list of the same tensors would be another kind of call of a compiled step
    return DataLoader(
        dataset, batch_size=None, sampler=sampler, num_workers=workers, generator=own, collate_fn=tuple
    )  # fmt: skip


def generator_of(seed: int, epoch: int, stream: int) -> torch.Generator:
    """Return the generator of an epoch; streams are independent of each other."""
    return torch.Generator().manual_seed(((seed * 1_000_003 + epoch) * 2 + stream) % 2**63)
