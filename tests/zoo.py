"""The cases, as data: small nets × likelihoods × batches, float64, every number from a local generator.

`blocks` says by hand which parameters form a layer: {key: (weight, bias)}. The oracles read `density`, never the
library's likelihood.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Bernoulli, Categorical, Distribution, Normal
from torch.func import functional_call

import fisherfn as ff
from tests.nets import (
    Diagonal,
    Elsewhere,
    Language,
    Matmul,
    MeanPool,
    Patches,
    Pool,
    Scaled,
    Squeeze,
    Tied,
    TiedWeights,
    Transformer,
    conv_autoencoder,
    mlp,
)
from tests.typed import noted

DTYPE = torch.float64
LAYERS = (
    *(nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm),
    *(nn.modules.batchnorm._BatchNorm, nn.modules.conv._ConvNd),
)
FISHERS = ("mc", "type2", "empirical")
SAMPLES = 2


@dataclass(frozen=True)
class Problem:
    model: Callable[..., Any]
    params: dict[str, torch.Tensor]
    x: torch.Tensor
    y: torch.Tensor
    likelihood: Any
    density: Callable[[torch.Tensor], Distribution]
    blocks: dict[str, tuple[str, ...]]
    net: nn.Module | None = None

    @property
    def batch(self):
        return self.x, self.y

    def any_target(self, outputs):
        """A target at which the NLL's Hessian in the outputs is its expectation."""
        dist = self.density(outputs)
        return torch.zeros(dist.batch_shape, dtype=torch.long) if isinstance(dist, Categorical) else dist.mean

    def build(self, **kwargs):
        return ff.natural_gradient(self.model, self.params, self.x, likelihood=self.likelihood, **kwargs)


# ------------------------------------------------------------------------------------------------- likelihoods

LIKELIHOODS: dict[str, tuple[Callable[[], Any], Callable[[torch.Tensor], Distribution]]] = {
    "categorical": (lambda: ff.Categorical(), lambda out: Categorical(logits=out, validate_args=False)),
    "bernoulli": (lambda: ff.Bernoulli(), lambda out: Bernoulli(logits=out, validate_args=False)),
    "bernoulli-probs": (
        lambda: ff.Bernoulli(logits=False),
        lambda out: Bernoulli(logits=out.log() - (1 - out).log(), validate_args=False),
    ),
    "gaussian": (lambda: ff.Gaussian(), lambda out: Normal(out, 1.0, validate_args=False)),
    "gaussian-0.3": (lambda: ff.Gaussian(variance=0.3), lambda out: Normal(out, 0.3**0.5, validate_args=False)),
}


def draw(dist: Distribution, generator: torch.Generator) -> torch.Tensor:
    """Data targets, from torch alone."""
    if isinstance(dist, Categorical):
        u = torch.rand(dist.batch_shape, generator=generator, dtype=DTYPE)
        return (dist.probs.detach().cumsum(-1) < u[..., None]).sum(-1).clamp(max=dist.probs.shape[-1] - 1)
    if isinstance(dist, Bernoulli):
        return (torch.rand(dist.batch_shape, generator=generator, dtype=DTYPE) < dist.mean.detach()).to(DTYPE)
    noise = torch.randn(dist.batch_shape, generator=generator, dtype=DTYPE)
    return dist.mean.detach() + dist.stddev.detach() * noise


# ------------------------------------------------------------------------------------------- problems from nets


def from_net(net, x_shape, likelihood, *, seed=0, blocks=None, trained=None, vocabulary=None) -> Problem:
    """Parameters, buffers, inputs and targets from one generator.

    `trained` restricts the parameters that are differentiated; with a `vocabulary`, inputs are numbers of tokens.
    """
    net = net.double()
    generator = torch.Generator().manual_seed(seed)

    def rand(shape):
        return torch.randn(shape, generator=generator, dtype=DTYPE)

    every = {name: rand(leaf.shape) / max(1, leaf.shape[-1]) ** 0.5 for name, leaf in net.named_parameters()}
    frozen = {} if trained is None else {name: leaf for name, leaf in every.items() if not trained(name)}
    params = {name: leaf for name, leaf in every.items() if name not in frozen}

    def model(params, x):
        return functional_call(net, {**frozen, **params}, (x,))

    for buffer in net.buffers():
        if buffer.is_floating_point():  # means and variances far from 0 and 1
            buffer.data.copy_(0.5 + torch.rand(buffer.shape, generator=generator, dtype=DTYPE))
    x = torch.randint(vocabulary, x_shape, generator=generator) if vocabulary else rand(x_shape)
    return from_model(model, params, x, likelihood, generator, blocks or layers_of(net, params), net)


def from_model(model, params, x, likelihood, generator, blocks, net=None) -> Problem:
    make, density = LIKELIHOODS[likelihood]
    y = draw(density(model(params, x)), generator)
    return Problem(model, params, x, y, make(), density, blocks, net)


def layers_of(net, params) -> dict[str, tuple[str, ...]]:
    blocks: dict[str, tuple[str, ...]] = {}
    for name in params:
        module, _, leaf = name.rpartition(".")
        key = module if isinstance(net.get_submodule(module), LAYERS) else name
        blocks[key] = (*blocks.get(key, ()), name)
    return blocks


def callable_problem(likelihood="gaussian") -> Problem:
    """No module at all: F.linear on a dict."""
    generator = torch.Generator().manual_seed(7)

    def model(params, x):
        hidden = F.softplus(F.linear(x, params["enc.weight"], params["enc.bias"]))
        return F.linear(hidden, params["dec.weight"])

    shapes = {"enc.weight": (4, 3), "enc.bias": (4,), "dec.weight": (2, 4)}
    params = {name: torch.randn(shape, generator=generator, dtype=DTYPE) for name, shape in shapes.items()}
    x = torch.randn(5, 3, generator=generator, dtype=DTYPE)
    return from_model(
        model, params, x, likelihood, generator, {"enc": ("enc.weight", "enc.bias"), "dec": ("dec.weight",)}
    )


# -------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    id: str
    make: Callable[[], Problem]
    tags: frozenset[str] = field(default_factory=frozenset)


def case(id: str, make: Callable[[], Problem], *tags: str) -> Case:
    return Case(id, make, frozenset(tags))


# Tags: `linear` = every parameter belongs to an nn.Linear (K-FAC's oracle applies); `deep-linear` = K-FAC is exact
# for it under type-2; `blocks` = `Problem.blocks` states the partition.
CASES = [
    case("mlp-categorical", lambda: from_net(mlp(3, 4, 3), (5, 3), "categorical"), "linear", "blocks"),
    case("mlp-bernoulli", lambda: from_net(mlp(4, 3, 2, act=nn.Softplus), (4, 4), "bernoulli"), "linear", "blocks"),
    case(
        "mlp-bernoulli-probs",
        lambda: from_net(mlp(3, 3, 2, last=nn.Sigmoid), (4, 3), "bernoulli-probs"),
        "linear",
        "blocks",
    ),
    case("mlp-gaussian", lambda: from_net(mlp(3, 5, 2, act=nn.GELU), (6, 3), "gaussian-0.3"), "linear", "blocks"),
    case("no-bias", lambda: from_net(mlp(3, 4, 2, bias=False), (5, 3), "categorical"), "linear", "blocks"),
    case("one-layer", lambda: from_net(mlp(3, 2), (4, 3), "gaussian"), "linear", "blocks"),
    case("one-datum", lambda: from_net(mlp(2, 3, 2), (1, 2), "categorical"), "linear", "blocks"),
    case(
        "deep-linear",
        lambda: from_net(mlp(3, 4, 3, 2, act=None), (6, 3), "gaussian-0.3"),
        "linear",
        "blocks",
        "deep-linear",
    ),
    case("sequence-out", lambda: from_net(mlp(3, 4, 3), (4, 3, 3), "categorical"), "linear", "blocks"),
    case("sequence-gaussian", lambda: from_net(mlp(3, 3, 2), (3, 4, 3), "gaussian"), "linear", "blocks"),
    case(
        "sequence-pooled",
        lambda: from_net(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Pool(), nn.Linear(4, 3)), (5, 4, 3), "categorical"),
        "linear",
        "blocks",
    ),
    case("two-axes", lambda: from_net(mlp(2, 3, 2), (3, 2, 3, 2), "bernoulli"), "linear", "blocks"),
    case("tied-layer", lambda: from_net(Tied(), (5, 3), "categorical"), "linear", "blocks"),
    case("tied-weights", lambda: from_net(TiedWeights(), (5, 3), "gaussian")),
    case(
        "scalar-bernoulli",
        lambda: from_net(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1), Squeeze()), (5, 3), "bernoulli"),
        "linear",
        "blocks",
    ),
    case(
        "scalar-gaussian",
        lambda: from_net(nn.Sequential(nn.Linear(3, 1), Squeeze()), (5, 3), "gaussian"),
        "linear",
        "blocks",
    ),
    case("callable", callable_problem, "blocks"),
    case("scale-vector", lambda: from_net(Scaled(), (5, 3), "categorical"), "blocks"),
    case("scale-matrix", lambda: from_net(Diagonal(), (5, 3), "categorical"), "blocks", "fallback"),
    case("language", lambda: from_net(Language(), (3, 3), "categorical", vocabulary=4), "blocks"),
    case("patches", lambda: from_net(Patches(), (3, 2, 3), "categorical"), "blocks"),
    case("matmul", lambda: from_net(Matmul(), (5, 3), "gaussian"), "blocks"),
    case("weight-elsewhere", lambda: from_net(Elsewhere(), (5, 3), "categorical"), "fallback"),
    case(
        "layer-norm",
        lambda: from_net(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), (5, 3), "categorical"),
        "blocks",
    ),
    case(
        "conv",
        lambda: from_net(
            nn.Sequential(nn.Conv2d(1, 2, 2, 1, 1), nn.Tanh(), nn.Conv2d(2, 2, 2, 2), nn.Flatten(), nn.Linear(2, 2)),
            (4, 1, 2, 2),
            "categorical",
        ),
        "blocks",
    ),
    case(
        "conv-groups",
        lambda: from_net(
            nn.Sequential(nn.Conv1d(2, 4, 2, groups=2), nn.Tanh(), nn.Conv1d(4, 2, 1, groups=2), MeanPool()),
            (4, 2, 3),
            "gaussian-0.3",
        ),
        "blocks",
    ),
    case("conv-transpose", lambda: from_net(conv_autoencoder(), (3, 1, 4, 4), "bernoulli"), "blocks"),
    case(
        "group-norm",
        lambda: from_net(
            nn.Sequential(nn.Conv1d(1, 4, 2, bias=False), nn.GroupNorm(2, 4), nn.Tanh(), MeanPool(), nn.Linear(4, 2)),
            (4, 1, 3),
            "categorical",
        ),
        "blocks",
    ),
    case(
        "tokens",
        lambda: from_net(
            nn.Sequential(nn.Embedding(4, 3), nn.LayerNorm(3), Pool(), nn.Linear(3, 2)),
            (5, 3),
            "categorical",
            vocabulary=4,
        ),
        "blocks",
    ),
    case(
        "transformer",
        lambda: from_net(Transformer(3, 2, hidden=2, fused=False), (3, 2), "categorical", vocabulary=3),
        "blocks",
    ),
    case(
        "frozen-layer",
        lambda: from_net(mlp(3, 4, 3, 2), (5, 3), "categorical", trained=lambda name: not name.startswith("2.")),
        "linear",
        "blocks",
    ),
    case(
        "frozen-bias",
        lambda: from_net(mlp(3, 4, 2), (5, 3), "categorical", trained=lambda name: name != "0.bias"),
        "linear",
        "blocks",
    ),
    case(
        "frozen-weight",
        lambda: from_net(mlp(3, 4, 2), (5, 3), "categorical", trained=lambda name: name != "0.weight"),
        "blocks",
    ),
]


def cases(*tags: str) -> list[Any]:
    """pytest parameters of the cases that carry all `tags`."""
    return [pytest.param(c.make, id=c.id) for c in CASES if set(tags) <= c.tags]


def pick(id: str) -> Problem:
    return next(c for c in CASES if c.id == id).make()


def to(problem: Problem, dtype: torch.dtype) -> Problem:
    """The same problem with parameters, inputs and real targets in `dtype`."""

    def cast(leaf):
        return leaf.to(dtype) if leaf.is_floating_point() else leaf

    params = {name: cast(leaf) for name, leaf in problem.params.items()}
    return replace(problem, params=params, x=cast(problem.x), y=cast(problem.y))


# ------------------------------------------------------------------------------------------ statistics of a case


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_tree(params, seed: int = 0):
    rng = generator(seed)
    return {name: torch.randn(leaf.shape, generator=rng, dtype=leaf.dtype) for name, leaf in params.items()}


@dataclass(frozen=True)
class Sampled:
    """A build, its statistics, and the labels that its noise stands for (for the oracles)."""

    ng: Any
    stats: Any
    noise: torch.Tensor | None
    draws: list[torch.Tensor] | None


def sampled(problem: Problem, fisher: str = "mc", *, samples: int = SAMPLES, seed: int = 0, **kwargs) -> Sampled:
    ng = problem.build(fisher=fisher, samples=samples if fisher == "mc" else 1, **kwargs)
    if fisher != "mc":
        return Sampled(ng, ng.stats(problem.params, problem.batch), None, None)
    noise = ng.noise(problem.batch, generator(seed))
    outputs = problem.model(problem.params, problem.x)
    draws = [problem.likelihood.sample(outputs, noise[:, s]) for s in range(samples)]
    return Sampled(ng, ng.stats(problem.params, problem.batch, noise=noise), noise, draws)


@contextmanager
def as_installed() -> Iterator[None]:
    """Without the type checks of the test run, which would speak before the library: the errors that a user meets."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with noted():
            yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
