"""The players against plain autograd on their modules: losses, the gradient penalty, and the curvature of each."""

import pytest
import torch
from torch import nn
from torch.func import grad

import fisherfn as ff
from common.gan.players import Wasserstein, critic_batch, gradient_penalty, make_game, seen_by_generator
from common.models.gan import Pair, Sizes, dcgan

N = 4


@pytest.fixture(params=["none", "batch"])
def pair(request):
    """Both nets in float64, norms included."""
    torch.manual_seed(1)
    nets = dcgan(Sizes(1, 6, 0.02, request.param))
    for net in nets:
        net.double()
        for p in net.parameters():
            nn.init.normal_(p, 0.0, 0.4)
    return nets


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(2)
    real, fake = torch.randn(2, N, 1, 28, 28, generator=generator, dtype=torch.float64)
    return real, fake, torch.rand(N, 1, 1, 1, generator=generator, dtype=torch.float64)


def penalty_by_autograd(critic, real, fake, mix):
    """Gulrajani et al. (2017), algorithm 1, lines 6 and 7, in plain PyTorch."""
    mixed = (mix * real + (1 - mix) * fake).requires_grad_()
    slopes = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)[0]
    return sum((slope.norm() - 1) ** 2 for slope in slopes) / len(slopes)


def test_the_penalty_of_a_linear_critic_is_known_in_closed_form(images):
    real, fake, mix = images
    critic = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 1)).double()
    model, params, context = ff.functional(critic)
    penalty, batch = gradient_penalty(model, 10.0), critic_batch(real, fake, mix)
    norm = critic[1].weight.norm()
    value, slope = penalty(params, batch, context), grad(penalty)(params, batch, context)
    torch.testing.assert_close(value, 10 * (norm - 1) ** 2)
    torch.testing.assert_close(slope["1.weight"], 20 * (norm - 1) * critic[1].weight / norm)
    assert (slope["1.bias"] == 0).all()


def test_loss_and_gradient_of_the_critic_are_those_of_plain_autograd(pair, images):
    real, fake, mix = images
    critic = make_game(pair, 7.0).critic
    batch = critic_batch(real, fake, mix)

    def loss(params):
        scores, _ = critic.model(params, batch[0], critic.context)
        return Wasserstein().nll(scores, batch[1]).mean() + critic.penalty(params, batch, critic.context)

    scores = pair.critic(torch.cat([real, fake]))
    expected = scores[N:].mean() - scores[:N].mean() + 7 * penalty_by_autograd(pair.critic, real, fake, mix)
    torch.testing.assert_close(loss(critic.params), expected)
    slopes = torch.autograd.grad(expected, list(pair.critic.parameters()))
    ours = grad(loss)(critic.params)
    for (name, _), slope in zip(pair.critic.named_parameters(), slopes, strict=True):
        torch.testing.assert_close(ours[name], slope)


def test_the_penalty_looks_between_each_real_image_and_its_fake(pair, images):
    real, fake, mix = images
    critic = make_game(pair, 1.0).critic
    for share, there in ((1.0, real), (0.0, fake)):
        at = critic.penalty(critic.params, critic_batch(real, fake, torch.full_like(mix, share)), critic.context)
        torch.testing.assert_close(at, penalty_by_autograd(pair.critic, there, there, mix))


def test_a_dead_critic_has_a_finite_penalty_and_gradient(pair, images):
    critic = make_game(pair, 1.0).critic
    params = ff.tree.zeros_like(critic.params)
    batch = critic_batch(*images)
    assert critic.penalty(params, batch, critic.context) == 1
    assert ff.tree.finite(grad(critic.penalty)(params, batch, critic.context))


def test_the_penalty_leaves_the_buffers_alone(pair, images):
    critic = make_game(pair, 1.0).critic
    before = {name: buffer.clone() for name, buffer in critic.context.items()}
    critic.penalty(critic.params, critic_batch(*images), critic.context)
    assert before.keys() == critic.context.keys()
    assert all(torch.equal(before[name], critic.context[name]) for name in before)


def test_the_generators_loss_runs_through_the_critic_as_it_stands(pair):
    game = make_game(pair, 1.0)
    z = torch.randn(N, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    seen = seen_by_generator(game.generator.context, game.critic.params, game.critic.context)

    def loss(params):
        scores, _ = game.generator.model(params, z, seen)
        return Wasserstein().nll(scores, -torch.ones_like(z[:, 0])).mean()

    expected = -pair.critic(pair.generator(z)).mean()
    torch.testing.assert_close(loss(game.generator.params), expected)
    slopes = torch.autograd.grad(expected, list(pair.generator.parameters()))
    ours = grad(loss)(game.generator.params)
    assert list(ours) == [name for name, _ in pair.generator.named_parameters()]
    for slope, other in zip(slopes, ours.values(), strict=True):
        torch.testing.assert_close(other, slope)
    _, after = game.generator.model(game.generator.params, z, seen)
    moved = {name for name in seen["generator"] if not torch.equal(seen["generator"][name], after["generator"][name])}
    assert moved == set(seen["generator"])  # its own statistics follow; the critic's do not
    assert after["critic"] is seen["critic"] and after["critic_buffers"] is seen["critic_buffers"]


def without_norm() -> Pair:
    torch.manual_seed(4)
    generator = nn.Sequential(nn.Unflatten(1, (6, 1, 1)), nn.ConvTranspose2d(6, 2, 3, bias=False), nn.Tanh())
    critic = nn.Sequential(nn.Conv2d(2, 3, 2), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(12, 1))
    return Pair(generator.double(), critic.double())


def second_moment(scores, params):
    """Mean outer product of the gradients of single scores, by definition."""
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(s, params, retain_graph=True)]) for s in scores]
    return torch.stack(rows).T @ torch.stack(rows) / len(rows)


def test_each_players_fisher_is_the_second_moment_of_its_scores_gradients():
    """Inputs and output-gradients of the same pass, over real and fake images, nothing of the penalty in it."""
    nets = without_norm()
    game = make_game(nets, 1.0)
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(N, 6, generator=generator, dtype=torch.float64)
    real = torch.randn(N, 2, 3, 3, generator=generator, dtype=torch.float64)
    seen = seen_by_generator(game.generator.context, game.critic.params, game.critic.context)
    batch = critic_batch(real, nets.generator(z).detach(), torch.rand(N, 1, 1, 1, dtype=torch.float64))
    cases = (
        (game.critic, batch[:2], game.critic.context, nets.critic, lambda: nets.critic(batch[0])),
        (game.generator, (z, -torch.ones(N).double()), seen, nets.generator,
         lambda: nets.critic(nets.generator(z))),
    )  # fmt: skip
    for player, examples, context, net, scores in cases:
        ng = ff.natural_gradient(
            player.model, player.params, examples[0], likelihood=Wasserstein(), method="exactNG", fisher="type2",
            context=context,
        )  # fmt: skip
        expected = second_moment(scores().flatten(), list(net.parameters()))
        F = ng.fisher(ng.stats(player.params, examples, context=context))
        torch.testing.assert_close(F.dense(), expected)
        signs = torch.sign(examples[1])
        empirical = ng.fisher(ng.stats(player.params, (examples[0], signs), fisher="empirical", context=context))
        torch.testing.assert_close(empirical.dense(), expected)
