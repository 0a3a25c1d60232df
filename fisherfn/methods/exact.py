r"""The exact natural gradient: $(F + \lambda I)^{-1} \nabla$ with the sampled Fisher, full or block-diagonal.

With $U = \frac{1}{\sqrt N} [\dots \mathrm{vec}(W_{sn}) \dots]$ the Fisher is $F = U U^\top$. The system is solved in
the smaller of example and parameter space (`fisherfn.lowrank`).

"full" couples all layers; "block" keeps one diagonal block per layer, with all its groups. There is no running average:
the factors are the newest statistics, so the shapes of the state's leaves follow the batch. Damping is λI.

Ren & Goldfarb 2019, *Efficient subsampled Gauss-Newton and natural gradient methods for training neural networks*,
section 3.

k group, s sample, n example, t position, i input, o output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import lowrank, rows, tree
from fisherfn.base import Estimated, Method, Preconditioned, Rho
from fisherfn.errors import HyperparameterError, unknown
from fisherfn.fisher import STRUCTURES, Structure
from fisherfn.gradients import Gradient, Own
from fisherfn.linalg.solve import condition, floored
from fisherfn.lowrank import System, combine, examples, gram, inner_products, total
from fisherfn.per_example import example_matrices, squares
from fisherfn.taps import AnyTap, Tap
from fisherfn.types import Shape
from fisherfn.which import Which

UNKNOWNS = 16384
"""Size of the largest system that is factorised: 2 GiB in float64."""

T = TypeVar("T")
Taps = dict[str, Tap]
Matrices = Mapping[str, Tensor]


@dataclass(frozen=True)
class Exact(Method):
    """The exact natural gradient. Built by `ff.exact`, which has the arguments."""

    name = "exactNG"
    structure: Structure | str = "full"

    def __post_init__(self) -> None:
        if self.structure not in STRUCTURES:
            raise unknown("structure", self.structure, STRUCTURES)

    def groups(self, blocks: Mapping[str, T]) -> dict[str, dict[str, T]]:
        """Return the groups of coupled blocks by name."""
        return {"all": dict(blocks)} if self.structure == "full" else {key: {key: each} for key, each in blocks.items()}

    def init(
        self, shapes: Mapping[str, Shape], dtype: torch.dtype, device: torch.device, damping: Tensor
    ) -> tuple[Taps, dict[str, System]]:
        """Return taps without examples, whose Fisher is zero."""
        taps = {key: empty_tap(shape, dtype, device) for key, shape in shapes.items()}
        nothing = torch.zeros(0, 0, dtype=torch.float64, device=device)
        return taps, {key: System(group, nothing, damping.clone()) for key, group in self.groups(taps).items()}

    def update(self, factors: Taps, taps: Mapping[str, AnyTap], rho: Rho, inverting: Which = True) -> Estimated:
        """Replace the statistics by the newest ones, in the precision of the state, at least float32.

        Raises:
            HyperparameterError: the smaller system has more than `UNKNOWNS` unknowns.
        """
        del rho, inverting
        new = {key: compact(tap.to(factors[key].dtype)) for key, tap in taps.items()}
        for group in self.groups(new).values():
            _check_size(group)
        return Estimated(new, {key: tree.finite(tap) for key, tap in new.items()}, {})

    def invert(self, factors: Taps, damping: Float[Tensor, ""]) -> Estimated:
        """Factorise the smaller system of every group of blocks by Cholesky."""
        systems: dict[str, System] = {}
        ok: dict[str, Tensor] = {}
        measured: dict[str, dict[str, Tensor]] = {"jitter": {}, "condition": {}}
        for name, taps in self.groups(factors).items():
            matrix = lowrank.smaller_matrix(taps)
            # the floor is determined by the precision of the statistics
            shift, jitter = floored(matrix.unsqueeze(0), damping.expand(1))
            raised = shift.squeeze(0)
            factor, sound = lowrank.factorise(matrix, raised)
            systems[name] = System(taps, factor, raised.to(damping.dtype))
            ok |= dict.fromkeys(taps, sound & (raised > 0) & (damping >= 0))
            measured["jitter"] |= dict.fromkeys(taps, jitter.squeeze(0))
            measured["condition"] |= dict.fromkeys(taps, condition(factor))
        return Estimated(systems, ok, measured)

    def precondition(
        self, inverses: dict[str, System], gradients: Mapping[str, Gradient], inner: bool
    ) -> Preconditioned:
        """Return `(F + λI)⁻¹ ∇`, group by group."""
        solved: dict[str, Tensor] = {}
        for system in inverses.values():
            solved |= lowrank.solve(system, {key: gradients[key] for key in system.taps})
        products = [_inner(gradient, solved[key]) for key, gradient in gradients.items()] if inner else []
        return Preconditioned(solved, torch.stack(products).sum() if inner else ())

    def precondition_own(
        self, inverses: dict[str, System], own: Own, shapes: Mapping[str, Shape], inner: bool
    ) -> Preconditioned:
        """Return `(F + λI)⁻¹ (∇ + λφ)` for `∇ = 1/N Σ c_sn W_sn` in the rows of F, group by group.

        φ is `own.near`, towards which the step is pulled; zero if there is none.
        """
        solved: dict[str, Tensor] = {}
        products = []
        assert own.coefficients is not None
        for system in inverses.values():
            nat, product = lowrank.solve_own(system, own.coefficients, own.near, inner)
            solved |= {key: matrix.reshape(shapes[key][:3]) for key, matrix in nat.items()}
            products += [product] if isinstance(product, Tensor) else []
        return Preconditioned(solved, torch.stack(products).sum() if inner else ())

    def matvec(self, factors: Taps, matrices: Matrices) -> dict[str, Tensor]:
        """Return `F v`."""
        product: dict[str, Tensor] = {}
        for taps in self.groups(factors).values():
            c = total(taps, matrices) / examples(taps)
            product |= {key: combine(tap, c).reshape(matrices[key].shape) for key, tap in taps.items()}
        return product

    def overlap(self, factors: Taps, taps: Mapping[str, AnyTap]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return `⟨F, F̂⟩` and `‖F̂‖²` of every diagonal block, where F̂ is the Fisher of the state's statistics."""
        return {key: _overlap(factors[key], tap) for key, tap in taps.items()}

    def trace(self, factors: Taps, shapes: Mapping[str, Shape]) -> Float[Tensor, ""]:
        """Return the mean over examples of the squared gradient norms."""
        del shapes
        filled = [tap for tap in factors.values() if tap.sizes.n]  # before the first update there is no example
        zero = next(iter(factors.values())).g.new_zeros(())
        sums = [squares(tap.to(torch.float64)).sum() for tap in filled] or [zero]
        return torch.stack(sums).sum() / examples(factors)

    def rank(self, factors: Taps, outputs: int) -> int:
        """Return the number of outputs of all examples, or of parameters where these are fewer, for each group."""
        limit = outputs * examples(factors)
        return sum(min(limit, lowrank.parameters(taps)) for taps in self.groups(factors).values())

    def eigenvalues(self, factors: Taps, shapes: Mapping[str, Shape]) -> Float[Tensor, " p"]:
        """Return all eigenvalues of F."""
        del shapes
        return torch.cat([lowrank.eigenvalues(taps) for taps in self.groups(factors).values()])

    def logdet(self, inverses: dict[str, System], shapes: Mapping[str, Shape]) -> Float[Tensor, ""]:
        r"""Return $-\log\det(F + \lambda I)$."""
        del shapes
        return -torch.stack([lowrank.logdet(system) for system in inverses.values()]).sum()


def exact(structure: Structure | str = "full") -> Exact:
    """Build the exact natural gradient.

    Args:
        structure: "full" couples all layers, "block" keeps one diagonal block per layer.

    Raises:
        UnknownNameError: an unknown structure.
    """
    return Exact(structure)


# statistics ------------------------------------------------------------------------------------------------------


def empty_tap(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tap:
    """Return the tap of a block without examples."""
    k, o, i, one_hot = shape
    g = torch.zeros(k, 1, 0, 1, o, dtype=dtype, device=device)
    if one_hot:
        return Tap(rows.OneHot(torch.zeros(k, 0, 1, dtype=torch.int64, device=device), i, dtype), g)
    return Tap(torch.zeros(k, 0, 1, i, dtype=dtype, device=device), g)


def compact(tap: AnyTap) -> Tap:
    """Return the smaller of rows and per-example gradients; the latter as a tap with `a = vec(W)` and `g = 1`.

    With several samples the rows are kept, because the samples share `a`.
    """
    _, s, _, t, o, i = tap.sizes
    if s > 1 or o * i >= t * (o + i) or tap.one_hot:
        return tap.whole().copied()
    return _as_rows(tap)


def _as_rows(tap: AnyTap) -> Tap:
    """Return the per-example gradients as the rows of a tap with one output, `g = 1`."""
    k, s, n, _, o, i = tap.sizes
    W = tap.each(example_matrices).reshape(1, s * n, 1, k * o * i)
    return Tap(W, W.new_ones(1, 1, s * n, 1, 1))


def _check_size(taps: Taps) -> None:
    columns, parameters = lowrank.columns(taps), lowrank.parameters(taps)
    smaller = min(columns, parameters)
    if smaller > UNKNOWNS:
        raise HyperparameterError(
            f"the exact natural gradient needs a system of {smaller:,} unknowns ({columns:,} examples and "
            f"samples, {parameters:,} parameters); the limit is {UNKNOWNS:,}. Use fewer columns: "
            'fisher="mc" with few samples instead of "type2", or a part of the batch; or solve it through the model: '
            "ng.implicit_fisher(params, x, y).solve(grads, damping)."
        )


def _inner(gradient: Gradient, z: Tensor) -> Float[Tensor, ""]:
    if isinstance(gradient, Tensor):
        return (gradient * z).sum()
    return inner_products(gradient, z.to(gradient.dtype)).sum() / gradient.sizes.n


def _overlap(mine: Tap, other: AnyTap) -> tuple[Tensor, Tensor]:
    n = max(1, mine.sizes.n)
    other, count = other.to(mine.dtype), other.sizes.n
    if (mine.sizes.k, mine.sizes.o, mine.sizes.i) != (other.sizes.k, other.sizes.o, other.sizes.i):
        other = _as_rows(other)  # as `compact` did with the state's
    cross = gram(mine, other).double().square().sum() / (n * count)
    return cross, (gram(mine).double() / n).square().sum()
