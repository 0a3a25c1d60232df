"""Common parts of the methods with one or two Kronecker products, which differ in estimation and averaging."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fisherfn.base import LayerMethod, Method, Update, Updated, layerwise, whole_mean
from fisherfn.errors import HyperparameterError, expect_number
from fisherfn.linalg import damped, kron, rearranged
from fisherfn.linalg.kron import Pair, Sum
from fisherfn.linalg.rearranged import Rearranged
from fisherfn.linalg.vanloan import Triplet, by_block
from fisherfn.taps import AnyTap, Mean, Moment
from fisherfn.types import PyTree, Shape

DampingForm = Literal["factored", "eigen"]

RESIDUALS = ("residual", "second_residual")
"""Diagnostics: ‖Zᵀu − σv‖/σ of the computed triplets."""


class Fit(NamedTuple):
    """Functions of a method that finds its terms by iterating on the rearranged block Z.

    Attributes:
        find: Z -> its leading triplets.
        start: previous factors -> pairs whose sum is the start of the iteration.
        blend: (old, new, rho) -> the method's running average of each block; old and new are lists of blocks.
        moments: the pair of K-FAC, if it is the first term; the triplets are then those of the residual.
    """

    find: Callable[[Rearranged], tuple[Triplet, ...]]
    start: Callable[[PyTree], Sequence[Pair]]
    blend: Callable[[Sequence[PyTree], Sequence[PyTree], Tensor], Sequence[PyTree]]
    moments: Moment | None = None


def iterated(fit: Fit) -> Update:
    """Build an update by iterations; linear layers with the same number of examples are iterated on together."""

    def update(old: PyTree, taps: Mapping[str, AnyTap], rho: Tensor, mean: Mean, inverting: bool) -> Updated:
        del inverting
        whole = mean is whole_mean
        for keys in rearranged.alike(taps, whole):
            blocks = [rearranged.rearranged(taps[key], fit.start(old[key]), mean, whole) for key in keys]
            known = [mean(fit.moments, taps[key]) for key in keys] if fit.moments else []
            Z = rearranged.joined(blocks)
            if known:
                moments = (block.moments(pair) for block, pair in zip(blocks, known, strict=True))
                Z = rearranged.deflated(Z, *(torch.cat(side) for side in zip(*moments, strict=True)))
            found = by_block(fit.find(Z), [taps[key].sizes.k for key in keys])
            new = []
            for at, (block, triplets) in enumerate(zip(blocks, found, strict=True)):
                terms = [*known[at : at + 1], *(block.pair(triplet.u, triplet.v) for triplet in triplets)]
                new.append(terms[0] if len(terms) == 1 else Sum(*terms))
            blended = fit.blend([old[key] for key in keys], new, rho)
            for key, factors, triplets in zip(keys, blended, found, strict=True):
                residuals = (triplet.residual.amax() for triplet in triplets)
                yield key, factors, dict(zip(RESIDUALS, residuals, strict=False))

    return update


def one_term(name: str, update: Update, damping_form: str, diagonal_above: int) -> Method:
    """Build a method whose factors are a `Pair`."""
    form, width = damped.damping_form(damping_form), checked_width(diagonal_above)

    def init(shape: Shape, dtype: torch.dtype, device: torch.device, damping: Tensor) -> tuple[Pair, damped.Inverse]:
        eye = kron.identity(shape, kron.forms(shape, width), dtype, device)
        return kron.zeros(eye), form.empty(eye, damping)

    layer = LayerMethod(
        init=init,
        update=update,
        invert=form.one,
        apply=damped.apply,
        apply_tap=damped.apply_tap,
        matvec=lambda factors, W: kron.apply([factors], W),
        overlap=lambda factors, tap: rearranged.overlap([factors], tap),
        trace=lambda factors: kron.trace([factors]),
        eigenvalues=damped.eigenvalues,
        logdet=damped.logdet,
    )
    return layerwise(name, layer)


def two_terms(name: str, update: Update, damping_form: str, floor: float, diagonal_above: int) -> Method:
    """Build a method whose factors are a `Sum` with a PSD first term."""
    form, width = damped.damping_form(damping_form, terms=2, floor=floor), checked_width(diagonal_above)

    def init(shape: Shape, dtype: torch.dtype, device: torch.device, damping: Tensor) -> tuple[Sum, damped.Inverse]:
        eye = kron.identity(shape, kron.forms(shape, width), dtype, device)
        return Sum(kron.zeros(eye), kron.zeros(eye)), form.empty(eye, damping)

    layer = LayerMethod(
        init=init,
        update=update,
        invert=lambda factors, damping: form.two(factors.first, factors.second, damping),
        apply=damped.apply,
        apply_tap=damped.apply_tap,
        matvec=kron.apply,
        overlap=rearranged.overlap,
        trace=kron.trace,
        logdet=damped.logdet,
    )
    return layerwise(name, layer)


def checked_steps(iterations: int, least: int) -> int:
    """Return the number of iterations.

    Raises:
        HyperparameterError: too few iterations for the number of terms.
    """
    expect_number("iterations", iterations, lambda v: v >= least, f"must be a whole number >= {least}", whole=True)
    return iterations


def checked_width(diagonal_above: int) -> int:
    """Return the width above which factors are diagonal.

    Raises:
        HyperparameterError: a negative width.
    """
    if diagonal_above < 0:
        raise HyperparameterError(f"diagonal_above must be >= 0, got {diagonal_above}.")
    return diagonal_above
