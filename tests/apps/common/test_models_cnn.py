"""The convolutional nets: published counts and shapes, what follows the data, and initialisation from a generator."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fisherfn as ff
from common.data import Data, Split
from common.models import AUTOENCODERS, CNNS, initialise

# torchvision's published counts for ImageNet, less its last layer's and its stem's 7×7 kernels, plus ours
STEM, HEAD_512, HEAD_2048 = 3 * 64 * 9 - 3 * 64 * 49, 512 * 10 + 10, 2048 * 10 + 10
COUNTS = {
    "cuda_convnet": 19_178,
    "toyCNN": (3 * 49 + 1) * 4 + (4 * 25 + 1) * 2 + (2 + 1) * 10,
    "resnet18": 11_689_512 - 513_000 + STEM + HEAD_512,
    "resnet34": 21_797_672 - 513_000 + STEM + HEAD_512,
    "resnet50": 25_557_032 - 2_049_000 + STEM + HEAD_2048,
    "vgg11": 132_863_336 - (25_088 * 4096 + 4096) - (4096 * 4096 + 4096) - 4_097_000 + HEAD_512,
    "conv_AE_MNIST": (25 * 6 + 6) + (6 * 25 * 16 + 16) + (16 * 25 * 6 + 6) + (6 * 25 + 1),
    "conv_AE_CIFAR10": (75 * 6 + 6) + (6 * 25 * 16 + 16) + (16 * 25 * 6 + 6) + (6 * 75 + 3) + 2 * (6 + 16 + 6),
}
CONVOLUTIONS = {"resnet18": 20, "resnet34": 36, "resnet50": 53, "vgg11": 8}  # the names' depth, and 1×1 shortcuts


def data(*shape: int, labels: int = 10, count: int = 4) -> Data:
    images = torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))
    split = Split(images, (torch.arange(count) + labels - count) % labels)
    return Data("X", split, split, "cuda_convnet", ff.Bernoulli(), None)


def published(name: str) -> Data:
    return data(1, 28, 28) if name == "conv_AE_MNIST" else data(3, 32, 32)


@pytest.mark.parametrize("name", CNNS | AUTOENCODERS)
def test_parameters_are_as_many_as_published(name: str) -> None:
    net = (CNNS | AUTOENCODERS)[name].build(published(name))
    assert sum(p.numel() for p in net.parameters()) == COUNTS[name]


@pytest.mark.parametrize("name", CNNS)
def test_logits_follow_channels_and_classes(name: str) -> None:
    small = data(1, 32, 32, labels=7)
    net = initialise(CNNS[name].build(small), "kaiming_normal", torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        outputs = net(10 * (small.train.inputs - 0.5))
    assert outputs.shape == (4, 7)
    assert not torch.allclose(outputs.exp().sum(1), torch.ones(4))  # no softmax


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_depth(name: str) -> None:
    net = CNNS[name].build(published(name))
    convolutions = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == CONVOLUTIONS[name]
    assert convolutions[0].kernel_size == (3, 3) and convolutions[0].stride == (1, 1)
    strides = [layer.stride[0] for layer in convolutions if layer.kernel_size == (3, 3)]
    assert strides.count(2) == (0 if name == "vgg11" else 3)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_block_whose_branch_is_zero_passes_its_input_on(name: str) -> None:
    net = CNNS[name].build(published(name)).eval()
    block = next(layer for layer in reversed(net) if hasattr(layer, "branch"))
    assert isinstance(block.shortcut, nn.Identity)
    nn.init.zeros_(block.branch[-1].weight)
    x = torch.randn(2, block.branch[-1].num_features, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(block(x), x.relu())


@pytest.mark.parametrize("name", AUTOENCODERS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (2, 11, 14)])
def test_autoencoders_give_images_of_the_input_s_shape(name: str, shape: tuple[int, ...]) -> None:
    small = data(*shape)
    net = AUTOENCODERS[name].build(small)
    outputs = net(small.train.inputs * 100)
    assert outputs.shape == small.train.inputs.shape
    assert outputs.min() < 0 or outputs.max() > 1  # no sigmoid
    kinds = [type(layer) for layer in net if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)]
    assert kinds == [nn.Conv2d] * 2 + [nn.ConvTranspose2d] * 2 and isinstance(net[-1], nn.ConvTranspose2d)


@pytest.mark.parametrize("name", ["cuda_convnet", "toyCNN", "conv_AE_MNIST", "conv_AE_CIFAR10"])
def test_seeds_decide_and_the_global_generator_is_untouched(name: str) -> None:
    state = torch.get_rng_state()
    build = (CNNS | AUTOENCODERS)[name].build
    nets = [
        initialise(build(published(name)), "kaiming_normal", torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    ]
    one, same, other = ([p for p in net.parameters() if p.ndim > 1] for net in nets)
    assert all(torch.equal(p, q) for p, q in zip(one, same, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(one, other, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_deep_net_keeps_the_signal_s_scale_under_the_trainer_s_initialisation() -> None:
    # He et al. (ICCV 2015, section 2.2): with variance 2 / fan-in, ReLU layers keep the second moment
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    net = initialise(CNNS["vgg11"].build(published("vgg11")), "kaiming_normal", torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = net(images)
    assert 0.3 < outputs.square().mean().sqrt() < 30
