"""A natural-gradient torch optimizer whose step takes the batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fisherfn.adapt import default_kl_bound, kl_clip
from fisherfn.base import Method
from fisherfn.errors import NonFiniteError, StructureError, check, expect_number, unknown
from fisherfn.optim import groups as grouped
from fisherfn.optim.curvature import Curvature, Outcome
from fisherfn.optim.options import Options
from fisherfn.optim.ranks import alone
from fisherfn.optim.with_curvature import WithCurvature
from fisherfn.stats import pair
from fisherfn.types import Info, PyTree

PATIENCE = 10
"""Number of failed steps in a row at which `on_bad="skip"` raises, too."""


class NaturalGradient(WithCurvature, torch.optim.Optimizer):
    r"""Natural-gradient descent on a module: `loss = opt.step((x, y))` does forward, backward and step.

    $$\delta \leftarrow -\alpha \hat F^{-1} \nabla + \mu\, \delta, \qquad \theta \leftarrow \theta + \delta$$

    By default α, μ and the damping λ come from the quadratic model of each batch (`ff.adaptive`), so no setting is
    needed. If you give a learning rate η and a damping, all settings are fixed, as in other optimizers:

    $$v \leftarrow \mu v + \nu \hat F^{-1} \nabla, \qquad \theta \leftarrow \theta - \eta (v + w \theta)$$

    with ν the factor of the KL bound (`ff.kl_clip`) at the largest learning rate of all groups. Loss, gradient, λ and κ
    are those of the mean negative log-likelihood over the batch, in nats (docs/conventions.md). Buffers are updated as
    in training. The layers are found at the first batch, or immediately with `example_inputs`.

    Attributes:
        info: the `ff.Info` of the last step.
        skipped: number of steps that failed a check and changed nothing (`on_bad="skip"`).

    >>> net = nn.Linear(2, 1)
    >>> opt = NaturalGradient(net, likelihood=lambda f, y: (f - y).square().sum(-1), fisher="empirical", lr=0.1)
    >>> opt.step((torch.ones(4, 2), torch.ones(4, 1))).shape
    torch.Size([])
    """

    info: Info

    def __init__(
        self,
        net: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        likelihood: Any,
        lr: float | Tensor | Literal["auto"] | str = "auto",
        method: Method | str = "kfac",
        momentum: float | Literal["auto"] | str = "auto",
        weight_decay: float = 0.0,
        kl_bound: float | None | Literal["auto"] | str = "auto",
        damping: float | Literal["auto"] | str = "auto",
        ema: float = 0.95,
        update_every: int | None = None,
        invert_every: int | None = None,
        fisher: str = "mc",
        samples: int = 1,
        chunk_size: int | None = None,
        generator: torch.Generator | int = 0,
        example_inputs: PyTree = None,
        scaler: torch.amp.GradScaler | None = None,
        uncovered: Literal["fallback", "gradient"] | str = "fallback",
        compile: bool | dict[str, Any] = False,
        on_bad: Literal["raise", "skip"] | str = "raise",
    ) -> None:
        """Create the optimizer; nothing is computed before the first batch, except with `example_inputs`.

        Args:
            net: the module; parameters in no group, or without `requires_grad`, are not changed.
            params: parameters or groups of them with their own `lr`, `weight_decay`, and `momentum` if steps are fixed.
            likelihood: `ff.Categorical()`, `ff.Bernoulli()`, `ff.Gaussian()`, your own, or with `fisher="empirical"`
                a callable `(outputs, targets) -> [N]`.
            lr: learning rate η; "auto" takes α from the quadratic model. The groups then hold a factor on α, initially
                1.0, so that schedulers work.
            method: `ff.kfac()` or a name in `ff.METHODS`.
            momentum: μ in [0, 1); "auto" takes it from the quadratic model, or 0.9 if both learning rate and damping
                are given.
            weight_decay: w, decoupled: η w θ is subtracted in addition to the step.
            kl_bound: κ > 0, in nats per example; None for no bound. "auto" is 1e-3 per label (of a sequence: position)
                if lr and damping are given, a loss with a given lr is watched, or labels are classes; else no bound.
            damping: λ ≥ 0, in the units of the Fisher of the mean NLL; "auto" follows the reduction ratio. With an
                automatic learning rate, a number is the initial λ, and rejected steps raise it. `opt.damping` changes
                it later.
            ema: weight of the old factors, in [0, 1).
            update_every: steps between statistics; None: 5, or growing from 2 to 10 if a setting is automatic.
            invert_every: steps between refreshes of the inverses; None: 10, or growing from 4 to 20.
            fisher: "mc", "type2" or "empirical".
            samples: sampled labels per example for "mc".
            chunk_size: examples at a time, to limit memory; the result is that of the whole batch.
            generator: random generator for labels and dropout seeds, or its seed; saved with the optimizer.
            example_inputs: inputs with which to find the layers immediately.
            scaler: the gradient scaler of a watched loss, unscaled once per step; `step((x, y))` needs none.
            uncovered: treatment of parameters that no layer covers: "fallback" gives them a block of their per-example
                gradients; with "gradient" their part of a step is the plain gradient, and `watch` works too.
            compile: True compiles steps with a batch (`ff.compile`), which takes 20 to 80 seconds per kind of step; a
                dict has options of torch.compile.
            on_bad: what a step that fails a check does: "raise" the typed error, or "skip" (the tenth in a row raises).

        Raises:
            HyperparameterError: a number outside its range.
            StructureError: parameters of another net. Errors of the build are raised at the first batch.
            UnknownNameError: no method or Fisher has this name.
            MissingPackageError: `compile` without a C++ compiler, raised by the first step.
        """
        grouped.check_automatic(lr=lr, momentum=momentum)
        options = Options(
            likelihood=likelihood, method=method, damping=damping, ema=ema, update_every=update_every,
            invert_every=invert_every, fisher=fisher, samples=samples, chunk_size=chunk_size, generator=generator,
            scaler=scaler, uncovered=uncovered, compile=compile,
        )  # fmt: skip
        self._auto_lr = lr == "auto"
        self._adapts = self._auto_lr or damping == "auto"
        self._kl_bound: Any = kl_bound
        if kl_bound == "auto":
            kl_bound = None
        elif kl_bound is not None:
            expect_number("kl_bound", kl_bound, lambda v: v > 0, "must be positive, or None for no clip")
        self._lr = 1.0 if isinstance(lr, str) else float(lr)
        adaptive: dict[str, Any] = {
            "lr": lr if isinstance(lr, str) else self._lr, "momentum": momentum, "damping": damping,
            "rule": "model" if self._kl_bound is None else "auto", "kl_bound": kl_bound, "ema": ema,
        }  # fmt: skip
        self._curvature = Curvature(net, options, adaptive=adaptive if self._adapts else None)
        if on_bad not in ("raise", "skip"):
            raise unknown("on_bad", on_bad, ("raise", "skip"))
        self._on_bad, self._warned = on_bad, damping == "auto"
        self.info, self.skipped, self._in_a_row = Info(), 0, 0
        if not (groups := list(net.parameters() if params is None else params)):
            raise StructureError("there is no parameter to train: the list is empty.")
        momentum = 0.9 if isinstance(momentum, str) else momentum
        lr = 1.0 if isinstance(lr, str) else lr  # a tensor stays one, which schedulers change in place
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._curvature.network.parameters()  # there is one to train
        if example_inputs is not None:
            self._curvature.build(example_inputs)

    @torch.no_grad()
    def step(self, batch: Any = None, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step and return the loss before it, in nats per example.

        Args:
            batch: `(x, y)`; pass several inputs as `((x1, x2), y)`. Without a batch, the step uses the `.grad` of the
                parameters and the statistics of `watch`.
            closure: runs forward and backward and returns the loss, as in torch. It may be the first argument.

        Raises:
            NonFiniteError, NotPositiveDefiniteError, TargetError: a check failed; nothing has changed.
            StructureError: there is neither a batch nor a gradient with its statistics.
        """
        if callable(batch):
            batch, closure = None, batch
        if closure is not None and not callable(closure):
            raise StructureError("step takes the batch as one pair: write opt.step((x, y)).")
        with torch.enable_grad():
            loss = None if closure is None else closure()
        if self._adapts and batch is not None:
            return self._adapted(batch)
        if self._auto_lr:
            raise StructureError(
                "a step without its batch cannot find a learning rate: write `loss = opt.step((x, y))`, or pass lr=."
            )
        grouped.check_groups(self.param_groups)
        if batch is None and self._curvature.scaling.overflowed(self):
            self._curvature.forget()
            return loss
        if batch is not None and not self._found(batch):
            return torch.tensor(torch.nan)
        rate = grouped.largest_lr(self.param_groups, self._curvature.network.names())
        clips = self._kl_bound is not None and bool(rate > 0)
        nat, state, self.info = self._outcome(batch, clips)
        if not self._all_ok:
            return self._refuse(loss)
        if clips:
            bound = default_kl_bound(self._curvature.latest) if self._kl_bound == "auto" else self._kl_bound
            nat = kl_clip(nat, self.info.inner, lr=rate, kl_bound=bound)
        grouped.descend(self.param_groups, self.state, self._curvature.network.names(), nat)
        self._curvature.commit(state, self.info.context)
        self._in_a_row = 0
        return loss if batch is None else self.info.loss

    def _adapted(self, batch: Any) -> Any:
        """Take an adaptive step."""
        network = self._curvature.network
        grouped.check_groups(self.param_groups, momentum=self.defaults["momentum"])
        if not self._found(batch):  # also finds the parameters that the outputs depend on
            return torch.tensor(torch.nan)
        names = network.names()
        scales = grouped.factors(self.param_groups, names, float(self._lr))
        largest = max(scales.values())
        same = min(scales.values()) == largest
        before = self._curvature.damping
        each = dict.fromkeys(network.unused, largest) | scales
        params, state, self.info = self._curvature.adapted(batch, largest if same else each)
        if not self._all_ok:
            return self._refuse()
        found = self.info.adapted
        relative = {key: scales[name] / (largest or 1.0) for key, name in names.items()}
        rate = found.learning_rate if self._auto_lr else torch.as_tensor(self._lr * largest, dtype=torch.float64)
        shares = {} if found.rejected else grouped.decays(self.param_groups, rate, relative)
        for name, p in network.parameters().items():
            share = shares.get(id(p))
            p.copy_(params[name] if share is None else torch.addcmul(params[name], p, share.to(p), value=-1))
        self._curvature.commit(state, self.info.context)
        self._in_a_row = 0
        if not self._warned and float(found.damping) > before:
            self._warned = True
            warnings.warn(f"a step was rejected: the damping rose from {before:g} to {found.damping:g}.", stacklevel=3)
        return self.info.loss

    def _found(self, batch: Any) -> bool:
        """Find the layers with a batch, if they are not known; return False to skip one that is not finite."""
        try:
            self._curvature.build(pair(batch)[0])
        except NonFiniteError:
            if not self._skips():
                raise
            return False
        return True

    def _outcome(self, batch: Any, inner: bool) -> Outcome:
        curvature = self._curvature
        if batch is not None:
            return curvature.of_batch(batch, inner=inner)
        if curvature.ng is None:
            raise StructureError(
                "step() has no batch: write `loss = opt.step((x, y))`, which does forward, backward and step. To keep "
                "your own loss and backward, run the net in `with opt.watch(x):` and call loss.backward() before."
            )
        alone("a step without its batch")
        return curvature.of_gradients(curvature.network.gradients(), curvature.taken(), inner=inner)

    def _refuse(self, loss: Any = None) -> Any:
        if not self._skips():
            check(self.info)
        return self.info.loss if loss is None else loss

    def _skips(self) -> bool:
        """Count a step that failed, and return whether to skip it."""
        self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
        return self._on_bad == "skip" and self._in_a_row < PATIENCE

    # ---------------------------------------------------------------------------------- the rest of an optimizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in torch; only before the first batch.

        Raises:
            HyperparameterError: a learning rate, momentum or weight decay outside its range.
            StructureError: parameters of another net, or the layers were found already.
        """
        grouped.check_new(param_group, self.defaults)
        before = [p for group in self.param_groups for p in group["params"]]
        param_group = grouped.listed(param_group)
        self._curvature.network.train([*before, *grouped.tensors(param_group)])
        try:
            super().add_param_group(param_group)
        except (TypeError, ValueError) as error:  # a parameter twice, or not a tensor
            self._curvature.network.train(before)
            raise StructureError(f"{error}: give each parameter of the net once.") from error

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as in torch, and the watched statistics that belong to them."""
        super().zero_grad(set_to_none)
        self._curvature.forget(used=True)

    def __getstate__(self) -> dict[str, Any]:
        # a learning-rate scheduler wraps `step` of this very object
        own = {name: v for name, v in vars(self).items() if not name.startswith("_optimizer_") and name != "step"}
        return {**own, **super().__getstate__()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state as in torch, with the curvature as flat tensors."""
        return {**super().state_dict(), "curvature": self._curvature.state_dict(), "auto_lr": self._auto_lr}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as in torch, also before the first batch.

        Raises:
            StructureError: the state belongs to another optimizer, net or method.
        """
        grouped.check_saved(state_dict, auto_lr=self._auto_lr)
        load = self._curvature.loading(state_dict["curvature"])  # everything is checked before anything changes
        try:
            super().load_state_dict(state_dict)
        except ValueError as error:
            raise StructureError(f"{error}: make the same parameter groups as those that were saved.") from error
        load()
