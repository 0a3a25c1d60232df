r"""The sampled Fisher as a linear operator on trees: $F = U U^\top$, one column of U per example and sample.

$$U = \tfrac{1}{\sqrt N} [\dots \mathrm{vec}(W_{sn}) \dots], \qquad W_{sn} = \sum_t g_{snt} a_{nt}^\top$$

Rows and columns of parameters that are in no block (unused ones, or those that take the plain gradient) are zero. The
matrix is only formed by `dense`. "full" couples all layers (with the same examples and samples in each); "block"
keeps one diagonal block per layer, with all its groups. The scale is that of the mean negative log-likelihood.

k group, s sample, n example, t position, i input, o output; columns of U run over samples, then examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import operators
from fisherfn.errors import expect_number, unknown
from fisherfn.lowrank import (
    System,
    combine,
    eigenvalues,
    factorise,
    gram,
    in_parameters,
    inner_products,
    parameters,
    smaller_matrix,
    solve,
)
from fisherfn.operators import ravel
from fisherfn.per_example import example_matrices, flat_example_matrices, squares
from fisherfn.taps import AnyTap
from fisherfn.types import Codec, Tree

Structure = Literal["full", "block"]
STRUCTURES = ("full", "block")


class Fisher:
    """The sampled Fisher of some taps. Immutable; every method is a pure function of the taps.

    Args:
        taps: one tap per block, computed or lazy.
        codec: conversion between a tree of parameters and one matrix per block.
        structure: "full" or "block".
    """

    def __init__(self, taps: Mapping[str, AnyTap], codec: Codec, structure: Structure | str = "full") -> None:
        if structure not in STRUCTURES:
            raise unknown("structure", structure, STRUCTURES)
        self._taps, self._codec, self._structure = dict(taps), codec, structure
        self._examples = next(iter(self._taps.values())).sizes.n
        self._dtype = next(iter(self._taps.values())).dtype

    def __matmul__(self, v: Tree) -> Tree:
        """Return `F v`, by two passes over the taps; no per-example gradient is formed."""
        matrices = {key: W.to(self._dtype) for key, W in self._codec.matrices(v).items()}
        inner = self._total({key: inner_products(self._taps[key], V) for key, V in matrices.items()})
        product = self._codec.tree({key: combine(self._taps[key], c / self._examples) for key, c in inner.items()})
        return {name: leaf.to(v[name].dtype) for name, leaf in product.items()}

    def solve(self, v: Tree, damping: float | Tensor) -> Tree:
        r"""Return $(F + \lambda I)^{-1} v$, solved in the smaller of example and parameter space, in float64.

        Example space: $\frac1\lambda (v - U (\lambda I + U^\top U)^{-1} U^\top v)$ (Ren & Goldfarb 2019), which needs
        λ > 0; parameter space: the dense matrix. A singular system gives NaN, because it cannot raise under vmap.
        """
        expect_number("damping", damping, lambda number: number >= 0, "must be >= 0")
        matrices = {key: W.double() for key, W in self._codec.matrices(v).items()}
        v64 = {name: leaf.double() for name, leaf in v.items()}
        λ = torch.as_tensor(damping, dtype=torch.float64, device=next(iter(v64.values())).device)
        solved: dict[str, Tensor] = {}
        for taps in self._groups(torch.float64):
            factor, ok = factorise(smaller_matrix(taps), λ)
            ok = ok if in_parameters(taps) else ok & (λ > 0)  # in example space F itself is singular
            system = System(taps, torch.where(ok, factor, math.nan), λ)
            solved |= solve(system, {key: matrices[key] for key in taps})
        x = self._codec.tree(solved)
        if self._outside:  # the rows of these parameters are λI
            inside, inverse = self._codec.tree(matrices), torch.where(λ > 0, 1 / λ, math.nan)
            x = {name: leaf + (v64[name] - inside[name]) * inverse for name, leaf in x.items()}
        return {name: leaf.to(v[name].dtype) for name, leaf in x.items()}

    def dense(self) -> Float[Tensor, "p p"]:
        """Return the matrix `[P, P]`: params order, each tensor row-major."""
        if self._structure == "full":
            U = self._rows(self._taps) / math.sqrt(self._examples)
            return U.mT @ U
        parts = [self._rows({key: tap}) / math.sqrt(self._examples) for key, tap in self._taps.items()]
        return torch.stack([U.mT @ U for U in parts]).sum(0)

    def block(self, key: str) -> Float[Tensor, "d d"]:
        """Return the diagonal block of one layer: row-major flattening of `W = [weight | bias]`, groups first."""
        if key not in self._taps:
            raise unknown("block", key, self._taps)
        U = flat_example_matrices([self._taps[key]]) / math.sqrt(self._examples)
        return U.mT @ U

    def trace(self) -> Float[Tensor, ""]:
        """Return the sum of all eigenvalues: the mean over examples of the squared gradient norms."""
        return torch.stack([squares(tap).sum() for tap in self._taps.values()]).sum() / self._examples

    def diag(self) -> Float[Tensor, " p"]:
        """Return the diagonal `[P]`, in params order."""
        entries = {key: squares(tap) for key, tap in self._taps.items()}
        return ravel(self._codec.tree(entries)) / self._examples

    def gram(self) -> Tensor | dict[str, Tensor]:
        """Return `UᵀU`, `[S·N, S·N]`, which has the nonzero eigenvalues of F; for "block" one per block."""
        grams = {key: gram(tap) / self._examples for key, tap in self._taps.items()}
        return torch.stack(list(grams.values())).sum(0) if self._structure == "full" else grams

    def spectrum(self) -> Float[Tensor, " p"]:
        """Return all P eigenvalues, ascending, in float64, from the smaller of Gram matrix and Fisher.

        Raises:
            TooLargeError: the smaller one has more than 16384 rows.
        """
        found = torch.cat([eigenvalues(taps) for taps in self._groups(torch.float64)])
        return torch.cat([found, found.new_zeros(self._outside)]).sort().values

    def logdet(self, damping: float | Tensor = 0.0) -> Float[Tensor, ""]:
        r"""Return $\log\det(F + \lambda I)$ in float64; `-inf` if it is singular.

        Raises:
            HyperparameterError: a negative damping.
            TooLargeError: see `spectrum`.
        """
        return operators.logdet(self.spectrum(), damping)

    def to_scipy(self, damping: float = 0.0) -> Any:
        """Return `F + damping · I` as a `scipy.sparse.linalg.LinearOperator` on vectors of P numbers.

        Raises:
            MissingPackageError: scipy is not installed.
        """
        like = next(iter(self._taps.values())).window(slice(0, 1)).whole().g
        return operators.to_scipy(self.__matmul__, self._zeros(like), damping)

    def _zeros(self, like: Tensor) -> Tree:
        """Return a tree of zeros, of the type and on the device of a tensor."""
        sizes = {key: tap.sizes for key, tap in self._taps.items()}
        return self._codec.tree({key: like.new_zeros(size.k, size.o, size.i) for key, size in sizes.items()})

    @cached_property
    def _outside(self) -> int:
        """Return the number of parameters that are in no block."""
        every = self._zeros(torch.empty((), device="meta"))
        return sum(leaf.numel() for leaf in every.values()) - parameters(self._taps)

    def _groups(self, dtype: torch.dtype) -> list[dict[str, AnyTap]]:
        """Return the groups of coupled blocks."""
        taps = {key: tap.to(dtype) for key, tap in self._taps.items()}
        return [taps] if self._structure == "full" else [{key: tap} for key, tap in taps.items()]

    def _total(self, inner: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum the inner products over all blocks for the full structure."""
        if self._structure == "block":
            return inner
        total = torch.stack(list(inner.values())).sum(0)
        return dict.fromkeys(inner, total)

    def _rows(self, taps: Mapping[str, AnyTap]) -> Float[Tensor, "m p"]:
        """Return per-example gradients in params order, zero outside the given blocks."""
        matrices = {
            key: example_matrices(tap) if key in taps else torch.zeros_like(example_matrices(tap))
            for key, tap in self._taps.items()
        }
        flat = {key: W.flatten(0, 1) for key, W in matrices.items()}
        return torch.vmap(lambda one: ravel(self._codec.tree(one)))(flat)


def square_norm(tap: AnyTap) -> Float[Tensor, ""]:
    """Return `‖F‖²` of the layer's block, from the Gram matrix."""
    return (gram(tap).double() / tap.sizes.n).square().sum()


def relative_error(tap: AnyTap, cross: Float[Tensor, ""], square: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return `‖F − F̂‖ / ‖F‖` from `⟨F, F̂⟩` and `‖F̂‖²`."""
    own = square_norm(tap)
    return ((own - 2 * cross.double() + square.double()).clamp(min=0) / own).sqrt()
