"""A preconditioner for gradients, between `loss.backward()` and the step of any torch optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fisherfn import tree
from fisherfn.adapt import kl_clip
from fisherfn.base import Method
from fisherfn.errors import LikelihoodError, StructureError, check, expect_number
from fisherfn.optim.curvature import Curvature
from fisherfn.optim.groups import flat
from fisherfn.optim.network import examples
from fisherfn.optim.options import Options
from fisherfn.optim.ranks import alone, averaged
from fisherfn.optim.with_curvature import WithCurvature
from fisherfn.stats import Stats, pair
from fisherfn.types import Info, PyTree, Tree


class Preconditioner(WithCurvature):
    r"""Rewrites `.grad`: $\nabla \leftarrow \nu \hat F^{-1} \nabla$, with ν from the KL clip if a bound is given.

        loss.backward()
        pre.step(x)        # or (x, y), or nothing after `with pre.watch(): ...`
        opt.step()

    Attributes:
        info: the `ff.Info` of the last step.
    """

    def __init__(
        self,
        net: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        likelihood: Any = None,
        method: Method | str = "kfac",
        optimizer: torch.optim.Optimizer | None = None,
        kl_bound: float | None = None,
        damping: float | Literal["auto"] | str = 0.1,
        ema: float = 0.95,
        update_every: int = 5,
        invert_every: int = 10,
        fisher: str = "mc",
        samples: int = 1,
        chunk_size: int | None = None,
        generator: torch.Generator | int = 0,
        example_inputs: PyTree = None,
        scaler: torch.amp.GradScaler | None = None,
        uncovered: Literal["fallback", "gradient"] | str = "fallback",
    ) -> None:
        """Create the preconditioner; nothing is computed before the first batch, except with `example_inputs`.

        Args:
            net: the module.
            params: the parameters whose gradients are rewritten, or groups of them; None for all that require one.
            likelihood: the likelihood of the outputs; None if only `watch` is used.
            method: `ff.kfac()` or a name in `ff.METHODS`.
            optimizer: the optimizer that takes the step; `kl_bound` needs its learning rate, `scaler` its gradients.
            kl_bound: κ > 0, in nats per example, at the largest learning rate of the optimizer's groups; None for no
                bound.
            damping: λ ≥ 0; "auto" is 20 times `ng.mean_curvature`, measured once at the first step.
            ema: weight of the old factors, in [0, 1).
            update_every: steps between statistics.
            invert_every: steps between refreshes of the inverses.
            fisher: "mc" or "type2" for `step(x)`; `step((x, y))` is always the empirical Fisher.
            samples: sampled labels per example for "mc".
            chunk_size: examples at a time, to limit memory; the result is that of the whole batch.
            generator: random generator for labels and dropout seeds, or its seed; saved with the preconditioner.
            example_inputs: inputs with which to find the layers immediately.
            scaler: the gradient scaler, if you use one. Gradients are unscaled first. If they overflowed, they are
                left unchanged, because the scaler will skip the step.
            uncovered: see `NaturalGradient`; with "gradient" the `.grad` of parameters in no layer stays as it is.
        """
        self._likelihood, self._fisher = likelihood, fisher
        options = Options(
            likelihood=_unstated if likelihood is None else likelihood, method=method, damping=damping, ema=ema,
            update_every=update_every, invert_every=invert_every, fisher="empirical" if likelihood is None else fisher,
            samples=samples, chunk_size=chunk_size, generator=generator, scaler=scaler, uncovered=uncovered,
        )  # fmt: skip
        self._curvature = Curvature(net, options)
        self._curvature.network.train(flat(net.parameters() if params is None else params))
        self._curvature.network.parameters()  # there is one to train
        if kl_bound is not None:
            expect_number("kl_bound", kl_bound, lambda v: v > 0, "must be positive, or None for no clip")
        for name, given in (("kl_bound", kl_bound), ("scaler", scaler)):
            if given is not None and optimizer is None:
                raise StructureError(f"{name} needs the optimizer that takes the step: pass optimizer= as well.")
        self._optimizer, self._kl_bound = optimizer, kl_bound
        self.info = Info()
        if example_inputs is not None:
            self._curvature.build(example_inputs)

    @torch.no_grad()
    def step(self, batch: Any = None) -> None:
        """Precondition the current gradients in place.

        Args:
            batch: inputs `x` for the sampled Fisher, or `(x, y)` for the empirical one. A tuple is always a pair, so
                pass several inputs as `((x1, x2), None)`. None uses the watched statistics. The batch is only used in
                steps that compute statistics. With accumulated gradients, pass the last part of the batch, or all; in
                several processes all, because the gradient of a rank counts with these examples.

        Raises:
            NonFiniteError, NotPositiveDefiniteError, TargetError: a check failed; gradients and state are unchanged.
            StructureError: no gradient, or no source of statistics.
            LikelihoodError: no likelihood, or `fisher="empirical"` without targets.
        """
        curvature = self._curvature
        if curvature.scaling.overflowed(self._optimizer):
            curvature.forget()
            return
        if batch is not None and (curvature.updates or curvature.ng is None):
            curvature.build(_split(batch)[0])  # before gradients are read: the outputs may not depend on all parameters
        grads = self._gradients(batch)
        stats = self._statistics(batch)
        rate = 0.0 if self._optimizer is None else max(group["lr"] for group in self._optimizer.param_groups)
        clips = self._kl_bound is not None and bool(rate > 0)
        nat, state, self.info = curvature.of_gradients(grads, stats, inner=clips)
        check(self.info)
        self._write(kl_clip(nat, self.info.inner, lr=rate, kl_bound=self._kl_bound or 0.0) if clips else nat)
        curvature.commit(state)

    def _gradients(self, batch: Any) -> Tree:
        """Return the gradients; in several processes their mean, each counted by its examples of the batch."""
        grads = self._curvature.network.gradients()
        if batch is None:
            alone("a step without its batch")
            return grads
        return averaged(grads, examples(_split(batch)[0]))

    def _statistics(self, batch: Any) -> Stats | None:
        """Return the statistics if they are due."""
        if batch is None or not self._curvature.updates:
            return self._curvature.taken()
        self._curvature.forget()
        if self._likelihood is None:
            raise LikelihoodError("a batch needs a likelihood: pass likelihood=ff.Categorical() or another, or watch.")
        x, y = _split(batch)
        if y is not None:
            return self._curvature.statistics(x, y, fisher="empirical")
        if self._fisher == "empirical":
            raise LikelihoodError('the empirical Fisher needs the targets: pass step((x, y)), or fisher="mc".')
        return self._curvature.statistics(x, torch.empty(examples(x), 0), likelihood=_Unlabelled(self._likelihood))

    def _write(self, nat: Tree) -> None:
        for name, p in self._curvature.network.parameters().items():
            if name not in self._curvature.network.unused:
                assert p.grad is not None
                if p.grad.is_sparse:  # a preconditioned gradient has no zero rows
                    p.grad = torch.zeros_like(p)
                p.grad.copy_(nat[name])

    def state_dict(self) -> dict[str, Any]:
        """Return the curvature as flat tensors."""
        return self._curvature.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state, also before the first batch."""
        self._curvature.load_state_dict(state_dict)


def _split(batch: Any) -> tuple[PyTree, Any]:
    """Split a batch into inputs, and targets or None."""
    return pair(batch) if isinstance(batch, (tuple, list)) else (tree.plain(batch), None)


class _Unlabelled:
    """A likelihood for inputs without targets, `[N, 0]`: zero loss, and the samples of the given likelihood."""

    def __init__(self, likelihood: Any) -> None:
        self._likelihood = likelihood

    def __getattr__(self, name: str) -> Any:
        if name in ("valid", "score", "_likelihood"):
            raise AttributeError(name)  # there are no targets to check or to compare with
        return getattr(self._likelihood, name)

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return zeros, which have a gradient of zeros whatever the outputs (0 times an infinite logit is NaN)."""
        return outputs.new_zeros(outputs.shape[0])

    def observed(self, outputs: Tensor, targets: Tensor) -> tuple[Any, Tensor | None]:
        """Return the likelihood that scores sampled labels; without targets all examples count the same."""
        own = getattr(self._likelihood, "observed", None)
        return (self._likelihood, None) if own is None else own(outputs, None)


def _unstated(outputs: Tensor, targets: Any) -> Tensor:
    raise LikelihoodError("no likelihood was given: pass likelihood=ff.Categorical() or another, or watch.")
