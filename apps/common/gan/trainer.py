"""Run a GAN training from its configuration. Read from top to bottom: game, optimizers, run, pictures."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fisherfn as ff
from common import optimizers, tensorboard
from common.config import ConfigError, as_yaml, filled
from common.data import Data, load
from common.gan import loop, pictures
from common.gan.config import GanConfig
from common.gan.players import Game, Player, Wasserstein, make_game, seen_by_generator
from common.gan.quality import Quality, make_quality
from common.loop import Snapshot
from common.models.gan import build_gan, gan_for
from common.results import Results
from common.trainer import check_device, restore, save, stopped, watched

SAMPLES = "samples"
"""The folder of the grids, one per epoch."""

EVERY = {"default": 100, "exactNG": 1}
"""Default number of steps between statistics and between inverses; exactNG has no running averages."""

FAKES = 500
"""Number of images generated at a time."""


def make_table(config: GanConfig, data: Data) -> loop.Table:
    """Build the game of these nets on this data, with an optimizer for each player."""
    generator = torch.Generator().manual_seed(config.seed)
    name = config.model or gan_for(data)
    pair = build_gan(name, data, config.z_dim, config.width, generator, config.critic_norm)
    for net in pair:
        net.to(config.device)
    game = make_game(pair, config.c_lambda)
    images = (2 * data.train.inputs - 1).to(config.device)
    z = torch.randn(config.batch_size, config.z_dim, generator=generator).to(config.device)
    seen = seen_by_generator(game.generator.context, game.critic.params, game.critic.context)
    both = images[:1].expand(2 * config.batch_size, -1, -1, -1)
    own = {"damping": config.gen_damping, "kl_bound": config.gen_kl_bound}
    given: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
    gen_config = dataclasses.replace(config, **given)
    chosen = {
        "generator": make_optimizer(gen_config, config.gen_optim, config.gen_lr, game.generator, z, seen),
        "critic": make_optimizer(config, config.crit_optim, config.crit_lr, game.critic, both, game.critic.context),
    }
    label = f"{data.name} {config.gen_optim}/{config.crit_optim}"
    rules = loop.Rules(
        config.num_epochs, config.batch_size, config.z_dim, config.crit_repeats, config.seed, not config.quiet, label
    )
    return loop.Table(game, chosen, images, rules)


def make_optimizer(
    config: GanConfig, name: str, lr: float, player: Player, x: Tensor, context: Any
) -> optimizers.Optimizer:
    """Build the optimizer of a player; `x` and `context` are example arguments of its model."""
    likelihood = Wasserstein()
    if name == "adam":
        betas = (config.beta_1, config.beta_2)
        return optimizers.adam(player.model, likelihood, lr=lr, betas=betas, penalty=player.penalty)
    if name == "sgda":
        return optimizers.sgd(
            player.model, likelihood, lr=lr, momentum=config.momentum, nesterov=True, penalty=player.penalty,
            weight_decay=config.weight_decay,
        )  # fmt: skip
    # a gradient with a penalty needs a symmetric operator, which the multiplicative form is not
    method = ff.two_level(form="balanced") if name == "twolevel_kfac" else ff.METHODS[name]()
    ng = ff.natural_gradient(
        player.model, player.params, x, likelihood=likelihood, method=method, fisher="type2", context=context
    )
    every = EVERY.get(name, EVERY["default"])
    cadence = ff.Cadence.fixed(config.update_every or every, config.invert_every or every)
    if config.damping == "auto":
        if player.penalty is not None:
            raise ConfigError(
                "damping auto needs a loss without a penalty, which the critic's is not: give --damping a number, and "
                "--gen_damping auto for the generator"
            )
        # no looking back: the other player moves this one's loss
        bound = {"rule": "clip", "kl_bound": config.kl_bound} if config.kl_bound else {"rule": "model"}
        opt = ff.adaptive(
            ng, **bound, lr=lr, momentum=config.momentum, ema=config.ema, weight_decay=config.weight_decay,
            look_back=False,
        )  # fmt: skip
        return optimizers.adaptive(opt, cadence)
    return optimizers.natural(
        ng,
        lr=lr,
        damping=config.damping,
        kl_bound=config.kl_bound,
        momentum=config.momentum,
        ema=config.ema,
        weight_decay=config.weight_decay,
        cadence=cadence,
        penalty=player.penalty,
    )


def run(config: GanConfig) -> Path:
    """Train as configured and return the result folder; nothing is written before data and nets are verified."""
    data = load(config.data, data_path=config.data_path, seed=config.seed, download=config.download)
    config = filled(config, {"model": gan_for(data)})
    with (
        contextlib.closing(Results.open(config, config.app)) as results,
        contextlib.closing(tensorboard.opened(config.tensorboard, results.path)) as board,
        stopped() as signals,
    ):
        check_device(config.device)
        table = make_table(config, data)
        snapshot = loop.start(table)
        recorded: list[dict[str, float]] = []
        if config.resume:
            snapshot = restore(results, snapshot)
            recorded = results.metrics()
        say: Callable[[str], None] = _nothing if config.quiet else partial(print, flush=True)
        if config.verbose:
            say(as_yaml(config))
        quality = make_quality(config, data, say)
        measure = partial(measured, config, table.game, quality, data)
        for epoch in loop.train(table, snapshot, measure, partial(watched, results, config.save_every, signals)):
            snapshot = epoch.snapshot
            if all(metrics["epoch"] != snapshot.epoch for metrics in recorded):
                results.record(epoch.metrics)
            board.write(results.metrics())
            save(results, snapshot)
            draw_grid(config, table.game, snapshot, results.path)
            say(line(epoch.metrics))
        draw_all(results, snapshot)
    print(f"Everything is in {results.path}: metrics.jsonl, config.yaml, checkpoint.pt and the pictures.")
    return results.path


def _nothing(text: str) -> None:
    pass


def line(metrics: dict[str, float]) -> str:
    """Format one epoch as a line."""
    losses = (f"  generator {metrics['gen_loss']:8.3f}  critic {metrics['crit_loss']:8.3f}"
              if "gen_loss" in metrics else " " * 38)  # fmt: skip
    fid = f"  FID {metrics['fid']:8.4g}" if "fid" in metrics else ""
    skipped = f"  {metrics['skipped']:.0f} steps skipped" if metrics["skipped"] else ""
    return f"epoch {metrics['epoch']:3.0f}{losses}  {metrics['seconds']:7.1f} s{fid}{skipped}"


def measured(config: GanConfig, game: Game, quality: Quality | None, data: Data, at: Snapshot) -> dict[str, float]:
    """Compute the FID when it is due: of the fakes, and of the test images, as a lower reference."""
    due = at.epoch % config.fid_every == 0 or at.epoch == config.num_epochs
    if quality is None or not due:
        return {}
    found = {"fid": quality.fid(fakes(config, game, at, config.fid_samples, seed=1))}
    if at.step == 0:
        found["fid_test"] = quality.fid(data.test.inputs.to(config.device))
    return found


@torch.no_grad()
def fakes(config: GanConfig, game: Game, at: Snapshot, count: int, seed: int) -> Tensor:
    """Generate images in [0, 1] from fixed noise, with the generator in evaluation mode."""
    z = torch.randn(count, config.z_dim, generator=torch.Generator().manual_seed(seed)).to(config.device)
    params, buffers = at.params["generator"], at.context["generator"]
    images = torch.cat([game.shown(params, part, buffers)[0] for part in z.split(FAKES)])
    return (images + 1) / 2


def draw_grid(config: GanConfig, game: Game, at: Snapshot, folder: Path) -> None:
    """Write the grid of this epoch, from fixed noise."""
    images = fakes(config, game, at, pictures.COLUMNS**2, seed=2)
    (folder / SAMPLES).mkdir(exist_ok=True)
    pictures.grid(images, folder / SAMPLES / f"epoch-{at.epoch:04}.png")


def draw_all(results: Results, at: Snapshot) -> None:
    """Write animation, contact sheet and curves of the whole run."""
    frames = [frame for frame in sorted((results.path / SAMPLES).glob("epoch-*.png"))
              if pictures.epoch_of(frame) <= at.epoch]  # fmt: skip
    metrics = results.metrics()
    pictures.animation(frames, results.path / "samples.gif")
    pictures.contact_sheet(frames, metrics, results.path / "samples.png")
    pictures.curves({results.path.name: metrics}, results.path / "curves.png")
