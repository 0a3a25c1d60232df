"""fisherfn's own steps: K-FAC in its variants, the refresh of every method, the exact natural gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch

import fisherfn as ff
from common.benchmark.contenders import Contender, Parts, Step
from common.benchmark.problems import Problem


class Variant(NamedTuple):
    """A method, and the rule for the length of its steps."""

    method: Callable[[], ff.Method]
    length: Literal["auto", "clip", "fixed"]


VARIANTS = {
    "fisherfn, adaptive": Variant(ff.kfac, length="auto"),
    "fisherfn, KL clip": Variant(ff.kfac, length="clip"),
    "fisherfn": Variant(ff.kfac, length="fixed"),
}
"""The variants of K-FAC; add another one as a line."""


class Prepared(NamedTuple):
    """A natural gradient after one step, with the arguments of its calls."""

    problem: Problem
    ng: ff.NaturalGradient
    state: ff.State
    given: dict[str, Any]  # generator and context

    def stats(self, **more: Any) -> ff.Stats:
        """Compute statistics of the batch."""
        return self.ng.stats(self.problem.params, self.problem.batch, **self.given, **more)

    def step(self, **more: Any) -> tuple[Any, ff.State, ff.Info]:
        """Take a step on the batch."""
        return self.ng.step(self.problem.params, self.state, self.problem.batch, **self.given, **more)


def prepared(problem: Problem, method: ff.Method | str, fisher: str = "mc") -> Prepared:
    """Build a natural gradient and take one step, because first calls are slower."""
    x, likelihood = problem.batch[0], problem.likelihood
    ng = ff.natural_gradient(
        problem.model, problem.params, x, likelihood=likelihood, method=method, fisher=fisher, context=problem.context
    )
    given = {"generator": torch.Generator(x.device).manual_seed(0), "context": problem.context}
    empty = Prepared(problem, ng, ng.init(problem.params, damping=1.0), given)
    _, state, info = empty.step()
    ff.check(info)
    return empty._replace(state=state)


def kfac(problem: Problem, variant: Variant, compiled: bool = False) -> Contender:
    """Build training steps of three kinds, including the update of the weights."""
    one = prepared(problem, variant.method())
    if variant.length == "auto":
        return adaptive(one, compiled)

    def pure(params: Any, state: ff.State, batch: Any, noise: Any, context: Any, update: bool, invert: bool) -> Any:
        nat, new, info = one.ng.step(
            params,
            state,
            batch,
            update=update,
            invert=invert,
            inner=variant.length == "clip",
            noise=noise,
            context=context,
        )
        nat = ff.kl_clip(nat, info.inner, lr=1.0, kl_bound=1e-2) if variant.length == "clip" else nat
        return ff.tree.add(params, nat, scale=-1.0), new, info

    moved = ff.compile(pure) if compiled else pure

    def step(update: bool, invert: bool) -> Any:
        noise = one.ng.noise(problem.batch, one.given["generator"]) if update else None
        return moved(problem.params, one.state, problem.batch, noise, problem.context, update, invert)

    return Contender(three_kinds(step))


def three_kinds(step: Callable[[bool, bool], Any]) -> Parts[Step]:
    """Return the calls of a step, with statistics and inverses or without."""
    return Parts(
        lambda: step(False, False),
        step_with_statistics=lambda: step(True, False),
        step_with_both=lambda: step(True, True),
    )


def adaptive(one: Prepared, compiled: bool) -> Contender:
    """Build steps of `ff.adaptive` with its defaults, including the trial and the look back."""
    problem, opt = one.problem, ff.adaptive(one.ng)
    given = one.given
    params, state, _ = opt.step(problem.params, opt.init(problem.params), problem.batch, **given)
    params, state, info = opt.step(params, state, problem.batch, **given)  # from here on there is a previous update
    ff.check(info)
    moved = ff.compile(opt.step) if compiled else opt.step

    def step(update: bool, invert: bool) -> Any:
        noise = one.ng.noise(problem.batch, given["generator"]) if update else None
        return moved(params, state, problem.batch, update=update, invert=invert, noise=noise, context=problem.context)

    return Contender(three_kinds(step))


COMPILED: dict[str, Callable[[Problem], Contender]] = {
    f"{label}, compiled": partial(kfac, variant=variant, compiled=True) for label, variant in VARIANTS.items()
}
"""The same, compiled."""


SAME_BASIS = "without inversion"
"""The name of a refresh in a step that does not invert, in which E-KFAC keeps its basis."""


def refreshes(problem: Problem) -> dict[str, Step]:
    """Build calls for statistics and factors of every method, without gradient or step; E-KFAC in both bases."""

    def refresh(one: Prepared, inverting: bool = True) -> Step:
        return lambda: one.ng.update(one.state, one.stats(), inverting=inverting)

    ready = {method: prepared(problem, method) for method in ff.METHODS}
    calls = {method: refresh(one) for method, one in ready.items()}
    return calls | {f"{method}, {SAME_BASIS}": refresh(ready[method], False) for method in ("ekfac",)}


FORWARD_BACKWARD, IN_TOTAL, GRAM = "forward and backward", "exact natural gradient", "its Gram matrix"
IN_TOTAL_COMPILED = f"{IN_TOTAL}, compiled"


def exact(problem: Problem, compiled: bool = True) -> dict[str, Step]:
    """Build calls of the exact natural gradient (full empirical Fisher), and of a forward and backward pass."""
    one, train = prepared(problem, "exactNG", fisher="empirical"), problem.training()
    fisher = one.ng.fisher(one.stats(), structure="full")

    @ff.compile
    def graph(params: Any, state: ff.State, batch: Any, context: Any) -> Any:
        return one.ng.step(params, state, batch, context=context)

    steps: dict[str, Step] = {FORWARD_BACKWARD: train.backward, IN_TOTAL: one.step}
    if compiled:
        steps[IN_TOTAL_COMPILED] = lambda: graph(problem.params, one.state, problem.batch, problem.context)
    return steps | {GRAM: fisher.gram}
