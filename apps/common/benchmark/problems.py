"""The timed nets, each with one set of weights and one batch of random images, the same for all contenders."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fisherfn as ff
from common.data import Data, Split
from common.models import MODELS, initialise


class Workload(NamedTuple):
    """A model with its kind of inputs and its batch size."""

    title: str
    shape: tuple[int, int, int]
    batch_size: int
    scheme: str = "xavier_uniform"


WORKLOADS = {
    "AE_CURVES": Workload("CURVES autoencoder", (1, 28, 28), 256),
    "AE_MNIST": Workload("MNIST autoencoder", (1, 28, 28), 256),
    "cuda_convnet": Workload("CNN, 3×32×32", (3, 32, 32), 128, "kaiming_normal"),
    "conv_AE_MNIST": Workload("convolutional autoencoder", (1, 28, 28), 128),
}
"""Workloads by the name of the model."""

Loss = Callable[[Tensor, Tensor], Tensor]


class Problem(NamedTuple):
    """A net and a batch; as a module for peers, as a pure function for the library."""

    net: nn.Module
    batch: tuple[Tensor, Tensor]
    likelihood: ff.Likelihood
    loss: Loss  # mean over examples of the negative log-likelihood
    model: Any
    params: dict[str, Tensor]
    context: Any

    def training(self) -> Training:
        """Return a copy of the net for contenders that change weights in place."""
        x, y = (part.clone() for part in self.batch)
        return Training(copy.deepcopy(self.net), x, y, self.loss)


class Training(NamedTuple):
    """The parts of the usual training step of a module."""

    net: nn.Module
    x: Tensor
    y: Tensor
    loss: Loss

    def backward(self) -> None:
        """Run forward and backward; the gradients of this batch are then in `.grad`."""
        self.net.zero_grad(set_to_none=True)
        self.loss(self.net(self.x), self.y).backward()


def problem(name: str, batch_size: int | None = None, device: str = "cpu") -> Problem:
    """Return the workload with this name; autoencoders reconstruct, the others predict labels."""
    workload, model = WORKLOADS[name], MODELS[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch_size or workload.batch_size, *workload.shape, generator=generator)
    labels = torch.randint(10, x.shape[:1], generator=generator) if model.task == "predict" else None
    likelihood = ff.Bernoulli() if labels is None else ff.Categorical()
    data = Data(workload.title, Split(x, labels), Split(x, labels), name, likelihood, likelihood)
    net = initialise(model.build(data), workload.scheme, generator)
    inputs = x.flatten(1) if model.inputs == "flat" else x
    return posed(net.to(device), (inputs.to(device), (inputs if labels is None else labels).to(device)), likelihood)


def posed(net: nn.Module, batch: tuple[Tensor, Tensor], likelihood: ff.Likelihood) -> Problem:
    """Build a problem from a net in training mode and a batch."""
    loss = F.cross_entropy if isinstance(likelihood, ff.Categorical) else bernoulli_loss
    return Problem(net.train(), batch, likelihood, loss, *ff.functional(net))


def bernoulli_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the loss, summed over outputs and averaged over examples."""
    return F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum") / len(outputs)
