"""The nets against METHODS.md section 5: counts, shapes, logits; and initialisation from one generator only."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fisherfn as ff
from common.data import Data, Split
from common.models import MLPS, MODELS, SCHEMES, Model, ModelError, initialise, resolve

# as published; the batch norms of DeepLinear and MLP are included (two numbers per unit)
COUNTS = {"AE_CURVES": 842_340, "AE_MNIST": 2_837_314, "AE_FACES": 7_537_655, "DeepLinear": 16_040, "MLP": 4_106_920}
# the same widths with another activation and a linear code
COUNTS |= {f"AE_{data}_{kind}": COUNTS[f"AE_{data}"] for data in ("CURVES", "MNIST") for kind in ("TANH", "SIGMOID")}
# 784·10+10 + 10·30+30 + 30·20+20 + 20·15+15 + 15·10+10
COUNTS["ToyNet"] = 7_850 + 330 + 620 + 315 + 160
ACTIVATIONS = {"AE_CURVES": nn.ReLU, "AE_MNIST": nn.ReLU, "AE_FACES": nn.ReLU, "ToyNet": nn.Tanh}


def data(*shape: int, labels: int | None = 10, count: int = 12) -> Data:
    """Random images of that shape, with that many classes."""
    images = torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))
    split = Split(images, None if labels is None else torch.arange(count) % labels)
    return Data("X", split, split, "MLP", ff.Bernoulli(), None)


def published(name: str) -> Data:
    return data(1, 25, 25) if name == "AE_FACES" else data(1, 28, 28)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(net: nn.Module) -> list[torch.Tensor]:
    return [layer.weight for layer in net.modules() if isinstance(layer, nn.Linear)]


def test_the_registry() -> None:
    names = ["AE_CURVES", "AE_MNIST", "AE_FACES", "AE_CURVES_TANH", "AE_MNIST_TANH"]
    names += ["AE_CURVES_SIGMOID", "AE_MNIST_SIGMOID", "DeepLinear", "MLP", "ToyNet"]
    names += ["cuda_convnet", "toyCNN", "resnet18", "resnet34", "resnet50", "vgg11", "conv_AE_MNIST", "conv_AE_CIFAR10"]
    assert list(MODELS) == names
    tasks = {name: resolve(name).task for name in MODELS}
    assert tasks == {name: "reconstruct" if "AE" in name else "predict" for name in MODELS}
    assert {name for name in MODELS if MODELS[name].inputs == "flat"} == set(MLPS)


@pytest.mark.parametrize("name", MLPS)
def test_parameters_are_as_many_as_published(name: str) -> None:
    net = MODELS[name].build(published(name))
    assert sum(p.numel() for p in net.parameters()) == COUNTS[name]


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        (f"AE_{of}_{kind}", act)
        for of in ("CURVES", "MNIST")
        for kind, act in (("TANH", nn.Tanh), ("SIGMOID", nn.Sigmoid))
    ],
)
def test_a_linear_code_has_no_activation_and_all_other_layers_have_one(name: str, activation: type) -> None:
    layers = list(MODELS[name].build(published(name)))
    code = min((layer for layer in layers if isinstance(layer, nn.Linear)), key=lambda layer: layer.out_features)
    for layer, after in zip(layers, layers[1:], strict=False):
        if isinstance(layer, nn.Linear):
            assert isinstance(after, nn.Linear) if layer is code else isinstance(after, activation)


@pytest.mark.parametrize("name", [name for name in MLPS if not name.endswith(("TANH", "SIGMOID"))])
def test_between_the_linear_layers(name: str) -> None:
    layers = list(MODELS[name].build(published(name)))
    assert all(isinstance(layer, nn.Linear) for layer in layers[::2])
    between = ACTIVATIONS.get(name, nn.BatchNorm1d)
    assert all(isinstance(layer, between) for layer in layers[1::2])
    assert len(layers) % 2 == 1  # it ends in a linear layer: logits


@pytest.mark.parametrize("name", MLPS)
def test_outputs_are_logits_of_the_data_s_size(name: str) -> None:
    small = data(3, 6, 5, labels=4)
    model = MODELS[name]
    net = model.build(small)
    outputs = initialise(net, "xavier_uniform", generator())(100 * (small.train.inputs.flatten(1) - 0.5))
    assert outputs.shape == (12, 90 if model.task == "reconstruct" else 4)
    assert outputs.min() < 0 or outputs.max() > 1  # no sigmoid
    assert not torch.allclose(outputs.exp().sum(1), torch.ones(12))  # no softmax
    hidden = [weight.shape[0] for weight in weights(net)[:-1]]
    assert hidden == [weight.shape[0] for weight in weights(model.build(published(name)))[:-1]]


def test_ten_classes_where_there_are_no_labels() -> None:
    assert MODELS["ToyNet"].build(data(1, 2, 2, labels=None))[-1].out_features == 10


def test_classes_are_counted_in_both_parts() -> None:
    one, other = data(1, 2, 2, labels=3), data(1, 2, 2, labels=7)
    assert MODELS["ToyNet"].build(one._replace(test=other.train))[-1].out_features == 7


@pytest.mark.parametrize("name", MLPS)
def test_the_global_generator_is_untouched(name: str) -> None:
    state = torch.get_rng_state()
    net = MODELS[name].build(published(name))
    for scheme in SCHEMES:
        initialise(net, scheme, generator())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_equal_seeds_give_equal_nets_and_equal_shapes_differ(scheme: str) -> None:
    one, same, other = (
        initialise(MODELS["DeepLinear"].build(published("MLP")), scheme, generator(seed)) for seed in (3, 3, 4)
    )
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), same.parameters(), strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(weights(one), weights(other), strict=True))
    squares = [weight.detach().flatten() for weight in weights(one) if weight.shape == (10, 10)]
    assert len(torch.stack(squares).unique(dim=0)) == 63


def test_a_built_net_is_sound_before_it_is_initialised() -> None:
    one, other = (MODELS["MLP"].build(published("MLP")) for _ in range(2))
    for tensor, same in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert tensor.device.type == "cpu" and tensor.isfinite().all() and torch.equal(tensor, same)
    assert all(weight.std() > 0.01 for weight in weights(one))


def test_norm_layers_start_afresh() -> None:
    net = MODELS["MLP"].build(published("MLP"))
    with torch.no_grad():
        net(published("MLP").train.inputs.flatten(1))  # moves the running statistics
        net[1].weight.fill_(7)
    initialise(net, "xavier_normal", generator())
    for norm in (layer for layer in net if isinstance(layer, nn.BatchNorm1d)):
        assert norm.affine and (norm.weight == 1).all() and (norm.bias == 0).all()
        assert (norm.running_mean == 0).all() and (norm.running_var == 1).all() and norm.num_batches_tracked == 0


# Each scheme against its definition, on one layer of 300 inputs and 200 outputs

FAN_IN, FAN_OUT = 300, 200


def layer(scheme: str) -> nn.Linear:
    return initialise(nn.Linear(FAN_IN, FAN_OUT), scheme, generator())


@pytest.mark.parametrize(
    ("scheme", "variance", "bound"),
    [
        ("xavier_uniform", 2 / (FAN_IN + FAN_OUT), (6 / (FAN_IN + FAN_OUT)) ** 0.5),
        ("xavier_normal", 2 / (FAN_IN + FAN_OUT), None),
        ("kaiming_uniform", 2 / FAN_IN, (6 / FAN_IN) ** 0.5),
        ("kaiming_normal", 2 / FAN_IN, None),
        ("default", 1 / (3 * FAN_IN), FAN_IN**-0.5),
    ],
)
def test_weights_have_the_spread_of_their_scheme(scheme: str, variance: float, bound: float | None) -> None:
    weight = layer(scheme).weight.detach()
    assert weight.var() == pytest.approx(variance, rel=0.03)
    assert abs(weight.mean()) < 5 * (variance / weight.numel()) ** 0.5
    largest = weight.abs().max()
    assert (bound * 0.99 < largest <= bound) if bound else largest > 3 * variance**0.5


def test_biases() -> None:
    for scheme in ("xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal"):
        assert (layer(scheme).bias == 0.01).all()
    for scheme in ("orthogonal", "sparse"):
        assert (layer(scheme).bias == 0).all()
    bias = layer("default").bias.detach()
    assert bias.abs().max() <= FAN_IN**-0.5 and bias.var() == pytest.approx(1 / (3 * FAN_IN), rel=0.3)


def test_orthogonal_rows() -> None:
    weight = layer("orthogonal").weight.detach()
    torch.testing.assert_close(weight @ weight.T, torch.eye(FAN_OUT), atol=1e-5, rtol=0)


def test_sparse_gives_each_unit_fifteen_inputs() -> None:
    weight = layer("sparse").weight.detach()
    assert (weight != 0).sum(1).tolist() == [15] * FAN_OUT
    values = weight[weight != 0]
    assert abs(values.mean()) < 0.1 and values.var() == pytest.approx(1, rel=0.08)
    # scattered evenly over the inputs: 10 each on average
    assert 5 < (weight != 0).sum(0).float().quantile(0.1) and (weight != 0).sum(0).max() < 30
    assert (initialise(nn.Linear(6, 25), "sparse", generator()).weight != 0).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_convolutions_too(scheme: str) -> None:
    state = torch.get_rng_state()
    net = nn.Sequential(nn.Conv2d(3, 8, 5, bias=False, device="meta"), nn.ConvTranspose2d(8, 3, 5, device="meta"))
    initialise(net.to_empty(device="cpu"), scheme, generator())
    assert all(p.isfinite().all() for p in net.parameters()) and net[0].weight.std() > 0.01
    assert torch.equal(torch.get_rng_state(), state)


def test_other_precisions() -> None:
    for scheme in SCHEMES:
        assert initialise(nn.Linear(4, 3).double(), scheme, generator()).weight.dtype == torch.float64


@pytest.mark.parametrize(("name", "near"), [("AE_CURVE", "AE_CURVES"), ("mlp", "MLP"), ("toynet", "ToyNet")])
def test_an_unknown_model(name: str, near: str) -> None:
    with pytest.raises(ModelError, match=f"did you mean {near}.*DeepLinear"):
        resolve(name)


def test_an_unknown_initialisation() -> None:
    with pytest.raises(ModelError, match="unknown initialisation 'xavier', did you mean xavier_"):
        initialise(nn.Linear(1, 1), "xavier", generator())


OWN = """
from torch import nn

def build(data):
    return nn.Linear(4, 4)

def declared(data):
    return nn.Linear(4, 4)

def mistaken(data):
    return nn.Linear(4, 4)

declared.task = "reconstruct"
mistaken.task = "sing"
"""


def test_one_s_own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_nets.py").write_text(OWN)
    (tmp_path / "own_tasked.py").write_text(OWN + "task = 'reconstruct'\n")
    labelled, unlabelled = data(1, 2, 2), data(1, 2, 2, labels=None)
    assert isinstance(resolve("own_nets:build", labelled).build(labelled), nn.Linear)
    assert resolve("own_nets:build", labelled).task == "predict"
    assert resolve("own_nets:build", unlabelled).task == "reconstruct"
    assert resolve("own_nets:declared", labelled).task == "reconstruct"
    assert resolve("own_tasked:build").task == "reconstruct"
    assert resolve("own_tasked:build").inputs == "flat"
    assert resolve("own_tasked:build", inputs="images").inputs == "images"
    assert isinstance(resolve("own_nets:declared"), Model)
    with pytest.raises(ModelError, match="declares no task"):
        resolve("own_nets:build")
    with pytest.raises(ModelError, match="'sing'"):
        resolve("own_nets:mistaken", labelled)
    with pytest.raises(ModelError, match="'absent' is no such function"):
        resolve("own_nets:absent", labelled)
