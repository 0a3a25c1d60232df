"""The training loop that all trainers share: a generator of epochs, resumable because nothing in it is hidden.

Every random number derives from (seed, epoch): the order of the examples and the Fisher's labels. So a run that goes on
from the end of an epoch is the straight run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
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
    """

    model: Any
    predict: Any
    params: Tree
    context: Tree
    likelihood: ff.Likelihood
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    per_output: int


class Snapshot(NamedTuple):
    """Where a run stands at the end of an epoch: all that a checkpoint needs."""

    params: Tree
    context: Tree
    state: Any
    epoch: int
    step: int
    seconds: float


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


def train(task: Task, optimizer: Optimizer, snapshot: Snapshot, settings: Settings) -> Iterator[Epoch]:
    """Train from `snapshot` on, yielding each epoch; a fresh run yields its starting point first.

    `seconds` counts training only, not evaluation. A step that is not ok is skipped, params and state as they were;
    after `PATIENCE` in a row the typed error that explains it is raised.
    """
    if snapshot.epoch == 0:
        yield Epoch(snapshot, measure(task, snapshot, skipped=0))
    while snapshot.epoch < settings.num_epochs:
        snapshot, skipped = _epoch(task, optimizer, snapshot, settings)
        yield Epoch(snapshot, measure(task, snapshot, skipped))


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


def _epoch(task: Task, optimizer: Optimizer, at: Snapshot, settings: Settings) -> tuple[Snapshot, int]:
    params, context, state, epoch, step, seconds = at
    draws = _generator(settings.seed, epoch, stream=1)
    batches = _batches(task, settings, _generator(settings.seed, epoch, stream=0))
    title = f"{settings.label} epoch {epoch + 1}/{settings.num_epochs}"
    # None: no bar where nobody watches (output that is not a terminal)
    bar = tqdm(batches, desc=title, disable=None if settings.progress else True, leave=False, unit="step")
    skipped = in_a_row = 0
    began = time.perf_counter()
    for batch in bar:
        new = optimizer.step(params, state, batch, context, optimizer.draw(batch, draws), step)
        step += 1
        if all(bool(ok) for ok in new.info.ok.values()):
            params, state, context, in_a_row = new.params, new.state, new.context, 0
        else:
            skipped, in_a_row = skipped + 1, in_a_row + 1
        if in_a_row >= min(PATIENCE, len(batches)):
            bar.close()
            ff.check(new.info)
        rate = (step - at.step) * settings.batch_size / (time.perf_counter() - began)
        bar.set_postfix_str(f"loss {float(new.info.loss) / task.per_output:.4g}, {rate:,.0f} examples/s", refresh=False)
    return Snapshot(params, context, state, epoch + 1, step, seconds + time.perf_counter() - began), skipped


def _batches(task: Task, settings: Settings, generator: torch.Generator) -> DataLoader[Any]:
    """Shuffled batches; the last one may be shorter. A batch is one indexing operation, not one an example."""
    order = torch.randperm(task.train[0].shape[0], generator=generator).tolist()
    sampler = BatchSampler(order, settings.batch_size, drop_last=False)
    # a generator of its own: the loader would take its base seed from the global one
    own = torch.Generator().manual_seed(0)
    dataset = TensorDataset(*task.train)
    return DataLoader(dataset, batch_size=None, sampler=sampler, num_workers=settings.num_workers, generator=own)


def _generator(seed: int, epoch: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) * 2 + stream)
