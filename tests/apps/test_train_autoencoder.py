"""The trainer of convolutional autoencoders: two optimizers, what its losses are, pictures in colour."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import fisherfn as ff
from common import runs, trainer
from common.checkpoints import load_checkpoint
from common.config import ConfigError, read
from common.data import Data, Split, load
from common.models import AUTOENCODERS
from common.results import read_metrics
from common.train_config import AUTOENCODER_DATA, AutoencoderConfig
from common.trainer import make_task, run
from tests.apps.options import cadence, safe


def configured(*more: str) -> AutoencoderConfig:
    common = ["--data", "own:load", "--batch_size", "10", "--num_epochs", "3", "--quiet", "--lr", "0.01"]
    return read(AutoencoderConfig, [*common, *cadence(more), *more])


@pytest.mark.parametrize("optim", ["sgd", "lanczos"])  # every one: test_train_mlp.py
def test_optimizers_train_resume_and_leave_a_whole_result(own, optim):
    common = ("--model", "own:transposed", "--optim", optim, *safe(optim))
    straight = run(configured(*common, "--result_name", "straight"))
    assert straight == Path("results/train_autoencoder/straight")
    metrics = read_metrics(straight)
    assert [m["epoch"] for m in metrics] == [0, 1, 2, 3] and metrics[-1]["step"] == 3 * 4
    assert metrics[-1]["train_loss"] < metrics[0]["train_loss"] and "train_accuracy" not in metrics[-1]
    assert {path.name for path in straight.glob("*.png")} == {"loss.png", "reconstructions.png"}
    run(configured(*common, "--result_name", "parts", "--num_epochs", "1"))
    parts = run(configured(*common, "--result_name", "parts", "--num_epochs", "3", "--resume"))
    one, two = (load_checkpoint(folder / "checkpoint.pt")[0] for folder in (straight, parts))
    assert one.keys() == two.keys() and all(torch.equal(one[path], two[path]) for path in one)


def unlabelled(shape: tuple[int, ...], likelihood: ff.Likelihood, model: str = "AE_MNIST", count: int = 12) -> Data:
    images = torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))
    return Data("X", Split(images, None), Split(images.flip(0)[:11], None), model, likelihood, None)


@pytest.fixture
def colours(own, monkeypatch):
    """Small pictures in colour, as the data of every name; what was drawn of them."""
    data = unlabelled((3, 12, 13), ff.Gaussian())
    monkeypatch.setattr(runs, "load", lambda *args, **kwargs: data)
    drawn = []
    draw = trainer.reconstructions
    monkeypatch.setattr(trainer, "reconstructions", lambda *args: drawn.extend(args) or draw(*args))
    return data, drawn


def test_colour_pictures_and_losses_that_are_half_the_mean_squared_error(colours):
    data, drawn = colours
    config = configured("--data", "CIFAR10", "--optim", "adam")
    folder = run(config)
    inputs, outputs, path = drawn
    assert path.exists() and inputs.shape == outputs.shape == (10, 3, 12, 13)
    assert torch.equal(inputs, data.test.inputs[:10])
    tensors, _ = load_checkpoint(folder / "checkpoint.pt")
    _, net = make_task(config, data)
    net.load_state_dict({k.partition("/")[2]: v for k, v in tensors.items() if not k.startswith("state")})
    with torch.no_grad():
        everything = net.eval()(data.test.inputs)
    torch.testing.assert_close(outputs, everything[:10])
    assert read_metrics(folder)[-1]["test_loss"] == pytest.approx(float(F.mse_loss(everything, data.test.inputs)) / 2)


def test_bernoulli_losses_are_binary_cross_entropies_and_pictures_are_probabilities(own, monkeypatch):
    drawn = []
    monkeypatch.setattr(trainer, "reconstructions", lambda *args: drawn.extend(args))
    config = configured("--model", "own:transposed", "--optim", "adam")
    folder = run(config)
    data = load("own:load", seed=0)
    tensors, _ = load_checkpoint(folder / "checkpoint.pt")
    _, net = make_task(config, data)
    net.load_state_dict({k.partition("/")[2]: v for k, v in tensors.items() if not k.startswith("state")})
    with torch.no_grad():
        logits = net.eval()(data.test.inputs)
    expected = F.binary_cross_entropy_with_logits(logits, data.test.inputs)
    assert read_metrics(folder)[-1]["test_loss"] == pytest.approx(float(expected))
    torch.testing.assert_close(drawn[1], logits[:10].sigmoid())


def test_the_net_that_suits_the_data():
    def name(shape: tuple[int, ...], model: str = "AE_MNIST") -> str:
        return AutoencoderConfig.model_for(unlabelled(shape, ff.Bernoulli(), model))

    assert name((1, 28, 28)) == "conv_AE_MNIST"
    assert name((3, 32, 32), "cuda_convnet") == "conv_AE_CIFAR10"
    assert name((3, 32, 32), "mine:net") == "mine:net"


def test_images_keep_their_published_size():
    task, _ = make_task(AutoencoderConfig(), unlabelled((1, 28, 28), ff.Bernoulli()))
    assert task.train[0].shape == (12, 1, 28, 28) and task.per_output == 784
    assert task.train[0] is task.train[1]


def test_choices():
    assert AutoencoderConfig().data in AUTOENCODER_DATA
    for model in AUTOENCODERS:
        assert AutoencoderConfig(model=model).model == model
    with pytest.raises(ConfigError, match="model must be one of conv_AE_MNIST, .*got resnet18"):
        AutoencoderConfig(model="resnet18")
    with pytest.raises(ConfigError, match="data must be one of DIGITS, .*got CIFAR100"):
        AutoencoderConfig(data="CIFAR100")
