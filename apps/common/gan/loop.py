"""The training loop of a GAN: a generator of epochs, which can be resumed from any snapshot.

A round consists of several critic steps, each on its own real images and fakes, and one generator step. An epoch has
as many rounds as the data has batches; all its randomness comes from one generator, which is part of a snapshot.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

import fisherfn as ff
from common.gan.players import Game, critic_batch, seen_by_generator
from common.loop import PATIENCE, Epoch, Snapshot, Watch, generator_of, sound, with_draws
from common.steps import Optimizer, Stepped

PLAYERS = ("generator", "critic")


class Rules(NamedTuple):
    """Settings of the loop of a GAN."""

    num_epochs: int
    batch_size: int
    z_dim: int
    crit_repeats: int
    seed: int = 0
    progress: bool = True
    label: str = ""


class Table(NamedTuple):
    """The fixed parts of a GAN run: game, optimizers by player, real images in [−1, 1], and settings."""

    game: Game
    optimizers: dict[str, Optimizer]
    images: Tensor
    rules: Rules

    @property
    def rounds(self) -> int:
        """Number of rounds per epoch."""
        return max(1, len(self.images) // self.rules.batch_size)


def start(table: Table) -> Snapshot:
    """Return the snapshot before the first round: trees by player, and the loss sums of an unfinished epoch."""
    players = {name: getattr(table.game, name) for name in PLAYERS}
    params = {name: player.params for name, player in players.items()}
    context = {name: player.context for name, player in players.items()}
    state = {name: table.optimizers[name].init(params[name]) for name in PLAYERS}
    losses = torch.zeros(len(PLAYERS), dtype=torch.float64, device=table.images.device)
    return Snapshot(params, context, state | {"losses": losses}, 0, 0, 0.0)


Measure = Callable[[Snapshot], dict[str, float]]
"""Function (snapshot) -> additional metrics of an epoch, such as the FID."""


def train(table: Table, snapshot: Snapshot, measure: Measure, watch: Watch = lambda step, at: None) -> Iterator[Epoch]:
    """Train from `snapshot` and yield each epoch; a new run yields its starting point first.

    A step that fails a check leaves its player unchanged, and its round counts as skipped. After `PATIENCE` such rounds
    in a row the typed error is raised. `seconds` counts training only.
    """
    if snapshot.step == 0:
        yield Epoch(snapshot, _metrics(snapshot, 0) | measure(snapshot))
    shown = ""
    while snapshot.epoch < table.rules.num_epochs:
        snapshot, metrics = _epoch(table, snapshot, watch, shown)
        metrics |= measure(snapshot)
        shown = f", FID {metrics['fid']:.3g}" if "fid" in metrics else shown
        yield Epoch(snapshot, metrics)


def _epoch(table: Table, at: Snapshot, watch: Watch, shown: str) -> tuple[Snapshot, dict[str, float]]:
    """Run the rest of an epoch; return the snapshot at its end and its mean losses."""
    rules, rounds = table.rules, table.rounds
    draws = generator_of(rules.seed, at.epoch, stream=1)
    if at.draws.numel():
        draws.set_state(at.draws)
    title = f"{rules.label} epoch {at.epoch + 1}/{rules.num_epochs}"
    quiet = None if rules.progress else True
    bar = tqdm(range(at.batches, rounds), desc=title, disable=quiet, leave=False, unit="step",
               initial=at.batches, total=rounds)  # fmt: skip
    began, first = time.perf_counter(), at
    for _ in bar:
        at, infos = _round(table, at, draws)
        if at.in_a_row >= min(PATIENCE, rounds):
            bar.close()
            for info in infos:
                ff.check(info)
        now = at._replace(seconds=first.seconds + time.perf_counter() - began)
        gen_loss, crit_loss = (at.state["losses"] / at.batches).tolist()
        bar.set_postfix_str(f"generator {gen_loss:.3g}, critic {crit_loss:.3g}{shown}", refresh=False)
        watch(at.step, partial(with_draws, now, draws))
    done = Snapshot(
        at.params, at.context, at.state | {"losses": torch.zeros_like(at.state["losses"])}, at.epoch + 1, at.step,
        first.seconds + time.perf_counter() - began, in_a_row=at.in_a_row,
    )  # fmt: skip
    return done, _metrics(done, at.skipped, at.state["losses"] / rounds)


def _round(table: Table, at: Snapshot, draws: torch.Generator) -> tuple[Snapshot, list[ff.Info]]:
    """Take the steps of critic and generator; return the infos of those that failed a check."""
    rules, count = table.rules, table.rules.batch_size
    device = table.images.device

    def noise() -> Tensor:
        return torch.randn(count, rules.z_dim, generator=draws).to(device)

    bad: list[ff.Info] = []
    losses = at.state["losses"].clone()
    for repeat in range(rules.crit_repeats):
        real = table.images[torch.randint(len(table.images), (count,), generator=draws).to(device)]
        with torch.no_grad():
            fake, _ = table.game.images(at.params["generator"], noise(), at.context["generator"])
        batch = critic_batch(real, fake, torch.rand(count, 1, 1, 1, generator=draws).to(device))
        optimizer = table.optimizers["critic"]
        index = at.step * rules.crit_repeats + repeat
        new = optimizer.step(
            at.params["critic"], at.state["critic"], batch, at.context["critic"], optimizer.draw(batch, draws), index
        )
        losses[1] += new.info.loss / rules.crit_repeats
        at, bad = _moved(at, "critic", new, new.context, bad)
    z = noise()
    batch = z, -torch.ones_like(z[:, 0])
    context = seen_by_generator(at.context["generator"], at.params["critic"], at.context["critic"])
    optimizer = table.optimizers["generator"]
    new = optimizer.step(
        at.params["generator"], at.state["generator"], batch, context, optimizer.draw(batch, draws), at.step
    )
    losses[0] += new.info.loss
    at, bad = _moved(at, "generator", new, new.context["generator"], bad)
    at = at._replace(
        step=at.step + 1,
        batches=at.batches + 1,
        state=at.state | {"losses": losses},
        skipped=at.skipped + bool(bad),
        in_a_row=at.in_a_row + 1 if bad else 0,
    )
    return at, bad


def _moved(at: Snapshot, name: str, new: Stepped, buffers: Any, bad: list[ff.Info]) -> tuple[Snapshot, list[ff.Info]]:
    """Return the snapshot after a player's step; if it failed a check, the old one with the info."""
    if not sound(new.info):
        return at, [*bad, new.info]
    params, context = at.params | {name: new.params}, at.context | {name: buffers}
    return at._replace(params=params, context=context, state=at.state | {name: new.state}), bad


def _metrics(at: Snapshot, skipped: int, losses: Tensor | None = None) -> dict[str, float]:
    metrics = {"epoch": at.epoch, "step": at.step, "seconds": at.seconds, "skipped": skipped}
    if losses is not None:
        metrics |= dict(zip(("gen_loss", "crit_loss"), losses.tolist(), strict=True))
    return metrics
