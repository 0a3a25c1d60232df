r"""The two players of a WGAN-GP as pure functions, with the curvature of each.

Scores $D(x)$ are a player's outputs, and its loss is linear in them, a mean over its own batch:

- critic, over the 2N images of the batch [real; fake]: $\frac1{2N}\sum_i y_i D(x_i)$ with y = −2 for a real and +2 for
  a fake image, that is mean D(fake) − mean D(real); and the penalty c · mean (‖∇ₓ D(x̂)‖ − 1)² on N mixtures x̂ of
  both (Gulrajani et al. 2017, algorithm 1);
- generator, over N noise vectors z: $-\frac1N\sum_n D(G(z_n))$, the critic held fixed.

A loss that is linear in the outputs has no second derivative with respect to them, so there is no likelihood. The
curvature comes from the map from parameters to scores: both players use the Fisher of Gaussian scores with variance
one, F = mean Jᵀ J with J the gradient of one example's score. With one score per example this is also the second
moment of the per-example gradients of ±D, the empirical Fisher. Inputs and gradients come from the same pass over the
same images. The penalty contributes to the gradient, but not to F.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad

import fisherfn as ff
from common.models.gan import Pair
from common.steps import Batch, Penalty, Tree


@dataclass(frozen=True)
class Wasserstein:
    """Scores [N, 1] weighted by targets [N], with the Fisher of Gaussian scores with variance one."""

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the weighted score of each example; a loss, not a likelihood."""
        return targets * outputs.flatten(1).sum(1)

    def fisher_sqrt(self, outputs: Tensor) -> Tensor:
        """Return one column, 1 for every example."""
        return torch.ones_like(outputs).unsqueeze(0)


class Player(NamedTuple):
    """A player for an optimizer: `model(params, x, context)` -> scores, initial values, and a penalty if any."""

    model: Any
    params: Tree
    context: Any
    penalty: Penalty | None


class Game(NamedTuple):
    """Both players, and the images of the generator in training and in evaluation mode."""

    generator: Player
    critic: Player
    images: Any
    shown: Any


def make_game(pair: Pair, c_lambda: float) -> Game:
    """Build the game of two nets in training mode; `c_lambda` is the weight of the penalty."""
    images, gen_params, gen_buffers = ff.functional(pair.generator.train())
    scores, crit_params, crit_buffers = ff.functional(pair.critic.train())
    shown, _, _ = ff.functional(copy.deepcopy(pair.generator).eval())

    def through_critic(params: Tree, z: Tensor, context: Any) -> tuple[Tensor, Any]:
        fakes, buffers = images(params, z, context["generator"])
        outputs, _ = scores(context["critic"], fakes, context["critic_buffers"])
        return outputs, {**context, "generator": buffers}

    generator = Player(through_critic, gen_params, gen_buffers, None)
    critic = Player(scores, crit_params, crit_buffers, gradient_penalty(scores, c_lambda))
    return Game(generator, critic, images, shown)


def seen_by_generator(generator: Tree, critic: Tree, critic_buffers: Tree) -> dict[str, Tree]:
    """Return the context of the generator: its buffers, and the critic, which is neither differentiated nor changed."""
    return {"generator": generator, "critic": critic, "critic_buffers": critic_buffers}


def critic_batch(real: Tensor, fake: Tensor, mix: Tensor) -> Batch:
    """Return a batch of both kinds of images, their weights, and the mixing weights of the penalty, [N, 1, 1, 1]."""
    weights = torch.full_like(real[:, 0, 0, 0], 2.0)
    return torch.cat([real, fake]), torch.cat([-weights, weights]), mix


def gradient_penalty(critic: Any, weight: float) -> Penalty:
    r"""Return $c \cdot \frac1N \sum_n (\lVert\nabla_x D(\hat x_n)\rVert - 1)^2$, between real and fake images.

    $\hat x_n = \epsilon_n x_n + (1 - \epsilon_n) G(z_n)$ with the ε of the batch.

    If batch norm couples the examples, the gradient is that of the sum of all scores. Its buffers are not changed.
    """

    def penalty(params: Tree, batch: Batch, context: Any) -> Tensor:
        images, _, mix = batch
        real, fake = images.chunk(2)

        def total(x: Tensor) -> Tensor:
            outputs: Tensor = critic(params, x, context)[0]
            return outputs.sum()

        slopes = grad(total)(mix * real + (1 - mix) * fake).flatten(1)
        return weight * (torch.linalg.vector_norm(slopes, dim=1) - 1).square().mean()

    return penalty
