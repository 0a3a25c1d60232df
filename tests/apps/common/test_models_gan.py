"""The nets of the GANs: published shapes and sizes at any width, and how they start."""

import pytest
import torch

import fisherfn as ff
from common.data import Data, Split
from common.models import ModelError
from common.models.gan import GANS, NORMS, PIXELS, Sizes, build_gan, gan_for
from common.models.gan import residual as residual_nets


def data_of(size: int, colours: int) -> Data:
    split = Split(torch.rand(4, colours, size, size, generator=torch.Generator().manual_seed(0)), torch.arange(4))
    return Data("X", split, split, "AE_MNIST", ff.Bernoulli(), ff.Categorical())


def built(name: str, width: float, seed: int = 0, z_dim: int = 10):
    data = data_of(PIXELS[name], 3)
    return build_gan(name, data, z_dim, width, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", GANS)
@pytest.mark.parametrize("width", [0.02, 0.125])
def test_noise_becomes_images_in_range_and_images_one_score(name, width):
    pair = built(name, width)
    images = pair.generator(torch.randn(5, 10))
    assert images.shape == (5, 3, PIXELS[name], PIXELS[name]) and images.abs().max() <= 1
    assert pair.critic(images).shape == (5, 1)


def count(net) -> int:
    return sum(p.numel() for p in net.parameters())


def test_dcgan_has_the_published_layers():
    generator, critic = build_gan("dcgan", data_of(28, 1), 64, 1.0, torch.Generator(), "batch")
    c = [512, 256, 128, 64]
    transposed = 64 * c[0] * 16 + sum(i * o * 16 for i, o in zip(c, c[1:], strict=False)) + c[3]
    assert count(generator) == transposed + 2 * sum(c)
    assert count(critic) == 16 * (64 + 64 * 128 + 128 * 256 + 256) + 2 * (128 + 256)
    strides = [m.stride[0] for m in generator if isinstance(m, torch.nn.ConvTranspose2d)]
    assert strides == [1, 2, 2, 2, 1]


def test_residual_nets_have_the_published_blocks():
    generator, critic = residual_nets(Sizes(3, 100, 1.0, "batch"))
    c = 128
    square, one = c * c * 9 + c, c * c + c
    up = c * c * 16 + c + square + one + 4 * c
    assert count(generator) == 100 * 16 * c + 16 * c + 3 * up + 2 * c + 3 * c * 9 + 3
    first = 3 * c * 9 + c + square + 3 * c + c
    assert count(critic) == first + (2 * square + one + 4 * c) + 2 * (2 * square + 4 * c) + c + 1


@pytest.mark.parametrize("name", GANS)
@pytest.mark.parametrize("width", [0.25, 1.0])
def test_weights_start_at_dcgans_scale_whatever_the_width(name, width):
    for net in built(name, width):
        for layer in net.modules():
            if isinstance(layer, (torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.Linear)):
                if layer.weight.numel() > 1000:
                    assert float(layer.weight.detach().std()) == pytest.approx(0.02 / width**0.5, rel=0.1)
                assert layer.bias is None or (layer.bias == 0).all()
            elif isinstance(layer, (torch.nn.BatchNorm2d, torch.nn.GroupNorm)):
                assert float((layer.weight.detach() - 1).abs().max()) < 0.1 and (layer.bias == 0).all()


def test_nets_come_from_their_generator_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one, two, other = built("dcgan", 0.05, seed=3), built("dcgan", 0.05, seed=3), built("dcgan", 0.05, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    same = [torch.equal(a, b) for a, b in zip(one.generator.parameters(), two.generator.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(next(one.critic.parameters()), next(other.critic.parameters()))


def test_the_size_of_the_images_chooses_the_nets():
    assert gan_for(data_of(28, 1)) == "dcgan" and gan_for(data_of(32, 3)) == "residual"
    with pytest.raises(ModelError, match=r"no GAN makes images of 25×25; sizes are 28×28 and 32×32"):
        gan_for(data_of(25, 1))
    with pytest.raises(ModelError, match="residual makes images of 32×32, X's are others"):
        build_gan("residual", data_of(28, 1), 8, 1.0, torch.Generator())


@pytest.mark.parametrize("name", GANS)
@pytest.mark.parametrize("norm", NORMS)
def test_only_a_critic_with_batch_norm_lets_one_image_change_anothers_score(name, norm):
    critic = build_gan(name, data_of(PIXELS[name], 3), 10, 0.05, torch.Generator().manual_seed(0), norm).critic.double()
    images = torch.randn(4, 3, PIXELS[name], PIXELS[name], dtype=torch.float64)
    alone, together = critic(images[:2]), critic(images)[:2]
    assert torch.allclose(alone, together, rtol=1e-9) == (norm != "batch")
