"""K-FAC of other libraries on the same weights and batch, each in the fastest way that its documentation shows.

fisherfn does not need them; requirements-peers.txt has their versions. Each adapter builds one training step from its
library: gradients by autograd, the library's statistics, damped inverse and preconditioning, and an update of the
weights. A layer that the library does not support is updated with its plain gradient. Libraries that sample labels
("mc") use one label per example.

For the tests an adapter also accepts the other `fisher` of its library; `natural_gradient` is its preconditioned
gradient in the units of docs/conventions.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from common.benchmark.contenders import Contender, Parts, coverage
from common.benchmark.problems import Problem, Training

RATE = 1e-8
"""Learning rate so small that the weights do not change during the timing."""

DAMPING = 1.0

KNOWN = nn.Linear, nn.Conv2d
"""Layers that each library supports in K-FAC."""

NaturalGradient = dict[nn.Module, tuple[Tensor, ...]]
"""Parameters of a layer: weight, and bias if it has one."""


class Adapter(NamedTuple):
    """The K-FAC of a library on a problem."""

    natural_gradient: Callable[[], NaturalGradient]  # with the current inverses
    contender: Contender


# curvlinops -----------------------------------------------------------------------------------------------------------


def curvlinops(problem: Problem, fisher: str = "mc", damping: float = DAMPING) -> Adapter:
    """`KFACLinearOperator` and its inverse with the heuristic damping, weights and biases jointly.

    Its loss is the sum over the batch, with a Fisher N times that of the mean; damping and result are scaled to match.
    """
    from curvlinops import KFACInverseLinearOperator, KFACLinearOperator

    train, n = problem.training(), len(problem.batch[0])
    loss = nn.CrossEntropyLoss(reduction="sum") if train.y.ndim == 1 else nn.BCEWithLogitsLoss(reduction="sum")
    layers = list(known(train.net))
    weights = [p for layer in layers for p in layer.parameters()]
    shared = (
        1 if train.y.ndim <= 2 else train.y[0, ..., 0].numel()
    )  # all axes of the outputs except the last are shared positions
    held: dict[str, Any] = {}

    def statistics() -> None:
        held["fisher"] = KFACLinearOperator(
            train.net, loss, weights, [(train.x, train.y)], check_deterministic=False, fisher_type=fisher,
            separate_weight_and_bias=False, num_data=n, num_per_example_loss_terms=shared,
        )  # fmt: skip
        held["fisher"].compute_kronecker_factors()

    def natural_gradient() -> NaturalGradient:
        flat = iter(held["inverse"] @ [n * p.grad for p in weights if p.grad is not None])
        return {layer: tuple(next(flat) for _ in layer.parameters()) for layer in layers}

    def step() -> None:
        train.backward()
        update(train, natural_gradient())

    def inverses() -> None:
        held["inverse"] = KFACInverseLinearOperator(held["fisher"], damping=n * damping, use_heuristic_damping=True)

    def step_with_inverses() -> None:  # computed at the first product
        inverses()
        step()

    statistics()
    inverses()
    train.backward()
    parts = Parts(step, statistics=statistics, step_with_inverses=step_with_inverses)
    return Adapter(natural_gradient, Contender(parts, coverage(train.net, KNOWN)))


# nngeometry -----------------------------------------------------------------------------------------------------------


class Whole(Dataset):
    """A batch as a data set that is fetched as a whole, without collating examples."""

    def __init__(self, *batch: Tensor) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch[0])

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        """Return the whole batch."""
        return self.batch


def nngeometry(problem: Problem, fisher: str = "mc", damping: float = DAMPING) -> Adapter:
    """`PMatKFAC` with `inverse` and `mv`, on the gradient of each example's log-likelihood.

    Its `FIM_MonteCarlo` only supports class labels; this is the same call for any likelihood.
    """
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection
    from nngeometry.object import PMatKFAC, PVector

    train = problem.training()
    layers, names = list(known(train.net)), {module: name for name, module in train.net.named_modules()}
    collection = LayerCollection()
    for layer in layers:
        collection.add_layer_from_model(train.net, layer)
    loader = DataLoader(
        Whole(train.x, train.y), len(train.x), sampler=SequentialSampler(train.x), collate_fn=lambda batch: batch
    )

    def log_likelihoods(x: Tensor, y: Tensor) -> Tensor:
        outputs = train.net(x)
        targets = y if fisher == "empirical" else drawn(outputs.detach(), y)
        return problem.likelihood.nll(outputs, targets).unsqueeze(1)

    backend = TorchHooksJacobianBackend(layer_collection=collection, model=train.net, function=log_likelihoods)
    held: dict[str, Any] = {}

    def statistics() -> None:
        held["fisher"] = PMatKFAC(generator=backend, examples=loader)

    def inverses() -> None:
        held["inverse"] = held["fisher"].inverse(regul=damping)

    def natural_gradient() -> NaturalGradient:
        grads = {names[layer]: tuple(p.grad for p in layer.parameters()) for layer in layers}
        product = held["inverse"].mv(PVector(collection, dict_repr=grads)).to_dict()
        return {layer: product[names[layer]] for layer in layers}

    def step() -> None:
        train.backward()
        update(train, natural_gradient())

    statistics()
    inverses()
    train.backward()
    parts = Parts(step, statistics=statistics, inverses=inverses)
    return Adapter(natural_gradient, Contender(parts, coverage(train.net, KNOWN)))


def drawn(outputs: Tensor, like: Tensor) -> Tensor:
    """Sample one label per example from the model."""
    if like.ndim == 1:
        return outputs.softmax(1).multinomial(1).squeeze(1)
    return outputs.sigmoid().bernoulli()


# BackPACK -------------------------------------------------------------------------------------------------------------


def backpack(problem: Problem, fisher: str = "mc", damping: float = DAMPING) -> Adapter:
    """The `KFAC` extension; the library has no optimizer: inverses (Cholesky, factored damping) and products are ours.

    Gradient and statistics come from one backward pass. Its KFAC of the binary cross-entropy supports only one output:
    on autoencoders a step with statistics uses the mean squared error instead.
    """
    from backpack import backpack as extended_by
    from backpack import extend
    from backpack.extensions import KFAC, KFLR

    train = problem.training()
    if train.y.ndim > 2:  # its losses need vectors
        train = train._replace(net=nn.Sequential(train.net, nn.Flatten()), y=train.y.flatten(1))
    train = train._replace(net=extend(train.net))
    supported = train._replace(loss=extend(nn.CrossEntropyLoss() if train.y.ndim == 1 else nn.MSELoss()))
    extension, field = (KFAC(mc_samples=1), "kfac") if fisher == "mc" else (KFLR(), "kflr")
    held: dict[Tensor, list[Tensor]] = {}

    def statistics() -> None:
        with extended_by(extension):
            supported.backward()

    def inverses() -> None:
        for p in train.net.parameters():
            held[p] = damped_inverses(getattr(p, field), damping)

    def natural_gradient() -> NaturalGradient:
        layers = [module for module in train.net.modules() if list(module.parameters(recurse=False))]
        return {layer: tuple(product(p, held[p]) for p in layer.parameters(recurse=False)) for layer in layers}

    def step() -> None:
        train.backward()
        update(train, natural_gradient())

    def step_with_statistics() -> None:
        statistics()
        update(train, natural_gradient())

    statistics()
    inverses()
    note = "" if train.y.ndim == 1 else "statistics of the mean squared error"
    parts = Parts(step, inverses=inverses, step_with_statistics=step_with_statistics)
    return Adapter(natural_gradient, Contender(parts, note=note))


def damped_inverses(factors: list[Tensor], damping: float) -> list[Tensor]:
    """Return the damped inverses of [G, A], with π distributing √λ, or of [G], with λ."""
    if len(factors) == 1:
        return [inverse(factors[0], damping)]
    G, A = factors
    pi = (A.diagonal().mean() / G.diagonal().mean()).sqrt()
    return [inverse(G, damping**0.5 / pi), inverse(A, damping**0.5 * pi)]


def inverse(matrix: Tensor, shift: Tensor | float) -> Tensor:
    """Return the inverse of `matrix + shift · I`."""
    damped = matrix.clone()
    damped.diagonal().add_(shift)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


def product(p: Tensor, inverses: list[Tensor]) -> Tensor:
    """Return `G⁻¹ ∇W A⁻¹`, or `G⁻¹ ∇b`."""
    grad = p.grad if p.grad is not None else torch.zeros_like(p)
    if len(inverses) == 1:
        return inverses[0] @ grad
    return (inverses[0] @ grad.flatten(1) @ inverses[1]).view_as(grad)


# SINGD ----------------------------------------------------------------------------------------------------------------


def singd(problem: Problem, fisher: str = "empirical", damping: float = DAMPING, rate: float = 1e-2) -> Adapter:
    """`SINGD` with dense factors and K-FAC-like updates, without inverses; empirical Fisher only."""
    from singd.optim.optimizer import SINGD

    train = problem.training()
    chosen = SINGD(
        train.net, lr=RATE, momentum=0.0, damping=damping, alpha1=0.0, loss_average="batch", lr_cov=rate,
        kfac_like=True, warn_unsupported=False,
    )  # fmt: skip
    ours = {p for group in chosen.param_groups for p in group["params"]}
    rest = [p for p in train.net.parameters() if p not in ours]

    def step(update_preconditioner: bool) -> None:
        for group in chosen.param_groups:
            group["T"] = 1 if update_preconditioner else 10**9
        train.backward()
        chosen.step()
        descend(rest, [p.grad for p in rest])

    def natural_gradient() -> NaturalGradient:  # its preconditioned gradient
        before = {layer: [p.detach().clone() for p in layer.parameters()] for layer in known(train.net)}
        step(False)
        return {
            layer: tuple((p.detach() - new.detach()) / RATE for p, new in zip(old, layer.parameters(), strict=True))
            for layer, old in before.items()
        }

    step(True)
    parts = Parts(lambda: step(False), step_with_statistics=lambda: step(True))
    return Adapter(natural_gradient, Contender(parts, coverage(train.net, KNOWN), "empirical Fisher"))


# all of them ----------------------------------------------------------------------------------------------------------

PACKAGES = ("curvlinops-for-pytorch", "nngeometry", "backpack-for-pytorch", "singd", "pytorch_optimizer")

PEERS: dict[str, Callable[[Problem], Contender]] = {
    "curvlinops": lambda problem: curvlinops(problem).contender,
    "nngeometry": lambda problem: nngeometry(problem).contender,
    "BackPACK": lambda problem: backpack(problem).contender,
    "SINGD": lambda problem: singd(problem).contender,
}


def known(net: nn.Module) -> Iterator[nn.Module]:
    """Return linear layers and convolutions."""
    return (module for module in net.modules() if isinstance(module, KNOWN))


def update(train: Training, nat: NaturalGradient) -> None:
    """Update the weights, with the preconditioned gradient if there is one, else with the plain gradient."""
    steps = {p: move for layer, moves in nat.items() for p, move in zip(layer.parameters(), moves, strict=True)}
    weights = list(train.net.parameters())
    descend(weights, [steps.get(p, p.grad) for p in weights])


@torch.no_grad()
def descend(weights: list[Any], moves: list[Any]) -> None:
    """Update `w ← w − rate · move`."""
    for p, move in zip(weights, moves, strict=True):
        p.add_(move, alpha=-RATE)
