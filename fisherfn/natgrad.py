"""The natural gradient of a model with a likelihood and a method: the main public interface.

nat = P ∇ with P ≈ (F + λI)⁻¹. The mathematics is in `methods/` (factors) and `linalg/damped.py` (inverses);
docs/design.md, "Reading one method", follows one step through the files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fisherfn import dataset, masked, tree
from fisherfn.base import Method
from fisherfn.errors import StructureError, check, expect
from fisherfn.gradients import Own
from fisherfn.methods import named
from fisherfn.refreshes import Refreshes
from fisherfn.state import State, if_ok
from fisherfn.stats import Batch, FisherKind, Stats, build, known_likelihood
from fisherfn.types import Info, Model, PyTree, Tree


@dataclass(frozen=True)
class NaturalGradient(Refreshes):
    """A natural gradient for one model: pure functions of params, state and batch. Made by `natural_gradient`.

    `stats`, `noise`, `for_shape` and `implicit_fisher` come from `Collector`; functions that read a state
    (`precondition`, `matvec`, operators) from `Views`; `init`, `update` and `invert` from `Refreshes`. The optimizer
    for a module is `ff.optim.NaturalGradient`.
    """

    def fit(
        self,
        params: Tree,
        loader: Iterable[Batch],
        *,
        damping: float | Tensor = 1e-3,
        fisher: FisherKind | None = None,
        samples: int | None = None,
        generator: torch.Generator | None = None,
        context: PyTree = None,
        chunk_size: int | None = None,
    ) -> tuple[State, Info]:
        """Return a state with the factors of a whole data set and their inverses.

        The factors equal those of one large batch, however the examples are split (`fisherfn.dataset`): K-FAC reads
        the data once, E-KFAC twice; for other methods the raw statistics of all batches are in memory together.
        `info.loss` is the mean loss. If any check of a batch fails, the state is empty. `ng.update` adds batches.

        Args:
            params: the parameters.
            loader: the batches, each `(x, y)`: a list, a DataLoader.
            damping: see `init`.
            fisher: see `stats`.
            samples: see `stats`.
            generator: see `stats`; a second pass samples the same labels.
            context: see `stats`; the same for every batch.
            chunk_size: see `stats`.

        Raises:
            EmptyBatchError: the data set has no batch, or a batch has no examples.
            StructureError: an iterator that can only be read once, for a method that needs two passes.
        """
        expect(loader, Iterable, "loader", "pass the batches (x, y) as a list or a DataLoader")
        collect = partial(
            self.stats, params, fisher=fisher, samples=samples, generator=generator, context=context,
            chunk_size=chunk_size,
        )  # fmt: skip
        empty = self.init(params, damping=damping)
        empty = empty._replace(ema=torch.ones_like(empty.ema))
        state, info = dataset.fit(self.method, empty, loader, collect, generator)
        state, result = self._inverted(state)
        info = self._info(info.checks | {"factorisation": result.ok}, loss=info.loss, diagnostics=result.diagnostics)
        return if_ok(info, state, empty), info

    def step(
        self,
        params: Tree,
        state: State,
        batch: Batch,
        *,
        update: bool | Collection[str] = True,
        invert: bool | Collection[str] = True,
        inner: bool = False,
        fisher: FisherKind | None = None,
        samples: int | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        context: PyTree = None,
        chunk_size: int | None = None,
    ) -> tuple[Tree, State, Info]:
        """Compute one step: `stats`, `update` and `invert` if requested, `precondition`; return (nat, state, info).

        If any check fails, the input state is returned unchanged. With params that require grad, nat and `info.loss`
        have an autograd graph, which `detach` or `torch.no_grad` avoids; the factors in the state have none.

        `update` and `invert` may be the keys of some blocks (`ff.staggered`); the others keep their factors or
        inverses. Labels are sampled only in steps that update. With `inner`, `info.inner` is ⟨∇, nat⟩, computed in the
        cheapest way. See `stats` for the other arguments and the errors raised.
        """
        update = self._which(update)
        stats = self.stats(
            params, batch, fisher=fisher, samples=samples, generator=generator if update else None,
            noise=noise if update else None, context=context, chunk_size=chunk_size, curvature=update,
        )  # fmt: skip
        nat, new, info = self.step_from(state, stats, stats if update else None, invert=invert, inner=inner)
        return nat, new, info._replace(loss=stats.loss, context=stats.context)

    def step_from(
        self,
        state: State,
        grads: Tree | Stats,
        stats: Stats | None = None,
        *,
        invert: bool | Collection[str] = True,
        inner: bool = False,
        damping: Callable[[State], Tensor] | None = None,
        near: Tree | None = None,
    ) -> tuple[Tree, State, Info]:
        """Compute a step from existing gradients and statistics: `update`, `invert`, then `precondition`.

        See `step`. Without `stats` there is no update. `damping`, a function of the updated state, gives the λ of the
        inverses; default: the λ of the state. With `near`, a tree φ like params, the step is (F + λI)⁻¹ (∇ + λφ): λ
        then damps its distance from φ.
        """
        self._check_step(state, grads, stats, invert=invert, inner=inner, damping=damping)
        state = state if stats is None else state.complete(self.layout.block_shapes)
        which, updated = self._which(invert), False if stats is None else self._which(stats.sampled or True)
        if damping is not None and not (isinstance(which, bool) and isinstance(updated, bool)):
            raise StructureError(
                "this λ is that of a refresh of all blocks: pass update=True and invert=True, or False."
            )
        checks: dict[str, Any] = {}
        for given in {id(given): given for given in (grads, stats) if isinstance(given, Stats)}.values():
            checks = masked.all_true(checks, given.checks)
        if not isinstance(grads, Stats):
            self.layout.validate(grads)
            checks["gradient"] = tree.finite(grads)
        new, diagnostics = state, {}
        if stats is not None:
            new, result = self._updated(new, stats, updated, which)
            checks["statistics"], diagnostics = result.ok, result.diagnostics
        if which:
            new = new if damping is None else new._replace(damping=damping(new))
            new, result = self._inverted(new, which)
            checks["factorisation"], diagnostics = result.ok, diagnostics | result.diagnostics
        c = stats.coefficients if which is True and isinstance(stats, Stats) and stats is grads else None
        own = Own(c, None if near is None else self.layout.matrices(near))
        nat, product = self._precondition(new, grads, inner, own)
        checks["step"] = tree.finite_each(product.matrices)
        info = self._info(checks, inner=product.inner, diagnostics=diagnostics)
        return nat, state if new is state else if_ok(info, new, state), info

    advance = step_from
    """The former name of `step_from`."""

    def __call__(self, params: Tree, stats: Stats, *, damping: float | Tensor = 1e-3) -> Tree:
        """Return the gradient preconditioned by these statistics alone, without a state.

        Raises:
            NonFiniteError, NotPositiveDefiniteError, TargetError: a check failed. Where masks cannot be read (under
                `torch.vmap`, in a trace, on a GPU), the result is NaN.
        """
        state, updated = self.update(self.init(params, damping=damping), stats)
        state, inverted = self.invert(state)
        ok = torch.stack([*updated.ok.values(), *inverted.ok.values()]).all()
        if masked.readable(ok):
            check(updated)
            check(inverted)
        return tree.scale(self.precondition(state, stats), torch.where(ok, 1.0, torch.nan))

    # ---------------------------------------------------------------------------------------------------------

    def _check_step(self, state: State, grads: Tree | Stats, stats: Stats | None, **options: Any) -> None:
        """Raise unless the arguments of a step belong to this net; several processes also agree on the options."""
        del options
        self._check_state(state)
        for given in (grads, stats):
            if isinstance(given, Stats):
                self._check_stats(given)


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
    likelihood = known_likelihood(likelihood, fisher, samples)
    layout = build(model, params, tree.plain(x), () if context is None else context, unused=unused, uncovered=uncovered)
    return NaturalGradient(model, layout, likelihood, fisher, samples, method)
