"""The training loop that all trainers share: a generator of epochs, resumable because nothing in it is hidden.

Every random number derives from (seed, epoch): the order of the examples and the Fisher's labels, whose generator is
part of a snapshot. So a run that goes on from any step is the straight run.
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
from common.optimizers import Optimizer, Tree

PATIENCE = 10
"""Consecutive steps (or a whole epoch) that may be skipped as not ok before the run stops with the reason."""


class Task(NamedTuple):
    """What is trained: the model in training and in evaluation mode, the data, and how losses are reported.

    Attributes:
        model: `(params, x, context) -> (outputs, context)` in training mode.
        predict: the same in evaluation mode.
        params: initial parameters.
        context: initial buffers.
        likelihood: of the outputs.
        train: inputs and targets, in memory.
        test: the same, held out.
        per_output: what losses are divided by when reported: outputs an example for autoencoders, else 1.
        drops: whether the model drops units in training mode, so that each step draws seeds for its examples.
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
        """The context of one step: with dropout's seeds for its examples, where the model needs them."""
        return context | {"dropout": ff.dropout_seeds(examples, generator)} if self.drops else context


class Snapshot(NamedTuple):
    """Where a run stands, after any step: all that a checkpoint needs.

    Attributes:
        params: the parameters; where several nets play, by player.
        context: buffers, likewise.
        state: the optimizer's.
        epoch: epochs that are finished.
        step: steps that were made, skipped ones included.
        seconds: of training.
        batches: steps of the epoch that is not finished.
        skipped: how many of these were not ok.
        in_a_row: how many of these came last.
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
"""Called after every step with its number and a way to the snapshot; it may save it, or raise to end the run."""


class Epoch(NamedTuple):
    """A finished epoch: the snapshot, and one line of metrics."""

    snapshot: Snapshot
    metrics: dict[str, float]


class Settings(NamedTuple):
    """How a run goes through the data."""

    num_epochs: int
    batch_size: int
    seed: int = 0
    num_workers: int = 0
    progress: bool = True
    label: str = ""


def start(task: Task, optimizer: Optimizer) -> Snapshot:
    """The snapshot before the first step."""
    return Snapshot(task.params, task.context, optimizer.init(task.params), 0, 0, 0.0)


def train(
    task: Task, optimizer: Optimizer, snapshot: Snapshot, settings: Settings, watch: Watch = lambda step, at: None
) -> Iterator[Epoch]:
    """Train from `snapshot` on, yielding each epoch; a fresh run yields its starting point first.

    `seconds` counts training only, not evaluation. A step that is not ok is skipped, params and state as they were;
    after `PATIENCE` in a row the typed error that explains it is raised.
    """
    if snapshot.step == 0:
        yield Epoch(snapshot, measure(task, snapshot, skipped=0))
    while snapshot.epoch < settings.num_epochs:
        snapshot, skipped = _epoch(task, optimizer, snapshot, settings, watch)
        yield Epoch(snapshot, measure(task, snapshot, skipped))


def sound(info: ff.Info) -> bool:
    """Whether the step was ok: one wait for the device, not one a layer."""
    return bool(torch.stack(list(info.ok.values())).all())


def measure(task: Task, snapshot: Snapshot, skipped: int) -> dict[str, float]:
    """Losses over the whole training and test set with the parameters as they are, in nats an output or example."""
    train_loss, train_accuracy = evaluate(task, snapshot, task.train)
    test_loss, test_accuracy = evaluate(task, snapshot, task.test)
    metrics = {"epoch": snapshot.epoch, "step": snapshot.step, "train_loss": train_loss, "test_loss": test_loss}
    if train_accuracy is not None and test_accuracy is not None:
        metrics |= {"train_accuracy": train_accuracy, "test_accuracy": test_accuracy}
    return metrics | {"seconds": snapshot.seconds, "skipped": skipped}


@torch.no_grad()
def evaluate(task: Task, snapshot: Snapshot, data: tuple[Tensor, Tensor]) -> tuple[float, float | None]:
    """Mean loss, and accuracy where targets are classes."""
    total, right = 0.0, 0
    classes = not data[1].is_floating_point()
    batch_size = 2048 if data[0].ndim == 2 else 256  # a convolution makes many more numbers of an image than it has
    for x, y in zip(data[0].split(batch_size), data[1].split(batch_size), strict=True):
        outputs, _ = task.predict(snapshot.params, x, snapshot.context)
        total += float(task.likelihood.nll(outputs, y).double().sum())
        right += int((outputs.argmax(-1) == y).sum()) if classes else 0
    examples = data[0].shape[0]
    return total / examples / task.per_output, right / examples if classes else None


def _epoch(task: Task, optimizer: Optimizer, at: Snapshot, settings: Settings, watch: Watch) -> tuple[Snapshot, int]:
    """What is left of an epoch: the snapshot at its end, and how many steps were skipped."""
    draws = generator_of(settings.seed, at.epoch, stream=1)
    if at.draws.numel():
        draws.set_state(at.draws)
    total = math.ceil(task.train[0].shape[0] / settings.batch_size)
    batches = _batches(task, settings, generator_of(settings.seed, at.epoch, stream=0), at.batches)
    title = f"{settings.label} epoch {at.epoch + 1}/{settings.num_epochs}"
    # None: no bar where nobody watches (output that is not a terminal)
    quiet = None if settings.progress else True
    bar = tqdm(batches, desc=title, disable=quiet, leave=False, unit="step", initial=at.batches, total=total)
    began, first = time.perf_counter(), at
    for batch in bar:
        labels = optimizer.draw(batch, draws)
        context = task.seeded(at.context, batch[0].shape[0], draws)
        new = optimizer.step(at.params, at.state, batch, context, labels, at.step)
        at = at._replace(step=at.step + 1, batches=at.batches + 1)
        if sound(new.info):
            buffers = {name: new.context[name] for name in at.context}  # all but the seeds
            at = at._replace(params=new.params, state=new.state, context=buffers, in_a_row=0)
        else:
            at = at._replace(skipped=at.skipped + 1, in_a_row=at.in_a_row + 1)
        if at.in_a_row >= min(PATIENCE, total):
            bar.close()
            ff.check(new.info)
        seconds = time.perf_counter() - began
        rate = (at.step - first.step) * settings.batch_size / seconds
        bar.set_postfix_str(f"loss {float(new.info.loss) / task.per_output:.4g}, {rate:,.0f} examples/s", refresh=False)
        now = at._replace(seconds=first.seconds + seconds)
        watch(at.step, partial(with_draws, now, draws))
    done = Snapshot(at.params, at.context, at.state, at.epoch + 1, at.step, first.seconds + time.perf_counter() - began)
    return done, at.skipped


def with_draws(at: Snapshot, draws: torch.Generator) -> Snapshot:
    """The snapshot within an epoch, from which the generator goes on as it is now."""
    return at._replace(draws=draws.get_state())


def _batches(task: Task, settings: Settings, generator: torch.Generator, done: int) -> DataLoader[Any]:
    """Shuffled batches less those that are done; the last one may be shorter.

    A batch is one indexing operation, not one an example.
    """
    order = torch.randperm(task.train[0].shape[0], generator=generator).tolist()[done * settings.batch_size :]
    sampler = BatchSampler(order, settings.batch_size, drop_last=False)
    # a generator of its own: the loader would take its base seed from the global one
    own = torch.Generator().manual_seed(0)
    dataset = TensorDataset(*task.train)
    # examples on a GPU are indexed there, and a forked process could not touch them
    workers = settings.num_workers if task.train[0].device.type == "cpu" else 0
    return DataLoader(dataset, batch_size=None, sampler=sampler, num_workers=workers, generator=own)


def generator_of(seed: int, epoch: int, stream: int) -> torch.Generator:
    """The generator of an epoch; streams are independent of each other."""
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) * 2 + stream)
