"""Functions that read a state: preconditioning, operators, and the error against the exact sampled Fisher."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import tree
from fisherfn.base import LayerMethod, Method, Preconditioned
from fisherfn.errors import StructureError, expect
from fisherfn.fisher import Fisher, Structure, relative_error
from fisherfn.gradients import NOTHING, Own, as_matrix, tap_is_cheaper
from fisherfn.linalg.damped import in_double
from fisherfn.lowrank import eigenvalues
from fisherfn.operators import Approximation, DampedInverse
from fisherfn.state import State
from fisherfn.stats import Block, Collector, Stats
from fisherfn.taps import Tap
from fisherfn.types import Tree, at_least_single


@dataclass(frozen=True)
class Views(Collector):
    """A model with its likelihood and a method: pure functions that read a state and never return a new one.

    Attributes:
        method: the approximation of the Fisher and its inverse.
    """

    method: Method

    def precondition(self, state: State, grads: Tree | Stats) -> Tree:
        """Return the preconditioned gradient, a tree like params; with `Stats` the gradient itself is not formed.

        A tree may have any floating-point types; the result is computed in the type of the factors.
        """
        self._check_state(state)
        if isinstance(grads, Stats):
            self._check_stats(grads)
        return self._precondition(state, grads, inner=False)[0]

    def matvec(self, state: State, v: Tree) -> Tree:
        """Multiply a tree of any floating-point types by the method's undamped approximate Fisher; see `precondition`.

        The product has the types of the parameters.
        """
        self._check_state(state)
        return self.layout.cast(self.layout.tree(self.method.matvec(state.factors, self._matrices(v))))

    def approximation(self, state: State) -> Approximation:
        """Return the method's undamped approximate Fisher as an operator: products, trace, spectrum, logdet."""
        self._check_state(state)
        method, factors, shapes = self.method, tree.map(_double, state.factors), self.layout.block_shapes

        def spectrum() -> Tensor | None:
            clean = isinstance(method, LayerMethod)
            own = {key: in_double(each) for key, each in state.factors.items()} if clean else factors
            found = method.eigenvalues(own, shapes)
            return found if found is None else torch.cat([found, found.new_zeros(self.layout.outside)])

        return Approximation(
            self._precise.layout.zeros(state.damping.device),
            partial(self._precise.matvec, state),
            of_trace=partial(method.trace, factors, shapes),
            of_spectrum=spectrum,
        )

    def trace(self, state: State) -> Float[Tensor, ""]:
        """Return the trace of the undamped approximate Fisher, in the precision of the factors."""
        self._check_state(state)
        trace = self.method.trace(state.factors, self.layout.block_shapes)
        return self.approximation(state).trace() if trace is None else trace

    def mean_curvature(self, state: State) -> Float[Tensor, ""]:
        r"""Return the mean eigenvalue of the approximate Fisher, $\operatorname{tr} \hat F / r$, in the units of λ.

        r is the number of parameters. For a method that keeps the examples of one batch it is at most examples ×
        outputs, because F̂ has no more nonzero eigenvalues.
        """
        n, outputs = sum(shape.numel() for _, shape in self.layout.shapes), math.prod(self.layout.output_shape)
        rank = self.method.rank(state.factors, outputs)
        return self.trace(state).to(state.damping) / (n if rank is None else min(rank, n))

    def inverse(self, state: State) -> DampedInverse:
        """Return the damped inverse of the last `invert` as an operator: `precondition` multiplies by it.

        Raises:
            StructureError: the step is not a linear function of the gradient (two-level, residual).
        """
        self._check_state(state)
        method = self.method
        if method.inverse_kind == "nonlinear":
            raise StructureError(
                f"the step of this {method.name} is not a linear function of the gradient: its coarse space depends on "
                'the residual. Use another coarse space, such as "nicolaides".'
            )
        inverses, shapes = tree.map(_double, state.inverses), self.layout.block_shapes

        def logdet() -> Tensor | None:
            found = method.logdet(inverses, shapes)  # a plain gradient contributes a factor of 1, a zero step one of 0
            return torch.full_like(found, -math.inf) if self.layout.unused and found is not None else found

        return DampedInverse(
            self._precise.layout.zeros(state.damping.device),
            partial(self._precise.precondition, state),
            symmetric=method.inverse_kind == "symmetric",
            of_logdet=logdet,
        )

    def fisher_error(self, state: State, stats: Stats) -> dict[str, Tensor]:
        r"""Return the relative error $\|F_l - \hat F_l\|_F / \|F_l\|_F$ of each block for these statistics.

        The error is undamped and exact. F is never formed. It is computed in float64, as a difference of squares. NaN
        if the Fisher block is zero.
        """
        self._check_state(state)
        self._check_stats(stats)
        taps = {key: tap.to(torch.float64) for key, tap in stats.lazy_taps.items()}
        overlaps = self.method.overlap(tree.map(_double, state.factors), taps)
        return {key: relative_error(taps[key], *overlaps[key]) for key in taps}

    def fisher_divergence(self, state: State, stats: Stats) -> dict[str, Tensor]:
        r"""Return $\mathrm{KL}(\mathcal N(0, F_l + \lambda I) \| \mathcal N(0, P_l^{-1}))$ of each block, in nats.

        P is the damped inverse of the last `invert`, and λ is the damping of the state. The two differ if λ has changed
        since, as after a rejected adaptive step. The divergence is exact and in float64; F is never formed.

        Raises:
            StructureError: the method has no block of its own for each layer (exact, two-level).
            TooLargeError: both a block and its Gram matrix have more than 16384 rows.
        """
        self._check_state(state)
        self._check_stats(stats)
        method = self.method
        if not isinstance(method, LayerMethod):
            raise StructureError(f"{method.name} couples the layers: it has no divergence per block.")
        λ, inverses = state.damping.double(), tree.map(_double, state.inverses)
        found = {}
        for key, tap in stats.lazy_taps.items():
            exact, shape = tap.to(torch.float64), self.layout.block_shapes[key]
            cross, trace = method.cross_block(inverses[key], exact)
            spectrum = eigenvalues({key: exact}) + λ
            logdets = method.logdet_block(inverses[key], shape) + spectrum.log().sum()
            found[key] = (cross + λ * trace - logdets - len(spectrum)) / 2
        return found

    def fisher(self, stats: Stats, structure: Structure | str = "full") -> Fisher:
        """Return the sampled Fisher of these statistics as an operator on trees like params."""
        self._check_stats(stats)
        dtype = reduce(torch.promote_types, self.layout.dtypes, torch.promote_types(stats.outputs.dtype, torch.float32))
        return Fisher({key: tap.to(dtype) for key, tap in stats.lazy_taps.items()}, self.layout, structure)

    # ---------------------------------------------------------------------------------------------------------

    @cached_property
    def _precise(self) -> Views:
        """Return this object for trees in at least float32, as the factors are."""
        return replace(self, layout=replace(self.layout, dtypes=tuple(map(at_least_single, self.layout.dtypes))))

    @cached_property
    def _empty(self) -> Any:
        """Return the empty factors and inverses of this method on this net, without values."""
        dtype, cpu = self.layout.precision, torch.device("cpu")
        empty = self.method.init(self.layout.block_shapes, dtype, cpu, torch.ones((), dtype=dtype))
        return tree.map(lambda leaf: leaf.to("meta"), empty)

    def _check_state(self, state: State) -> None:
        """Raise unless the state belongs to this method on this net."""
        expect(state, State, "state", "pass what ng.init(params), ng.update, ng.invert or ng.step returned")
        factors, inverses = self._empty
        # the shapes in a tap follow the batch, and a method may keep its inverses in any form
        if not (tree.fits(state.factors, factors, Tap) and tree.fits(state.inverses, inverses, (Tap, Tensor))):
            if _lacks_inverses(state.inverses):
                raise StructureError(
                    "the state has the inverses of one rank's blocks only: pass ng.gathered(state), which all ranks "
                    "call on the data-parallel ng that made the state."
                )
            raise StructureError(
                f"the state is of another method, net or dtype than this {self.method.name} on "
                f"{len(self.layout.blocks)} blocks in {self.layout.precision}: start with ng.init(params)."
            )

    def _check_stats(self, stats: Stats) -> None:
        """Raise unless the statistics belong to this net."""
        expect(stats, Stats, "stats", "pass what ng.stats(params, batch) returned")
        its = stats.layout
        if its is not self.layout and (its.shapes, its.block_shapes) != (self.layout.shapes, self.layout.block_shapes):
            raise StructureError("the statistics are of another net: collect them with this ng.stats(params, batch).")

    def _matrices(self, v: Tree) -> dict[str, Tensor]:
        """Return the matrices of a tree like params in the precision of the factors, whatever its types."""
        return {key: W.to(self.layout.precision) for key, W in self.layout.matrices(v).items()}

    def _gradients(self, stats: Stats) -> Mapping[str, Tensor | Tap]:
        """Return the gradient of each block, in the form that is cheapest to precondition."""
        return {block.key: cheapest_gradient(stats, block) for block in self.layout.blocks}

    def _precondition(
        self, state: State, grads: Tree | Stats, inner: bool, own: Own = NOTHING
    ) -> tuple[Tree, Preconditioned]:
        """Return the preconditioned gradient, pulled towards `own.near`."""
        product = None
        if own.coefficients is not None:
            product = self.method.precondition_own(state.inverses, own, self.layout.block_shapes, inner)
        if product is None:
            gradients = self._gradients(grads) if isinstance(grads, Stats) else self._matrices(grads)
            pulls = {key: state.damping * φ for key, φ in (own.near or {}).items()}
            if pulls:
                gradients = {key: as_matrix(V) + pulls[key].to(V.dtype) for key, V in gradients.items()}
            product = self.method.precondition(state.inverses, gradients, inner)
            if pulls and inner:  # ⟨∇, nat⟩ is that of the gradient alone
                more = [(pulls[key] * nat).sum() for key, nat in product.matrices.items()]
                product = product._replace(inner=product.inner - sum(more))
        plain = grads.plain if isinstance(grads, Stats) else {name: grads[name] for name, _ in self.layout.uncovered}
        plain = {name: g.to(self.layout.precision) for name, g in plain.items()}
        if plain and inner:
            product = product._replace(inner=product.inner + sum(g.square().sum() for g in plain.values()))
        return self.layout.cast(self.layout.tree(product.matrices) | plain), product


def cheapest_gradient(stats: Stats, block: Block) -> Tensor | Tap:
    """Return the gradient in the form that is cheapest to precondition: its matrix or the loss tap."""
    if block.family.weight_gradient is not None or block.family.one_hot:
        return stats.gradient(block.key)
    tap = stats.lazy_loss_tap(block.key)
    if tap_is_cheaper(tap.sizes):
        return tap.whole()
    return tap.mean_gradient()


def _lacks_inverses(inverses: Any) -> bool:
    """Return True if some blocks have no inverse, because other ranks own them."""
    held = getattr(inverses, "fine", inverses)
    return isinstance(held, dict) and () in held.values()


def _double(leaf: Tensor) -> Tensor:
    return leaf.double() if leaf.is_floating_point() else leaf
