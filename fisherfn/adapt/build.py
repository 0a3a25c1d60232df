"""Construction of an adaptive optimizer: checks of the settings, and the meaning of "auto"."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fisherfn.adapt.clip import default_kl_bound
from fisherfn.adapt.labels import has_classes
from fisherfn.adapt.optimizer import RULES, Adaptive, Rule
from fisherfn.errors import HyperparameterError, StructureError, expect, expect_number, unknown
from fisherfn.natgrad import NaturalGradient
from fisherfn.terms import TermSum


def adaptive(
    ng: NaturalGradient,
    *,
    lr: float | Tensor | str = "auto",
    momentum: float | Tensor | str = "auto",
    damping: float | Tensor | str = "auto",
    rule: Rule | str = "auto",
    kl_bound: float | Tensor | None = None,
    ema: float | Tensor = 0.95,
    weight_decay: float | Tensor = 0.0,
    model_examples: int | None = None,
    average: float | None = None,
    look_back: bool = True,
) -> Adaptive:
    r"""Return an optimizer that chooses step size, momentum and damping itself.

    $$\theta \leftarrow \theta - \alpha \hat F^{-1}\nabla h + \mu\, \delta_0$$

    Args:
        ng: model, likelihood and method, with any method of `ff.METHODS`.
        lr: α; "auto" is the model's minimiser, or 1 under the rule "clip".
        momentum: μ in [0, 1); "auto" is the model's minimiser, or 0.9 under the rule "clip".
        damping: λ; "auto" follows the reduction ratio. A number is the initial λ, which only rejected steps increase.
        rule: "model", "clip" or "line_search"; "auto" is "clip" for class labels, "line_search" for the exact natural
            gradient and "model" for the rest.
        kl_bound: κ of the rule "clip", in nats; None is 1e-3 per label there. The other rules have none.
        ema: weight of the old factors, in [0, 1).
        weight_decay: w, decoupled: α w θ is subtracted in addition to the step.
        model_examples: number of examples of each batch for the quadratic model; None for an eighth, at least
            32, or 8 if each has several labels. A net that couples examples (batch norm in training mode) uses at
            least 32, normalised by themselves. The rule "line_search" always tries the whole batch.
        average: weight ξ of the old average of the parameters, `state.average`; None: no average. Martens & Grosse
            use 0.99.
        look_back: whether a step is undone if the loss of the next batch is too high. Switch it off if the loss also
            changes for other reasons (a second player, another data set), or if batches use different parts of
            the net in turn.

    Numbers may also be 0-d tensors, batched under `torch.vmap` for a sweep, where their values are not checked.

    Raises:
        HyperparameterError: a number outside its range; a KL bound with a rule that has none; a word other than "auto".
        UnknownNameError: no rule of this name.

    Source: Martens & Grosse 2015, sections 6 and 7.
    """
    expect(ng, NaturalGradient, "ng", "pass what ff.natural_gradient returned")
    if isinstance(ng, TermSum):
        raise StructureError(
            "adaptive steps take one batch: for a sum of terms use ff.line_search or ff.quadratic_model."
        )
    given = {"lr": lr, "momentum": momentum, "damping": damping}
    numbers = {name: _number(name, value) for name, value in given.items()}
    rules = {
        "lr": (lambda v: v > 0, 'must be positive or "auto"'),
        "momentum": (lambda v: 0 <= v < 1, 'must lie in [0, 1), or be "auto"'),
        "damping": (lambda v: v >= 0, 'must be >= 0 or "auto"'),
    }
    for name, value in numbers.items():
        if value is not None:
            expect_number(name, value, *rules[name])
    if rule != "auto" and rule not in RULES:
        raise unknown("rule", rule, ("auto", *RULES))
    chosen = _rule(ng, rule, numbers, kl_bound)
    if kl_bound is not None:
        expect_number("kl_bound", kl_bound, lambda v: v > 0, "must be positive, or None")
        if chosen != "clip":
            raise HyperparameterError(
                f'a KL bound and the rule "{chosen}" both choose the length of the step: drop kl_bound, or set '
                'rule="clip" (then lr and momentum are numbers, 1 and 0.9 by default).'
            )
    if model_examples is not None:
        expect_number("model_examples", model_examples, lambda v: v >= 1, "must be a whole number >= 1", whole=True)
    for name, fraction in (("ema", ema), ("average", average)):
        if fraction is not None:
            expect_number(name, fraction, lambda v: 0 <= v < 1, "must lie in [0, 1)")
    expect_number("weight_decay", weight_decay, lambda v: v >= 0, "must be >= 0")
    if chosen == "clip" and kl_bound is None:
        kl_bound = default_kl_bound(ng)
    return Adaptive(
        ng, numbers["lr"], numbers["momentum"], numbers["damping"], chosen, kl_bound, ema, weight_decay, model_examples,
        average, look_back,
    )  # fmt: skip


def _number(name: str, value: float | Tensor | str | None) -> Any:
    """Return a number, or None for "auto"."""
    if isinstance(value, str):
        if value != "auto":
            raise HyperparameterError(f'{name} is a number or "auto", got {value!r}.')
        return None
    if value is None:
        raise HyperparameterError(f'{name} is a number or "auto", got None.')
    return value


def _rule(ng: NaturalGradient, rule: str, numbers: dict[str, Any], kl_bound: float | Tensor | None) -> Any:
    if rule != "auto":
        momentum = numbers["momentum"]
        none = momentum is None or (not isinstance(momentum, Tensor) and momentum == 0)
        if rule == "line_search" and (numbers["lr"] is not None or not none):
            raise StructureError('the rule "line_search" finds the learning rate and has no momentum: leave both out.')
        return rule
    if kl_bound is not None:
        return "clip"
    if has_classes(ng.likelihood):
        return "clip"
    searches = numbers["lr"] is None and numbers["momentum"] is None and ng.method.name == "exactNG"
    return "line_search" if searches else "model"
