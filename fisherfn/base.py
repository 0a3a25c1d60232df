r"""The Method protocol, and its construction from functions on one layer.

A method that treats layers separately is a few pure functions on one block (`LayerMethod`). `layerwise` applies them to
dicts of blocks. A method that couples layers builds a `Method` itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import tree
from fisherfn.operators import Kind, check_size
from fisherfn.taps import AnyTap, Mean, Moment, Tap
from fisherfn.types import Product, PyTree, Shape

Diagnostics = dict[str, Tensor]
"""Measurements by name. The names are fixed for a method, so that the structure of `info` is fixed."""

Updated: TypeAlias = Iterator[tuple[str, PyTree, Diagnostics]]
"""Finished blocks in any order: key, new factors, diagnostics."""

Update: TypeAlias = Callable[[PyTree, Mapping[str, AnyTap], Tensor, Mean, bool], Updated]
"""Function (old, taps, rho, mean, inverting) -> blended factors, with weight ρ on the old ones, block by block."""

BlockUpdate: TypeAlias = Callable[[PyTree, AnyTap, Tensor, Mean, bool], tuple[PyTree, Diagnostics]]
"""Update of one block."""


class Estimated(NamedTuple):
    """New factors, masks that are true if they are valid, and diagnostics."""

    factors: PyTree
    ok: dict[str, Tensor]
    diagnostics: dict[str, Diagnostics]


class Preconditioned(NamedTuple):
    """Preconditioned gradients, one matrix per block, and ⟨∇, nat⟩ if requested."""

    matrices: dict[str, Tensor]
    inner: Any


class Method(NamedTuple):
    """The functions of a method; every argument and result is a dict by block key.

    Attributes:
        name: the name in `ff.METHODS`.
        init: (shapes, dtype, device, damping) -> empty factors and inverses; preconditioning with these gives grad/λ.
        update: (factors, taps, rho, mean, inverting) -> factors blended with weight ρ on the old ones. `inverting` is
            True if `invert` follows; methods may skip work needed only for inversion.
        invert: (factors, damping) -> inverses.
        precondition: (inverses, gradients, inner) -> preconditioned gradients; a gradient is a matrix or a dense loss
            tap.
        matvec: (factors, matrices) -> the undamped approximate Fisher F̂ times the matrices.
        overlap: (factors, taps) -> (⟨F, F̂⟩, ‖F̂‖²) of every block, with F the sampled Fisher of the taps.
        trace: (factors, shapes) -> the trace of F̂; None: use its dense matrix.
        eigenvalues: (factors, shapes) -> all eigenvalues of F̂ in any order; None: use its dense matrix.
        logdet: inverses -> the log-determinant of the matrix that `precondition` multiplies by; None: use its dense
            matrix.
        inverse: "symmetric", "general" (linear only) or "nonlinear": how `precondition` depends on the gradient.
    """

    name: str
    init: Callable[[Mapping[str, Shape], torch.dtype, torch.device, Tensor], tuple[PyTree, PyTree]]
    update: Callable[[PyTree, Mapping[str, AnyTap], Tensor, Mean, bool], Estimated]
    invert: Callable[[PyTree, Tensor], Estimated]
    precondition: Callable[[PyTree, Mapping[str, Tensor | Tap], bool], Preconditioned]
    matvec: Callable[[PyTree, Mapping[str, Tensor]], dict[str, Tensor]]
    overlap: Callable[[PyTree, Mapping[str, AnyTap]], dict[str, tuple[Tensor, Tensor]]]
    trace: Callable[[PyTree, Mapping[str, Shape]], Tensor] | None = None
    eigenvalues: Callable[[PyTree, Mapping[str, Shape]], Tensor] | None = None
    logdet: Callable[[PyTree], Tensor] | None = None
    inverse: Kind = "symmetric"


class LayerMethod(NamedTuple):
    """A method on one block.

    Attributes:
        init: (shape, dtype, device, damping) -> empty factors and the inverse I/λ.
        update: (old, taps, rho, mean, inverting) of all blocks -> factors in the method's canonical scale, blended with
            weight ρ on the old ones, and diagnostics. Every additive moment is computed with `mean`. Use `one_by_one`,
            unless many blocks at once cost less.
        invert: (factors, damping) -> (inverse, ok, diagnostics).
        apply: (inverse, gradient matrix) -> the preconditioned matrix.
        apply_tap: (inverse, loss tap, inner) -> the same, with ⟨∇, nat⟩ if requested.
        matvec: (factors, matrix) -> the undamped approximation F̂ times the matrix.
        overlap: (factors, tap) -> (⟨F, F̂⟩, ‖F̂‖²).
        trace: factors -> the trace of F̂, all groups together; None: use its dense matrix.
        eigenvalues: factors -> all eigenvalues of F̂ in any order; None: use its dense matrix.
        logdet: inverse -> the log-determinant of the matrix that `apply` multiplies by; None: use the dense matrix of
            all layers.
    """

    init: Callable[[Shape, torch.dtype, torch.device, Tensor], tuple[PyTree, PyTree]]
    update: Update
    invert: Callable[[PyTree, Tensor], tuple[PyTree, Tensor, Diagnostics]]
    apply: Callable[[PyTree, Float[Tensor, "k o i"]], Float[Tensor, "k o i"]]
    apply_tap: Callable[[PyTree, Tap, bool], Product]
    matvec: Callable[[PyTree, Float[Tensor, "k o i"]], Float[Tensor, "k o i"]]
    overlap: Callable[[PyTree, AnyTap], tuple[Tensor, Tensor]]
    trace: Callable[[PyTree], Tensor] | None = None
    eigenvalues: Callable[[PyTree], Tensor] | None = None
    logdet: Callable[[PyTree], Tensor] | None = None


def one_by_one(update: BlockUpdate) -> Update:
    """Apply the update of one block to all blocks."""

    def each(old: PyTree, taps: Mapping[str, AnyTap], rho: Tensor, mean: Mean, inverting: bool) -> Updated:
        for key, tap in taps.items():
            yield key, *update(old[key], tap, rho, mean, inverting)

    return each


def estimate_then_blend(
    estimate: Callable[[AnyTap, PyTree, Mean], tuple[PyTree, Diagnostics]],
    blend: Callable[[PyTree, PyTree, Tensor], PyTree],
) -> BlockUpdate:
    """Combine an estimate from one batch with a running average.

    Args:
        estimate: (tap, previous, mean) -> factors of one batch and diagnostics; `previous` warm-starts iterations.
        blend: (old, new, rho) -> the method's running average.
    """

    def update(old: PyTree, tap: AnyTap, rho: Tensor, mean: Mean, inverting: bool) -> tuple[PyTree, Diagnostics]:
        del inverting
        new, diagnostics = estimate(tap, old, mean)
        return blend(old, new, rho), diagnostics

    return update


def whole_mean(moment: Moment, tap: AnyTap) -> PyTree:
    """Return the moment itself: the mean over one batch held as a whole."""
    return moment(tap)


def chunked_mean(size: int) -> Mean:
    """Compute the same mean for a few examples at a time, which limits the memory of a moment."""

    def mean(moment: Moment, tap: AnyTap) -> PyTree:
        examples = tap.sizes.n
        total = None
        for start in range(0, examples, size):
            part = tap.window(slice(start, min(start + size, examples)))
            share = tree.scale(moment(part), part.sizes.n / examples)
            total = share if total is None else tree.add(total, share)
        return total

    return mean


def factorwise(old: PyTree, new: PyTree, rho: Float[Tensor, ""]) -> PyTree:
    """Return `ρ old + (1 − ρ) new`, factor by factor."""
    return tree.map(lambda o, n: torch.lerp(n, o, rho.to(n.dtype)), old, new)


def layerwise(name: str, layer: LayerMethod) -> Method:
    """Build a method on all blocks from one on a single block."""

    def init(
        shapes: Mapping[str, Shape], dtype: torch.dtype, device: torch.device, damping: Tensor
    ) -> tuple[PyTree, PyTree]:
        pairs = {key: layer.init(shape, dtype, device, damping) for key, shape in shapes.items()}
        return {key: pair[0] for key, pair in pairs.items()}, {key: pair[1] for key, pair in pairs.items()}

    def update(
        factors: PyTree, taps: Mapping[str, AnyTap], rho: Tensor, mean: Mean, inverting: bool = True
    ) -> Estimated:
        new, ok, diagnostics = {}, {}, {}
        for key, blended, measured in layer.update(factors, taps, rho, mean, inverting):
            new[key], ok[key], diagnostics[key] = blended, tree.finite(blended), measured
        return Estimated({key: new[key] for key in factors}, {key: ok[key] for key in factors}, _by_name(diagnostics))

    def invert(factors: PyTree, damping: Tensor) -> Estimated:
        inverses, ok, diagnostics = {}, {}, {}
        for key in factors:
            inverses[key], ok[key], diagnostics[key] = layer.invert(factors[key], damping)
        return Estimated(inverses, ok, _by_name(diagnostics))

    def precondition(inverses: PyTree, gradients: Mapping[str, Tensor | Tap], inner: bool) -> Preconditioned:
        products = {key: _apply(layer, inverses[key], gradient, inner) for key, gradient in gradients.items()}
        total = torch.stack([p.inner for p in products.values()]).sum() if inner else ()  # type: ignore[misc]
        return Preconditioned({key: p.matrix for key, p in products.items()}, total)

    def matvec(factors: PyTree, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: layer.matvec(factors[key], matrix) for key, matrix in matrices.items()}

    def overlap(factors: PyTree, taps: Mapping[str, AnyTap]) -> dict[str, tuple[Tensor, Tensor]]:
        return {key: layer.overlap(factors[key], tap) for key, tap in taps.items()}

    def trace(factors: PyTree, shapes: Mapping[str, Shape]) -> Tensor:
        if layer.trace:
            return torch.stack([layer.trace(factors[key]) for key in shapes]).sum()
        blocks = [_dense(layer, factors[key], shape) for key, shape in shapes.items()]
        return torch.stack([block.diagonal(dim1=-2, dim2=-1).sum() for block in blocks]).sum()

    def eigenvalues(factors: PyTree, shapes: Mapping[str, Shape]) -> Tensor:
        if layer.eigenvalues:
            return torch.cat([layer.eigenvalues(factors[key]).flatten() for key in shapes])
        blocks = (_dense(layer, factors[key], shape) for key, shape in shapes.items())
        return torch.cat([torch.linalg.eigvalsh(block).flatten() for block in blocks])

    def logdet(inverses: PyTree) -> Tensor:
        assert layer.logdet
        return torch.stack([layer.logdet(inverse) for inverse in inverses.values()]).sum()

    return Method(
        name, init, update, invert, precondition, matvec, overlap, trace, eigenvalues, logdet if layer.logdet else None
    )


def _dense(layer: LayerMethod, factors: PyTree, shape: Shape) -> Float[Tensor, "k d d"]:
    """Return the approximation of a block as one matrix per group, from products with unit matrices."""
    k, o, i, _ = shape
    check_size(o * i, f"a layer's block ({o}×{i}), whose factors do not give this quantity,")
    like = next(leaf for leaf in tree.leaves(factors) if leaf.is_floating_point())
    units = torch.eye(o * i, dtype=like.dtype, device=like.device).reshape(o * i, 1, o, i).expand(-1, k, -1, -1)
    return torch.vmap(partial(layer.matvec, factors))(units).flatten(2).movedim(0, -1)


def _apply(layer: LayerMethod, inverse: PyTree, gradient: Tensor | Tap, inner: bool) -> Product:
    if isinstance(gradient, Tap):
        return layer.apply_tap(inverse, gradient, inner)
    matrix = layer.apply(inverse, gradient)
    return Product(matrix, (gradient * matrix).sum() if inner else ())


def _by_name(diagnostics: Mapping[str, Diagnostics]) -> dict[str, Diagnostics]:
    names = {name for measured in diagnostics.values() for name in measured}
    return {
        name: {key: measured[name] for key, measured in diagnostics.items() if name in measured}
        for name in sorted(names)
    }
