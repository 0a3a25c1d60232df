"""The training of a GAN, as configured: game, optimizers, pictures. Read from top to bottom."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fisherfn as ff
from common import optimizers, runs
from common.config import ConfigError, filled
from common.data import Data
from common.gan import loop, pictures
from common.gan.config import GanConfig
from common.gan.players import Game, Player, Wasserstein, make_game, seen_by_generator
from common.gan.quality import Quality, make_quality
from common.loop import Epoch, Snapshot, Watch
from common.models.gan import build_gan, gan_for
from common.results import Results
from common.runs import Training
from common.steps import Optimizer

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


def make_optimizer(config: GanConfig, name: str, lr: float, player: Player, x: Tensor, context: Any) -> Optimizer:
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


class Adversarial(Training[GanConfig]):
    """The training of a GAN: two nets, an optimizer for each."""

    def __init__(self, config: GanConfig, data: Data) -> None:
        super().__init__(config, data)
        self.table = make_table(config, data)

    @staticmethod
    def completed(config: GanConfig, data: Data) -> GanConfig:
        """Return the configuration with the default nets."""
        return filled(config, {"model": gan_for(data)})

    def start(self) -> Snapshot:
        """Return the snapshot before the first round."""
        return loop.start(self.table)

    def epochs(self, at: Snapshot, watch: Watch) -> Iterator[Epoch]:
        """Train from a snapshot and yield each epoch, with the FID when it is due."""
        quality = make_quality(self.config, self.data, self.say)
        measure = partial(measured, self.config, self.table.game, quality, self.data)
        return loop.train(self.table, at, measure, watch)

    def line(self, metrics: dict[str, float]) -> str:
        """Format the metrics of an epoch for the terminal."""
        losses = (f"  generator {metrics['gen_loss']:8.3f}  critic {metrics['crit_loss']:8.3f}"
                  if "gen_loss" in metrics else " " * 38)  # fmt: skip
        fid = f"  FID {metrics['fid']:8.4g}" if "fid" in metrics else ""
        skipped = f"  {metrics['skipped']:.0f} steps skipped" if metrics["skipped"] else ""
        return f"epoch {metrics['epoch']:3.0f}{losses}  {metrics['seconds']:7.1f} s{fid}{skipped}"

    def draw_epoch(self, folder: Path, at: Snapshot) -> None:
        """Write a grid of images from fixed noise."""
        images = fakes(self.config, self.table.game, at, pictures.COLUMNS**2, seed=2)
        (folder / SAMPLES).mkdir(exist_ok=True)
        pictures.grid(images, folder / SAMPLES / f"epoch-{at.epoch:04}.png")

    def draw(self, results: Results, at: Snapshot) -> None:
        """Write animation, contact sheet and curves of the whole run."""
        frames = [frame for frame in sorted((results.path / SAMPLES).glob("epoch-*.png"))
                  if pictures.epoch_of(frame) <= at.epoch]  # fmt: skip
        metrics = results.metrics()
        pictures.animation(frames, results.path / "samples.gif")
        pictures.contact_sheet(frames, metrics, results.path / "samples.png")
        pictures.curves({results.path.name: metrics}, results.path / "curves.png")


def run(config: GanConfig) -> Path:
    """Train as configured and return the result folder; see `common.runs.run`."""
    return runs.run(Adversarial, config)


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
