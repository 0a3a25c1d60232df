"""Model + likelihood + method = natural gradient: the roof over both towers, and the public contract."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherfn import likelihoods, tree
from fisherfn.base import Estimated, Method, Preconditioned
from fisherfn.errors import StructureError, expect, expect_number, unknown
from fisherfn.fisher import Fisher, Structure, relative_error
from fisherfn.gradients import tap_is_cheaper
from fisherfn.methods import named
from fisherfn.operators import Approximation, DampedInverse
from fisherfn.stats import (
    FISHERS,
    Block,
    ImplicitFisher,
    Layout,
    Sources,
    Stats,
    build,
    check_batch,
    check_noise,
    collect,
    in_chunks,
    need,
)
from fisherfn.taps import AnyTap, Tap
from fisherfn.types import Info, Model, PyTree, Shape, Tree

FisherKind: TypeAlias = Literal["mc", "type2", "empirical"] | str


Batch: TypeAlias = Sequence[Any]
"""Inputs and targets: a tuple, or the list that a data loader makes of it."""


class State(NamedTuple):
    """The state of a method: a pytree of tensors, including the hyperparameters that may vary.

    Attributes:
        damping: λ, in the units of the Fisher of the mean loss.
        ema: weight of the old factors in the running average.
        count: number of updates so far.
        examples: mean number of examples per update, or mean weight: a smaller batch counts less in the average.
        factors: the result of `update` for each block, in the method's own structure.
        inverses: the result of `invert`, computed from the factors.
    """

    damping: Float[Tensor, ""]
    ema: Float[Tensor, ""]
    count: Int[Tensor, ""]  # type: ignore[assignment]  # shadows the tuple's own method
    examples: Float[Tensor, ""]
    factors: PyTree
    inverses: PyTree


@dataclass(frozen=True)
class NaturalGradient:
    """A natural gradient for one model: pure functions of params, state and batch. Made by `natural_gradient`."""

    model: Model
    layout: Layout
    likelihood: Any
    method: Method
    fisher_kind: str
    samples: int

    def init(self, params: Tree, *, damping: float | Tensor = 1e-3, ema: float | Tensor = 0.95) -> State:
        """Return the empty state: before the first `invert`, preconditioning gives grad/λ.

        Args:
            params: the parameters, with the names and shapes of the build.
            damping: λ ≥ 0, in the units of the Fisher of the mean NLL. A tensor may be batched under `torch.vmap`.
            ema: weight of the old factors, in [0, 1); update k uses min(1 − 1/k, ema) for batches of equal size.

        Raises:
            HyperparameterError: a number outside its range (tensors are checked by `info.ok`, not here).
        """
        self.layout.validate(params)
        expect_number("damping", damping, lambda v: v >= 0, "must be >= 0")
        expect_number("ema", ema, lambda v: 0 <= v < 1, "must lie in [0, 1)")
        like = next(iter(params.values()))
        dtype, device = torch.promote_types(like.dtype, torch.float32), like.device
        λ = torch.as_tensor(damping, dtype=dtype, device=device)
        factors, inverses = self.method.init(self._shapes, dtype, device, λ)
        count = torch.zeros((), dtype=torch.int64, device=device)
        ema = torch.as_tensor(ema, dtype=dtype, device=device)
        return State(λ, ema, count, torch.zeros((), dtype=dtype, device=device), factors, inverses)

    def for_shape(self, params: Tree, x: PyTree, *, context: PyTree = None) -> NaturalGradient:
        """Return the natural gradient for inputs of another example shape (longer sequences), with the same state.

        States and preconditioned gradients of both are interchangeable. If a state holds statistics of a batch
        (`exact`, two-level), they are those of the last update, whatever its shape. The call costs a build, so keep
        the result.

        Raises:
            StructureError: the parameters form other blocks on these inputs.
        """
        self.layout.validate(params)
        unused = "ignore" if self.layout.unused else "raise"
        uncovered = "gradient" if self.layout.uncovered else "fallback"
        layout = build(self.model, params, tree.plain(x), self._context(context), unused=unused, uncovered=uncovered)
        mine, its = ({b.names: (b.key, b.kind, b.shape) for b in each.blocks} for each in (self.layout, layout))
        left, its_left = ((each.unused, dict(each.uncovered).keys()) for each in (self.layout, layout))
        if mine != its or left != its_left:
            names = sorted({", ".join(names) for names, _ in mine.items() ^ its.items()})[:4]
            raise StructureError(
                f"on inputs of this shape (or in this mode of the net) {'; '.join(names) or 'other parameters'} form "
                "other blocks, so the state cannot be shared: build another natural_gradient, with its own state."
            )
        return replace(self, layout=layout)

    def noise(self, batch: Batch, generator: torch.Generator, *, samples: int | None = None) -> Tensor:
        """Return the noise that `generator=` would use, `[N, S, …]`; a chunk or rank takes its slice of examples."""
        x, _ = pair(batch)
        expect(generator, torch.Generator, "generator", "pass a torch.Generator, from which the labels are sampled")
        examples = check_batch(self.layout, x, ())
        shape = torch.Size((examples, self._samples(samples), *self.layout.output_shape))
        dtype = torch.promote_types(self.layout.output_dtype, torch.float32)
        return likelihoods.draw(self.likelihood, shape, generator, dtype).to(tree.leaves(x)[0].device)

    def stats(
        self,
        params: Tree,
        batch: Batch,
        *,
        fisher: FisherKind | None = None,
        samples: int | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        context: PyTree = None,
        chunk_size: int | None = None,
        curvature: bool = True,
    ) -> Stats:
        """Return loss, gradient and curvature statistics of one batch.

        Args:
            params: the parameters, with the names and shapes of the build.
            batch: inputs and targets, with the examples along the first axis.
            fisher: "mc", "type2" or "empirical"; default: the build's.
            samples: number S of sampled labels per example for "mc"; default: the build's.
            generator: random generator for the labels of "mc"; alternatively pass `noise`.
            noise: `[N, S, …]` from `ng.noise`.
            context: for models with a context.
            chunk_size: examples per forward and backward pass, to limit memory; the result is that of the whole batch.
            curvature: False samples no labels; such statistics only serve `grads` and `precondition`.

        Raises:
            ShapeError: shapes or types that differ from the build; no examples (`EmptyBatchError`).
            StructureError: names or a context that differ from the build.
            NoiseError: "mc" with neither `generator` nor `noise`.
            LikelihoodError: the likelihood lacks a method that this Fisher needs, or couples examples across chunks.
            TargetError: targets of the wrong type.
        """
        self.layout.validate(params)
        x, y = pair(batch)
        context = self._context(context)
        examples = check_batch(self.layout, x, y, context)
        kind = self._kind(fisher)
        if curvature and kind == "mc":
            need(self.likelihood, "sample", kind)
            if noise is None and generator is not None:
                noise = self.noise(batch, generator, samples=samples)
            if noise is not None:
                check_noise(noise, examples, samples)
        part = partial(collect, self.model, self.layout, params, labels=Sources(self.likelihood, kind, curvature))
        if chunk_size is None or chunk_size >= examples:
            return part(x, y, noise, context)
        expect_number("chunk_size", chunk_size, lambda v: v >= 1, "must be a whole number >= 1", whole=True)
        return in_chunks(part, self.layout, x, y, noise, context, chunk_size, self.likelihood)

    def update(self, state: State, stats: Stats, *, weight: float | Tensor | None = None) -> tuple[State, Info]:
        """Update the running average of the factors from `stats`; if any check fails, return the input state.

        Args:
            state: the current state.
            stats: statistics of a batch.
            weight: weight of these statistics relative to those of other updates; None: their number of examples.
        """
        self._own(state)
        self._of_this_net(stats)
        if weight is not None:
            expect_number("weight", weight, lambda v: v > 0, "must be positive")
        new, result = self._updated(state, stats, weight=weight)
        checks = {**stats.checks, "statistics": result.ok}
        info = self._info(checks, loss=stats.loss, context=stats.context, diagnostics=result.diagnostics)
        return _sound(info, new, state), info

    def invert(self, state: State) -> tuple[State, Info]:
        """Recompute the damped inverses from the factors; if any check fails, return the input state."""
        self._own(state)
        new, result = self._inverted(state)
        info = self._info({"factorisation": result.ok}, diagnostics=result.diagnostics)
        return _sound(info, new, state), info

    def precondition(self, state: State, grads: Tree | Stats) -> Tree:
        """Return the preconditioned gradient, a tree like params; `Stats` avoid forming the gradient itself."""
        self._own(state)
        if isinstance(grads, Stats):
            self._of_this_net(grads)
        return self._precondition(state, grads, inner=False)[0]

    def matvec(self, state: State, v: Tree) -> Tree:
        """Multiply a tree by the method's undamped approximate Fisher."""
        self._own(state)
        return self._cast(self.method.matvec(state.factors, self.layout.matrices(v)))

    def approximation(self, state: State) -> Approximation:
        """Return the method's undamped approximate Fisher as an operator: products, trace, spectrum, logdet."""
        self._own(state)
        method, factors = self.method, tree.map(_double, state.factors)
        return Approximation(
            self._like(state),
            lambda v: self.matvec(state, v),
            of_trace=partial(method.trace, factors, self._shapes),
            of_spectrum=partial(method.eigenvalues, factors, self._shapes),
        )

    def trace(self, state: State) -> Float[Tensor, ""]:
        """Return the trace of the undamped approximate Fisher, in the precision of the factors."""
        self._own(state)
        trace = self.method.trace(state.factors, self._shapes)
        return self.approximation(state).trace() if trace is None else trace

    def inverse(self, state: State) -> DampedInverse:
        """Return the damped inverse of the last `invert` as an operator: `precondition` multiplies by it.

        Raises:
            StructureError: the step is not a linear function of the gradient (two-level, residual).
        """
        self._own(state)
        method = self.method
        if method.inverse_kind == "nonlinear":
            raise StructureError(
                f"the step of this {method.name} is not a linear function of the gradient: its coarse space depends on "
                'the residual. Use another coarse space, such as "nicolaides".'
            )
        return DampedInverse(
            self._like(state),
            lambda v: self.precondition(state, v),
            symmetric=method.inverse_kind == "symmetric",
            of_logdet=partial(method.logdet, tree.map(_double, state.inverses), self._shapes),
        )

    def fisher_error(self, state: State, stats: Stats) -> dict[str, Tensor]:
        r"""Return the relative error $\|F_l - \hat F_l\|_F / \|F_l\|_F$ of each block for these statistics.

        The error is undamped and exact. F is never formed. It is computed in float64, as a difference of squares. NaN
        if the Fisher block is zero.
        """
        self._own(state)
        self._of_this_net(stats)
        taps = {key: tap.to(torch.float64) for key, tap in self._taps(stats).items()}
        factors = tree.map(_double, state.factors)
        overlaps = self.method.overlap(factors, taps)
        return {key: relative_error(taps[key], *overlaps[key]) for key in taps}

    def step(
        self,
        params: Tree,
        state: State,
        batch: Batch,
        *,
        update: bool = True,
        invert: bool = True,
        inner: bool = False,
        fisher: FisherKind | None = None,
        samples: int | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        context: PyTree = None,
        chunk_size: int | None = None,
    ) -> tuple[Tree, State, Info]:
        """Compute one step: `stats`, `update` and `invert` if requested, `precondition`; return (nat, state, info).

        If any check fails, the input state is returned unchanged.

        Labels are sampled only in steps that update. With `inner`, `info.inner` is ⟨∇, nat⟩, computed in the cheapest
        way. See `stats` for the other arguments and the errors raised.
        """
        stats = self.stats(
            params, batch, fisher=fisher, samples=samples, generator=generator if update else None,
            noise=noise if update else None, context=context, chunk_size=chunk_size, curvature=update,
        )  # fmt: skip
        nat, new, info = self.advance(state, stats, stats if update else None, invert=invert, inner=inner)
        return nat, new, info._replace(loss=stats.loss, context=stats.context)

    def advance(
        self,
        state: State,
        grads: Tree | Stats,
        stats: Stats | None = None,
        *,
        invert: bool = True,
        inner: bool = False,
        damping: Callable[[State], Tensor] | None = None,
    ) -> tuple[Tree, State, Info]:
        """Compute a step from existing gradients and statistics: `update`, `invert`, then `precondition`.

        See `step`. Without `stats` there is no update. `damping`, a function of the updated state, gives the λ of the
        inverses; default: the λ of the state.
        """
        self._own(state)
        checks: dict[str, Any] = {}
        for given in {id(given): given for given in (grads, stats) if isinstance(given, Stats)}.values():
            self._of_this_net(given)
            checks |= {name: mask & checks.get(name, mask) for name, mask in given.checks.items()}
        if not isinstance(grads, Stats):
            checks["gradient"] = tree.finite(grads)
        new, diagnostics = state, {}
        if stats is not None:
            new, result = self._updated(new, stats, invert)
            checks["statistics"], diagnostics = result.ok, result.diagnostics
        if invert:
            new = new if damping is None else new._replace(damping=damping(new))
            new, result = self._inverted(new)
            checks["factorisation"], diagnostics = result.ok, diagnostics | result.diagnostics
        nat, product = self._precondition(new, grads, inner)
        checks["step"] = tree.finite_each(product.matrices)
        info = self._info(checks, inner=product.inner, diagnostics=diagnostics)
        return nat, state if new is state else _sound(info, new, state), info

    def __call__(self, params: Tree, stats: Stats, *, damping: float | Tensor = 1e-3) -> Tree:
        """Return the gradient preconditioned by these statistics alone, without a state."""
        state, _ = self.update(self.init(params, damping=damping), stats)
        state, _ = self.invert(state)
        return self.precondition(state, stats)

    def fisher(self, stats: Stats, structure: Structure | str = "full") -> Fisher:
        """Return the sampled Fisher of these statistics as an operator on trees like params."""
        self._of_this_net(stats)
        dtype = reduce(torch.promote_types, self.layout.dtypes, torch.promote_types(stats.outputs.dtype, torch.float32))
        return Fisher({key: tap.to(dtype) for key, tap in self._taps(stats).items()}, self.layout, structure)

    def implicit_fisher(self, params: Tree, x: PyTree, *, context: PyTree = None) -> ImplicitFisher:
        """Return the type-2 Fisher of these inputs by products through the model, for networks with many outputs.

        Raises:
            ShapeError: shapes or types that differ from the build; no examples (`EmptyBatchError`).
            StructureError: names or a context that differ from the build.
            LikelihoodError: a likelihood without `fisher_sqrt`.
        """
        self.layout.validate(params)
        context, x = self._context(context), tree.plain(x)
        check_batch(self.layout, x, ())
        return ImplicitFisher(self.model, self.likelihood, params, x, context)

    # ---------------------------------------------------------------------------------------------------------

    @cached_property
    def _shapes(self) -> dict[str, Shape]:
        return {block.key: Shape(*block.shape, one_hot=block.family.one_hot) for block in self.layout.blocks}

    @cached_property
    def _structure(self) -> Any:
        """Return the structure of this method's states on this net."""
        empty = self.method.init(self._shapes, torch.float32, torch.device("cpu"), torch.ones(()))
        return tree.structure(empty, leaf=Tap)  # the shapes in a tap follow the batch

    def _own(self, state: State) -> None:
        """Raise unless the state belongs to this method on this net."""
        expect(state, State, "state", "pass what ng.init(params), ng.update, ng.invert or ng.step returned")
        if tree.structure((state.factors, state.inverses), leaf=Tap) != self._structure:
            raise StructureError(
                f"the state is of another method or net than this {self.method.name} on {len(self.layout.blocks)} "
                "blocks: start with ng.init(params)."
            )

    def _like(self, state: State) -> Tree:
        """Return a tree of zeros like params, each with one number in memory."""
        kinds = zip(self.layout.shapes, self.layout.dtypes, strict=True)
        device = state.damping.device
        return {name: torch.zeros((), dtype=dtype, device=device).expand(shape) for (name, shape), dtype in kinds}

    def _of_this_net(self, stats: Stats) -> None:
        """Raise unless the statistics belong to this net."""
        expect(stats, Stats, "stats", "pass what ng.stats(params, batch) returned")
        if stats.layout is not self.layout and stats.layout.shapes != self.layout.shapes:
            raise StructureError("the statistics are of another net: collect them with this ng.stats(params, batch).")

    def _taps(self, stats: Stats) -> dict[str, AnyTap]:
        return {block.key: stats.lazy_tap(block.key) for block in self.layout.blocks}

    def _updated(
        self, state: State, stats: Stats, inverting: bool = True, weight: float | Tensor | None = None
    ) -> tuple[State, Estimated]:
        """Return the updated state, valid or not, and the masks."""
        count, n = state.count + 1, float(stats.examples) if weight is None else weight
        k = count.to(state.ema.dtype)
        # a state from a version that did not count examples: assume that its batches had this size
        before = torch.where((state.count > 0) & (state.examples == 0), n, state.examples)
        mean = before + (n - before) / k
        r = n / mean  # 1 for equal batches, and then ρ = min(1 - 1/k, ema)
        rho = torch.minimum(1 - r / k, state.ema / (1 + (1 - state.ema) * (r - 1)))
        result = self.method.update(state.factors, self._taps(stats), rho, inverting)
        return state._replace(factors=result.factors, count=count, examples=mean), result

    def _inverted(self, state: State) -> tuple[State, Estimated]:
        result = self.method.invert(state.factors, state.damping)
        return state._replace(inverses=result.factors), result

    def _precondition(self, state: State, grads: Tree | Stats, inner: bool) -> tuple[Tree, Preconditioned]:
        gradients: Mapping[str, Tensor | Tap]
        if isinstance(grads, Stats):
            gradients = {block.key: _cheapest(grads, block) for block in self.layout.blocks}
        else:
            gradients = self.layout.matrices(grads)
        product = self.method.precondition(state.inverses, gradients, inner)
        nat = self._cast(product.matrices)
        plain = grads.plain if isinstance(grads, Stats) else {name: grads[name] for name, _ in self.layout.uncovered}
        if plain and inner:
            product = product._replace(inner=product.inner + sum(g.square().sum() for g in plain.values()))
        return {name: plain.get(name, leaf).to(leaf.dtype) for name, leaf in nat.items()}, product

    def _cast(self, matrices: Mapping[str, Tensor]) -> Tree:
        result = self.layout.tree(matrices)
        return {name: result[name].to(dtype) for name, dtype in zip(result, self.layout.dtypes, strict=True)}

    def _info(self, checks: dict[str, Any], **measured: Any) -> Info:
        """Return an info whose masks combine these checks; checks of the batch count for every block."""
        keys = [block.key for block in self.layout.blocks]
        batch = [mask for mask in checks.values() if isinstance(mask, Tensor)]
        blocks = [torch.stack([masks[key] for key in keys]) for masks in checks.values() if isinstance(masks, dict)]
        masks = [_all(batch).expand(len(keys)), *blocks] if batch else blocks
        ok = reduce(torch.logical_and, masks).unbind()
        return Info(checks=checks, ok=dict(zip(keys, ok, strict=True)), **measured)

    def _context(self, context: PyTree) -> PyTree:
        if self.layout.has_context != (context is not None):
            given, wanted = ("none was given", "with one") if self.layout.has_context else ("one was given", "without")
            raise StructureError(f"{given}, and the model was built {wanted}: pass context= to both, or to neither.")
        return () if context is None else context

    def _kind(self, fisher: str | None) -> str:
        kind = self.fisher_kind if fisher is None else fisher
        if kind not in FISHERS:
            raise unknown("fisher", kind, FISHERS)
        return kind

    def _samples(self, samples: int | None) -> int:
        chosen = self.samples if samples is None else samples
        expect_number("samples", chosen, lambda v: v >= 1, "must be a whole number >= 1", whole=True)
        return chosen


def natural_gradient(
    model: Model,
    params: Tree,
    x: PyTree,
    *,
    likelihood: Any,
    method: Method | str = "kfac",
    fisher: FisherKind = "mc",
    samples: int = 1,
    context: PyTree = None,
    unused: Literal["raise", "ignore"] | str = "raise",
    uncovered: Literal["fallback", "gradient"] | str = "fallback",
) -> NaturalGradient:
    """Build a natural gradient: one trace with example inputs finds the layers and verifies them numerically.

    Args:
        model: any pure function `model(params, x) -> outputs`; with a context, `model(params, x, context) ->
            (outputs, context)`.
        params: `{name: tensor}`; each parameter becomes part of a block of `ng.layout`.
        x: example inputs `[N, …]`; later batches may have another N, but not another example shape.
        likelihood: `ff.Categorical()`, `ff.Bernoulli()`, `ff.Gaussian()`, your own, or a plain callable
            `(outputs, targets) -> [N]` with `fisher="empirical"`.
        method: `ff.kfac()` or a name in `ff.METHODS`.
        fisher: "mc" samples labels from the model, "type2" computes the exact expectation over them, "empirical" uses
            the labels of the data.
        samples: number S of sampled labels per example for "mc".
        context: anything else that the model reads and that is not differentiated: buffers, another player's
            parameters. Entries per example (dropout seeds, masks) are sliced with the examples.
        unused: treatment of parameters that the outputs do not depend on: "raise" the error, or "ignore" them. Ignored
            parameters are in no block, and their gradients and steps are zero.
        uncovered: treatment of parameters that no layer covers: "fallback" gives them a block of their per-example
            gradients; "gradient" leaves them in no block, and their part of a step is the plain gradient.

    Raises:
        CoverageError: per-example gradients of a parameter cannot be computed.
        UnusedParameterError: the outputs do not depend on a parameter.
        NoiseError: the model uses the global random generator.
        ShapeError: inputs without examples, or outputs that are not one tensor `[N, …]`.
        StructureError: params, model or method of the wrong kind.
        LikelihoodError: the likelihood lacks a method that this Fisher needs.
        UnknownNameError: no method or Fisher has this name.
        HyperparameterError: fewer than one sample.
    """
    method = named(method)
    if not callable(model):
        raise StructureError(f"model cannot be {type(model).__name__}: pass a function (params, x) -> outputs.")
    if not hasattr(likelihood, "nll"):
        likelihood = likelihoods.Callback(likelihood)
    if unused not in ("raise", "ignore"):
        raise unknown("unused", unused, ("raise", "ignore"))
    if uncovered not in ("fallback", "gradient"):
        raise unknown("uncovered", uncovered, ("fallback", "gradient"))
    layout = build(model, params, tree.plain(x), () if context is None else context, unused=unused, uncovered=uncovered)
    ng = NaturalGradient(model, layout, likelihood, method, fisher, samples)
    ng._kind(fisher), ng._samples(samples)
    if fisher != "empirical":
        need(likelihood, {"mc": "sample", "type2": "fisher_sqrt"}[fisher], fisher)
    return ng


def pair(batch: Batch) -> tuple[PyTree, PyTree]:
    """Split a batch into inputs and targets."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        found = f"{len(batch)} entries" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise StructureError(
            f"a batch is (inputs, targets), got {found}. Pass several inputs as ((x1, x2), y), or a dict and targets: "
            'labels = batch.pop("labels"), then (batch, labels).'
        )
    return tree.plain(batch[0]), batch[1]


def _cheapest(stats: Stats, block: Block) -> Tensor | Tap:
    """Return the gradient in the form that is cheapest to precondition: its matrix or the loss tap."""
    if block.family.weight_gradient is not None or block.family.one_hot:
        return stats.gradient(block.key)
    tap = stats.lazy_loss_tap(block.key)
    if tap_is_cheaper(tap.sizes):
        return tap.whole()
    return tap.mean_gradient()


def _sound(info: Info, new: State, old: State) -> State:
    """Return the new state if all checks passed, else the old one."""
    return tree.select(_all(info.ok.values()), new, old)


def _double(leaf: Tensor) -> Tensor:
    return leaf.double() if leaf.is_floating_point() else leaf


def _all(masks: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(masks)).all()
