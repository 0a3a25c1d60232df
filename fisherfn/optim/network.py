"""A module as a pure function: reads its parameters, buffers and noise, and writes back updated buffers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fisherfn import tree
from fisherfn.distributed import DataParallel
from fisherfn.errors import NoiseError, StructureError, expect
from fisherfn.randomness import dropout_seeds
from fisherfn.stats.functional import check_net, functional, mode_of
from fisherfn.types import Model, PyTree, Tree

T = TypeVar("T")

_DROPS = (nn.modules.dropout._DropoutNd, nn.MultiheadAttention)


class Network:
    """A module, its trained parameters, and a flag for dropout seeds."""

    def __init__(self, net: nn.Module) -> None:
        expect(net, nn.Module, "net", "pass the torch.nn.Module whose parameters are trained")
        self.net = net
        self._chosen: list[Tensor] = []
        self._fixed: dict[str, Any] | None = None
        self._seeded: dict[Any, bool] = {}
        self._low: torch.dtype | None = None
        self.unused: frozenset[str] = frozenset()
        """Parameters that the outputs do not depend on; they are not changed."""

    # ------------------------------------------------------------------------------------------- its parameters

    def train(self, chosen: Iterable[Tensor]) -> None:
        """Set the parameters to train; a group may have only frozen ones."""
        if self._fixed is not None:
            raise StructureError("the layers were found at the first batch: make a new optimizer for more parameters.")
        before, self._chosen = self._chosen, list(chosen)
        try:
            self.parameters(least=0)
        except StructureError:
            self._chosen = before
            raise

    def parameters(self, *, least: int = 1) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name: the chosen ones that require a gradient.

        Raises:
            StructureError: a parameter of another net, no parameter, or other parameters than at the build (names,
                types or devices).
        """
        own = dict(self.net.named_parameters())
        chosen = {id(p) for p in self._chosen}
        if not chosen <= {id(p) for p in own.values()}:
            raise StructureError(
                "a tensor to train is not a parameter of the net: pass parameters of this net, after replacing "
                "layers, and make a new optimizer whenever layers are replaced."
            )
        found = {name: p for name, p in own.items() if id(p) in chosen and p.requires_grad}
        if len(found) < least:
            raise StructureError("there is no parameter to train: none of the given parameters requires a gradient.")
        if self._fixed is not None:
            if found.keys() != self._fixed.keys():
                raise StructureError(
                    f"{sorted(found.keys() ^ self._fixed.keys())[:4]} were frozen or unfrozen after the first batch, "
                    "when layers were found: make a new optimizer at that point."
                )
            moved = [name for name, p in found.items() if _place(p) != self._fixed[name]]
            if moved:
                raise StructureError(
                    f"{moved[:4]} have another type or device than at the first batch, when layers were found: move "
                    "the net before that, or make a new optimizer after moving it."
                )
        return found

    def names(self) -> dict[int, str]:
        """Return the names of the trained parameters that the outputs depend on, by `id`."""
        return {id(p): name for name, p in self.parameters().items() if name not in self.unused}

    def values(self) -> Tree:
        """Return the values of the trained parameters, without autograd."""
        return {name: p.detach() for name, p in self.parameters().items()}

    def gradients(self) -> Tree:
        """Return the `.grad` of every trained parameter; zero for those that the outputs do not depend on."""
        found = self.parameters()
        lacking = [name for name, p in found.items() if p.grad is None and name not in self.unused]
        if lacking:
            raise StructureError(
                f"{', '.join(map(repr, lacking[:4]))} have no gradient: call loss.backward() before step(), and "
                "zero_grad() after it; freeze (requires_grad_(False)) parameters that the loss does not depend on."
            )
        grads = {name: torch.zeros_like(p) if p.grad is None else p.grad.detach() for name, p in found.items()}
        return {name: grad.to_dense() if grad.is_sparse else grad for name, grad in grads.items()}

    # ------------------------------------------------------------------------------------------ its other inputs

    def context(self, x: PyTree, generator: torch.Generator, ranks: DataParallel | None = None) -> Tree:
        """Return the buffers, and dropout seeds for the examples of `x` if the net has dropout."""
        buffers = {name: buffer.detach() for name, buffer in self.net.named_buffers()}
        draw = dropout_seeds if ranks is None else ranks.dropout_seeds
        return buffers | {"dropout": draw(examples(x), generator)} if self._seeded[self.kind(x)] else buffers

    def kind(self, x: PyTree) -> Any:
        """Return the key of a build: the example shapes of the inputs, and the mode of every module."""
        leaves = tree.flatten(x).items() if isinstance(x, dict) else enumerate(tree.leaves(x))
        shapes = tuple((path, leaf.shape[1:]) for path, leaf in leaves if isinstance(leaf, Tensor))
        return shapes, tuple(mode_of(module) for module in self.net.modules())

    def constants(self) -> Any:
        """Return what a compiled step contains as constants: the type of autocast, and the rates of dropout."""
        rates = (vars(module).get(name) for module in self.net.modules() for name in ("p", "dropout"))
        return self._low, tuple(rate for rate in rates if isinstance(rate, float | int))

    def move_buffers(self, context: Tree) -> None:
        """Write the new buffers to the net; a buffer with another shape or type is replaced."""
        for name, buffer in self.net.named_buffers():
            new = context[name]
            if new.shape == buffer.shape and new.dtype == buffer.dtype:
                buffer.copy_(new)
            else:
                module, _, key = name.rpartition(".")
                self.net.get_submodule(module)._buffers[key] = new.clone()

    @contextlib.contextmanager
    def alone_in_autocast(self) -> Iterator[None]:
        """Apply the caller's autocast only to the net; curvature uses the precision of its factors, without grad."""
        device = next(iter(self.parameters().values())).device.type
        self._low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        with torch.no_grad(), torch.autocast(device, enabled=False):
            yield

    # ------------------------------------------------------------------------------------------------ as a model

    def build(self, make: Callable[[Model, Tree, Tree], T], x: PyTree) -> T:
        """Call `make(model, params, context)`, with dropout seeds in the context if the net needs them."""
        check_net(self.net)
        kind = self.kind(x)  # with net.eval() it may need none
        self._seeded[kind] = any(isinstance(m, _DROPS) for m in self.net.modules())
        params, generator = self.values(), torch.Generator().manual_seed(0)
        try:
            made = make(self.model(), params, self.context(x, generator))
        except NoiseError:  # the net may call F.dropout by itself
            if self._seeded[kind]:
                raise
            self._seeded[kind] = True
            made = make(self.model(), params, self.context(x, generator))
        self._fixed = {name: _place(p) for name, p in params.items()}
        return made

    def model(self) -> Model:
        """Return the net as a pure model."""
        plain, _, _ = functional(self.net)

        def model(params: Tree, x: PyTree, context: Tree) -> tuple[Any, Tree]:
            """Run the net in the caller's autocast."""
            device, low = next(iter(params.values())).device.type, self._low
            with torch.autocast(device, dtype=low, enabled=low is not None):
                outputs: tuple[Any, Tree] = plain(params, x, context)
            return outputs

        model.exact = plain  # type: ignore[attr-defined]  # adaptive steps compare losses, which autocast would round
        return model


def _place(p: Tensor) -> tuple[torch.dtype, torch.device]:
    return p.dtype, p.device


def examples(x: PyTree) -> int:
    """Return N of some inputs; 0 if there is no tensor."""
    sizes = [leaf.shape[0] for leaf in tree.leaves(x) if isinstance(leaf, Tensor) and leaf.ndim]
    return sizes[0] if sizes else 0
