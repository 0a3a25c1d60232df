"""The trial of a step: the examples on which it is predicted and measured, and the directions that it may take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import tree
from fisherfn.adapt.labels import labels_per_example
from fisherfn.adapt.line_search import line_search
from fisherfn.adapt.quadratic import QuadraticModel, quadratic_model, without_examples
from fisherfn.adapt.scales import Scales
from fisherfn.natgrad import NaturalGradient
from fisherfn.stats import Batch, Stats, pair, run, window
from fisherfn.stats.processes import squared_error
from fisherfn.types import PyTree, Tree

PART, LABELS, EXAMPLES = 8, 32, 8
"""The quadratic model is that of N / PART examples, but of at least so many labels and examples."""

SIGMAS = 2.0
"""Increase of the loss, in standard errors, up to which a step that was not fitted to its examples is accepted.

If steps have no effect but noise, 2 % of them are then rejected. Each rejection doubles λ, and each good step
lowers it by 5 %: with more than 7 % rejections λ would grow without end.
"""

GRID = 16
"""Step sizes 1, 1/2, …, 2^-15 of a line search."""


class Tried(NamedTuple):
    """A step before it is accepted.

    Attributes:
        params: the new parameters.
        update: δ.
        learning_rate: α.
        momentum: μ.
        predicted: change of the loss that the quadratic model predicts.
        actual: change of the loss.
        error: standard error of `actual` as an estimate for other examples.
        losses: loss of each example that this process holds, before the step.
        before: their mean over all processes.
        fitted: whether α and μ were both chosen on these examples, by the model or a search, in at least float32.
        scales: factors on the learning rate.
    """

    params: Tree
    update: Tree
    learning_rate: Tensor
    momentum: Tensor
    predicted: Tensor
    actual: Tensor
    error: Tensor
    losses: Tensor
    before: Tensor
    fitted: bool
    scales: Scales

    def tolerance(self, mass: Tensor) -> Tensor:
        """Return the increase of the loss up to which the step is accepted, for examples of a mean target mass.

        A step fitted to its examples lowers their loss unless the model is wrong. With a given learning rate or
        momentum it need not: with noisy labels the loss of 32 examples often increases while that of the whole batch
        decreases. Roundings of half precision show in the standard error, too. But if a single example explodes, the
        error is as large as the increase: more than doubling the loss, and by more than a nat per label, is too much.
        """
        if self.fitted:
            return torch.zeros_like(self.error)
        return torch.minimum(SIGMAS * self.error, torch.maximum(self.before.abs(), mass))


class Examples(NamedTuple):
    """The examples of a trial, with their context: the same dropout before and after the step.

    If the batch is spread over processes, each tries the examples that it holds, and all average: `stats.mean`.
    """

    ng: NaturalGradient
    batch: Batch
    context: PyTree
    stats: Stats
    held: int
    """Number of the examples that this process holds."""
    size: int
    """Number of the examples, on all processes."""

    @classmethod
    def of(cls, ng: NaturalGradient, batch: Batch, context: PyTree, wanted: int | None, stats: Stats) -> Examples:
        """Return `wanted` examples, spread over a batch with these statistics.

        None is for an eighth of them, but at least 32, or 8 sequences with 4 labels or more. A net that couples its
        examples (batch norm in training mode) always gets at least 32. It normalises the part by itself, before and
        after the step: prediction and change are of one function, whose noise grows as the part shrinks.
        The trial runs `model.exact` if the model has it, such as a net without its autocast: with rounded outputs, the
        effect of a short step is noise.
        """
        ng = replace(ng, model=getattr(ng.model, "exact", ng.model))
        x, y = pair(batch)
        here = tree.leaves(x)[0].shape[0]
        n = stats.total(here)
        if wanted is None:
            wanted = max(n // PART, EXAMPLES, math.ceil(LABELS / labels_per_example(ng)))
        if ng.layout.couples:
            wanted = max(wanted, LABELS)
        if wanted >= n:
            return cls(ng, (x, y), context, stats, here, n)
        some = torch.tensor(stats.part(wanted, here), dtype=torch.long, device=stats.loss.device)
        part = tree.map(lambda leaf: leaf[some] if isinstance(leaf, Tensor) and leaf.ndim else leaf, (x, y))
        context = None if context is None else window(ng.layout, context, some)
        return cls(ng, part, context, stats, len(some), wanted)

    def losses(self, params: Tree) -> Float[Tensor, " n"]:
        """Return the loss of each example that this process holds."""
        if not self.held:
            return self.stats.loss.new_zeros(0)
        x, y = self.batch
        outputs, _ = run(self.ng.model, params, x, () if self.context is None else self.context)
        losses: Tensor = self.ng.likelihood.nll(outputs, y)
        return losses

    def model(self, params: Tree, directions: Sequence[Tree]) -> QuadraticModel:
        """Return the quadratic model along some directions, with the losses of the examples that are here."""
        if self.held:
            model = quadratic_model(self.ng, params, self.batch, directions, context=self.context)
        else:
            model = without_examples(directions, self.losses(params))
        slope, curvature = self.stats.mean((model.slope, model.curvature), self.held)
        return model._replace(slope=slope, curvature=curvature)

    def means(self, *losses: Float[Tensor, " n"]) -> tuple[Tensor, ...]:
        """Return the means over all examples of quantities that each process has for its own."""
        here = tuple(each.mean() if self.held else each.sum() for each in losses)
        return self.stats.mean(here, self.held)  # type: ignore[no-any-return]

    def change(self, new: Tree, before: Float[Tensor, " n"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean change of the loss, its standard error, and the mean loss before."""
        before = before.double()
        each = self.losses(new).double() - before
        change, square, loss = self.means(each, each.square(), before)
        return change, squared_error((square - change.square()).clamp(min=0), self.size).sqrt(), loss

    def searched(self, params: Tree, nat: Tree) -> Float[Tensor, "1"]:
        """Return the negative of the step size of the grid with the lowest loss."""
        sizes = [0.5**k for k in range(GRID)]
        found = line_search(lambda p: self.means(self.losses(p).double())[0], params, nat, sizes=sizes)
        return -found.size.reshape(1)


def along(nat: Tree, previous: Tree | None, rate: Tensor, momentum: Tensor) -> Tree:
    """Return −α nat + μ δ₀."""
    scale, weight = (cache(lambda dtype, number=number: number.to(dtype)) for number in (-rate, momentum))
    if previous is None:
        return tree.map(lambda d: d * scale(d.dtype), nat)
    return tree.map(lambda d, v: torch.addcmul(d * scale(d.dtype), v, weight(v.dtype)), nat, previous)
