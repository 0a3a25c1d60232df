"""The KL bound: a limit on how much one step may change the model's predictions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisherfn import tree
from fisherfn.adapt.labels import labels_per_example
from fisherfn.errors import HyperparameterError, StructureError, expect, expect_number
from fisherfn.natgrad import NaturalGradient
from fisherfn.types import Tree

KL_BOUND = 1e-3
"""The default κ, in nats per label."""


def kl_clip(
    nat: Tree,
    inner: Tensor | tuple[()],
    *,
    lr: float | Tensor,
    kl_bound: float | Tensor | None = None,
    bound: float | Tensor | None = None,
) -> Tree:
    r"""Scale a step so that its predicted KL divergence stays within a bound.

    $$\nu = \min\Bigl(1, \sqrt{\frac{\kappa}{\eta^2 |\langle \nabla, \mathrm{nat} \rangle|}}\Bigr)$$

    With nat = F̂⁻¹∇, η²⟨∇, nat⟩ is the squared length of the step ηnat in the metric F̂. It is about twice the KL
    divergence between the predictions before and after the step, in nats per example.

    Args:
        nat: the preconditioned gradient.
        inner: ⟨∇, nat⟩ over all parameters: `info.inner` of `ng.step(..., inner=True)`, or `ff.tree.dot(grads, nat)`.
        lr: the learning rate η of the step.
        kl_bound: κ, in nats per example; required.
        bound: the former name of `kl_bound`.

    Raises:
        StructureError: `inner` was not measured.
        HyperparameterError: a bound or learning rate that is not positive; no bound, or both names of it.

    Source: Grosse & Martens 2016, section 5 (as a trust region); Ba, Grosse & Martens 2017, section 5.

    >>> step = kl_clip({"w": torch.tensor([3.0])}, torch.tensor(4.0), lr=1.0, kl_bound=1.0)
    >>> step["w"]
    tensor([1.5000])
    """
    if isinstance(inner, tuple):
        raise StructureError(
            "there is no ⟨∇, nat⟩ to clip by: call ng.step(..., inner=True) or use ff.tree.dot(grads, nat)."
        )
    expect(nat, dict, "nat", "pass the tree that ng.step or ng.precondition returned")
    if (kl_bound is None) == (bound is None):
        raise HyperparameterError(
            "kl_clip needs one bound: pass kl_bound=, a number such as 1e-3, and not bound= as well."
        )
    kl_bound = bound if kl_bound is None else kl_bound
    for name, value in (("lr", lr), ("kl_bound", kl_bound)):
        expect_number(f"kl_clip: {name}", value, lambda v: v > 0, "must be positive")
    return tree.scale(nat, clip_factor(inner, lr=lr, kl_bound=kl_bound))


def clip_factor(inner: Tensor, *, lr: float | Tensor, kl_bound: Any) -> Tensor:
    """Return ν of `kl_clip`; 1 if the gradient vanishes."""
    length = inner.abs() * lr**2
    ratio: Tensor = kl_bound / length.clamp(min=torch.finfo(length.dtype).tiny)
    return ratio.sqrt().clamp(max=1.0)


def default_kl_bound(ng: NaturalGradient) -> float:
    """Return the default κ, in nats per example: 1e-3 for each label of an example.

    A bound of 1e-3 for the 64 positions of a sequence together would make each step an eighth as long.
    """
    return KL_BOUND * labels_per_example(ng)
