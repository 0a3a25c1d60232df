"""A model with example inputs, which a build runs several times with more, fewer or other examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.func import vjp

from fisherfn import tree
from fisherfn.errors import EmptyBatchError, NoiseError, NonFiniteError, ShapeError, StructureError
from fisherfn.stats.functional import call, run
from fisherfn.stats.intercept import Intercept
from fisherfn.stats.scout import Scout
from fisherfn.types import Model, PyTree, Tree

FEW = 4
"""The number of examples that a build runs if they show enough: its cost then does not grow with the batch."""


@dataclass(frozen=True)
class Probe:
    """A model, its parameters, example inputs and a context (`()` for none)."""

    model: Model
    params: Tree
    x: PyTree
    context: PyTree

    def apart(self) -> Probe:
        """Return the probe with its own parameters, and small numbers in place of those that are zero throughout.

        Where a gate or the last layer is zero (ReZero, LoRA), every gradient behind it is, and would confirm anything.
        Zeros stay if the model cannot run on other numbers (the Cholesky factor of I + S).
        """
        generator = torch.Generator().manual_seed(2)
        each = {id(p): p.detach().clone() for p in self.params.values()}  # one for a parameter under two names
        own = replace(self, params={name: each[id(p)] for name, p in self.params.items()})
        zeros = {place: p for place, p in each.items() if not bool((p != 0).any())}
        if not zeros:
            return own
        numbers = {
            place: (0.1 * torch.rand(p.shape, generator=generator, dtype=torch.float64)).to(p)
            for place, p in zeros.items()
        }
        other = replace(self, params={name: (each | numbers)[id(p)] for name, p in self.params.items()})
        return other if (other.few() if self.examples > FEW else other).runs() else own

    def runs(self) -> bool:
        """Return True if the model runs, with finite outputs."""
        try:
            return bool(torch.isfinite(self.run()).all())
        except Exception:  # the build of the original raises its own error
            return False

    def check(self) -> None:
        """Raise unless these are real parameters and at least one example."""
        if not isinstance(self.params, Mapping) or not self.params:
            raise StructureError("params must be a non-empty dict {name: tensor}, as from net.named_parameters().")
        for name, p in self.params.items():
            if not isinstance(p, Tensor) or not p.is_floating_point():
                raise StructureError(
                    f"params[{name!r}] must be a real floating-point tensor, got {getattr(p, 'dtype', type(p))}. A "
                    "complex parameter is written as two real ones, or as torch.view_as_complex of a real one."
                )
        leaves = tree.leaves(self.x)
        if not leaves or not all(isinstance(leaf, Tensor) and leaf.ndim > 0 for leaf in leaves):
            raise ShapeError("example inputs must be tensors with a leading axis of examples.")
        if self.examples == 0:
            raise EmptyBatchError("the example inputs are empty: one trace needs at least one example.")

    def check_numbers(self) -> None:
        """Raise if parameters or example inputs are not finite: with NaN no layer can be verified."""
        parts = {f"params[{name!r}]": ok for name, ok in tree.finite_each(self.params).items()}
        parts["the example inputs"] = torch.tensor(finite(self.x))
        for name, ok in parts.items():
            if not bool(ok):
                raise NonFiniteError(
                    f"the layers cannot be found because there is NaN or infinity in {name}: build with finite numbers."
                )

    @property
    def examples(self) -> int:
        """The number of examples."""
        return int(tree.leaves(self.x)[0].shape[0])

    @property
    def seeds(self) -> tuple[bool, ...]:
        """One flag per leaf of the context: True if it holds the dropout seeds."""
        return tuple(path.partition("/")[0] == "dropout" for path in tree.flatten(self.context))

    @property
    def lengths(self) -> tuple[bool, ...]:
        """One flag per leaf of the context: True if its first axis is as long as the batch."""
        leaves = tree.leaves(self.context)
        return tuple(isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == self.examples for leaf in leaves)

    def run(self) -> Tensor:
        """Run the model and return its outputs."""
        outputs: Tensor = run(self.model, self.params, self.x, self.context)[0]
        return outputs

    def gradients(self, cotangent: Tensor) -> Tree:
        """Return autograd's gradient with respect to all parameters for this cotangent."""
        _, pull = vjp(lambda p: replace(self, params=p).run(), dict(self.params))  # type: ignore[misc]
        grads: Tree = pull(cotangent)[0]
        return grads

    def unused(self) -> list[str]:
        """Return the parameters that the outputs do not depend on."""
        with torch.enable_grad():
            leaves = {name: p.detach().clone().requires_grad_() for name, p in self.params.items()}
            outputs = replace(self, params=leaves).run()
            grads: tuple[Tensor | None, ...] = (None,) * len(leaves)
            if outputs.requires_grad:
                grads = torch.autograd.grad(outputs.sum(), list(leaves.values()), allow_unused=True)
        return [name for name, g in zip(leaves, grads, strict=True) if g is None]

    def trace(self, scout: Scout | None = None) -> tuple[Tensor, Intercept]:
        """Run the model and record its calls.

        Raises:
            NoiseError: the model uses the global random generator.
            ShapeError: the outputs are not one real tensor `[N, …]`.
        """
        before, numbers = _global_generators(self.params), _numpy_state()
        x = tree.map(torch.clone, self.x)  # a model that changes its inputs is refused, and the originals are kept
        with torch.no_grad(), Intercept(self.params, shared=scout) as mode:
            mode.begin(x)
            outputs, _ = call(self.model, self.params, x, self.context)
        after = _global_generators(self.params)
        if not all(torch.equal(before[device], after[device]) for device in before):
            _restore(before)
            raise NoiseError(
                "the model draws from the global generator: a gradient would not be a function of its arguments. "
                "Sample its noise outside, and pass it as an input like x or in the context."
            )
        if _numpy_state() != numbers:
            name, content, *rest = numbers
            numpy.random.set_state((name, numpy.frombuffer(content, numpy.uint32), *rest))
            raise NoiseError(
                "the model draws from numpy's global generator (as the spectrogram masks of transformers' speech nets "
                "do): a gradient would not be a function of its arguments. Switch that off (apply_spec_augment = "
                "False), or pass the noise as an input like x or in the context."
            )
        _check_outputs(outputs, self.examples)
        return outputs, mode

    # other examples ------------------------------------------------------------------------------------------

    def few(self) -> Probe:
        """Return a few examples with their dropout seeds.

        They are spread over the batch, since a model may take another path for padded examples.
        """
        chosen = torch.linspace(0, self.examples - 1, FEW).long()
        return self._with(self.seeds, lambda leaf: leaf[chosen])

    def alone(self, by_example: tuple[bool, ...]) -> Probe:
        """Return the first example with its own part of the context."""
        return self._with(by_example, lambda leaf: leaf[:1])

    def one_more(self, by_example: tuple[bool, ...]) -> Probe:
        """Return these examples, followed by a copy of the first."""
        return self._with(by_example, lambda leaf: torch.cat([leaf, leaf[:1]]))

    def with_another(self, by_example: tuple[bool, ...]) -> Probe:
        """Return these examples and as many different ones: numbers rescaled entry by entry, indices reordered."""
        x = tree.map(lambda leaf: torch.cat([leaf, _other(leaf)]), self.x)
        return replace(self.one_more(by_example), x=x)

    def _with(self, by_example: tuple[bool, ...], change: Callable[[Tensor], Tensor]) -> Probe:
        """Return the probe with a change applied to all tensors that have the examples on their first axis."""
        pairs = zip(tree.leaves(self.context), by_example, strict=True)
        context = tree.replace_leaves(self.context, [change(leaf) if mine else leaf for leaf, mine in pairs])
        return replace(self, x=tree.map(change, self.x), context=context)


def _check_outputs(outputs: Any, examples: int) -> None:
    if not isinstance(outputs, Tensor) or outputs.ndim == 0 or outputs.shape[0] != examples:
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ShapeError(
            f"the model must return one tensor [N, …] for N = {examples} examples, got {found}: return what the "
            "likelihood takes, or wrap the net in one that does (an object with .logits is taken as it is)."
        )
    if outputs.is_complex():
        raise ShapeError(
            f"the model's outputs are {outputs.dtype}, but gradients need real numbers: return "
            "torch.view_as_real(outputs), and write the likelihood for real and imaginary parts."
        )


def _other(leaf: Tensor) -> Tensor:
    if not leaf.is_floating_point():
        return leaf.roll(1, -1) if leaf.ndim > 1 else leaf
    generator = torch.Generator().manual_seed(1)
    return leaf * (0.5 + torch.rand(leaf.shape, generator=generator, dtype=torch.float64)).to(leaf)


def _global_generators(params: Tree) -> dict[torch.device, Tensor]:
    """Return the states of the global generators that a model might use: the CPU's, and that of the parameters' GPU."""
    states = {torch.device("cpu"): torch.get_rng_state()}
    device = next(iter(params.values())).device
    return states | ({device: torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _numpy_state() -> Any:
    """Return the state of numpy's global generator. Python's own is not checked, because type checkers use it."""
    state: Any = numpy.random.get_state()
    name, numbers, *rest = state
    return name, numbers.tobytes(), *rest


def _restore(generators: dict[torch.device, Tensor]) -> None:
    for device, state in generators.items():
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)


def finite(x: PyTree) -> bool:
    """Return True if some inputs are finite; layers cannot be found with NaN."""
    floats = [leaf for leaf in tree.leaves(x) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return bool(tree.finite_inputs(floats))
