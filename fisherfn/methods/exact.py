r"""The exact natural gradient: $(F + \lambda I)^{-1} \nabla$ with the sampled Fisher, full or block-diagonal.

With $U = \frac{1}{\sqrt N} [\dots \mathrm{vec}(W_{sn}) \dots]$ the Fisher is $F = U U^\top$, and by the Woodbury
identity

$$(U U^\top + \lambda I)^{-1} v = \frac1\lambda \bigl(v - U (U^\top U + \lambda I)^{-1} U^\top v\bigr),$$

a system with one unknown per example and sample. Its Gram matrix is a sum over layers, with the same examples and
samples in each; no W is formed for layers with few positions. If there are fewer parameters, the system is F + λI
itself. Systems are factorised in float64.

"full" couples all layers; "block" keeps one diagonal block per layer, with all its groups. There is no running average:
the factors are the newest statistics, so the shapes of the state's leaves follow the batch. Damping is λI.

Ren & Goldfarb 2019, *Efficient subsampled Gauss-Newton and natural gradient methods for training neural networks*,
section 3.

k group, s sample, n example, t position, i input, o output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import rows, tree
from fisherfn.base import Estimated, Method, Preconditioned
from fisherfn.errors import HyperparameterError, unknown
from fisherfn.fisher import STRUCTURES, Structure, combine, eigenvalues, gram, inner_products
from fisherfn.linalg.solve import add_diagonal, condition, floored
from fisherfn.taps import AnyTap, Mean, Tap, example_matrices, squares
from fisherfn.types import Shape

UNKNOWNS = 16384
"""Size of the largest system that is factorised: 2 GiB in float64."""

Taps = dict[str, Tap]
Matrices = Mapping[str, Tensor]


class System(NamedTuple):
    """A factorised system, `UᵀU + λI` in example space or `UUᵀ + λI` in parameter space, whichever is smaller."""

    taps: Taps
    factor: Float[Tensor, "m m"]
    damping: Float[Tensor, ""]


def exact(structure: Structure | str = "full") -> Method:
    """Build the exact natural gradient.

    Args:
        structure: "full" couples all layers, "block" keeps one diagonal block per layer.

    Raises:
        UnknownNameError: an unknown structure.
    """
    if structure not in STRUCTURES:
        raise unknown("structure", structure, STRUCTURES)
    grouped = _together if structure == "full" else _apart
    return Method(
        name="exactNG",
        init=partial(init, grouped=grouped),
        update=partial(update, grouped=grouped),
        invert=partial(invert, grouped=grouped),
        precondition=precondition,
        matvec=partial(matvec, grouped=grouped),
        overlap=overlap,
        trace=trace,
        eigenvalues=partial(spectrum, grouped=grouped),
        logdet=logdet,
    )


def _together(blocks: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {"all": blocks}


def _apart(blocks: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {key: {key: block} for key, block in blocks.items()}


# statistics ------------------------------------------------------------------------------------------------------


def init(
    shapes: Mapping[str, Shape], dtype: torch.dtype, device: torch.device, damping: Tensor, grouped: Any
) -> tuple[Taps, dict[str, System]]:
    """Return taps without examples, whose Fisher is zero."""
    taps = {key: empty_tap(shape, dtype, device) for key, shape in shapes.items()}
    nothing = torch.zeros(0, 0, dtype=torch.float64, device=device)
    return taps, {key: System(dict(group), nothing, damping.clone()) for key, group in grouped(taps).items()}


def empty_tap(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tap:
    """Return the tap of a block without examples."""
    k, o, i, one_hot = shape
    g = torch.zeros(k, 1, 0, 1, o, dtype=dtype, device=device)
    if one_hot:
        return Tap(rows.OneHot(torch.zeros(k, 0, 1, dtype=torch.int64, device=device), i, dtype), g)
    return Tap(torch.zeros(k, 0, 1, i, dtype=dtype, device=device), g)


def update(
    factors: Taps, taps: Mapping[str, AnyTap], rho: Tensor, mean: Mean, inverting: bool = True, *, grouped: Any
) -> Estimated:
    """Replace the statistics by the newest ones, in the precision of the state, at least float32."""
    del rho, mean, inverting
    dtypes = {key: tap.g.dtype for key, tap in factors.items()}
    new = {key: compact(tap.to(dtypes[key])) for key, tap in taps.items()}
    for group in grouped(new).values():
        _check_size(group)
    return Estimated(new, {key: tree.finite(tap) for key, tap in new.items()}, {})


def plain(tap: Tap) -> Tap:
    """Return the tap with `a` as a tensor or one-hot, so that the structure of the state is fixed."""
    return tap if isinstance(tap.a, rows.OneHot) else Tap(rows.dense(tap.a), tap.g)


def compact(tap: AnyTap) -> Tap:
    """Return the smaller of rows and per-example gradients; the latter as a tap with `a = vec(W)` and `g = 1`.

    With several samples the rows are kept, because the samples share `a`.
    """
    k, s, n, t, o, i = tap.sizes
    if s > 1 or o * i >= t * (o + i) or isinstance(tap.window(slice(0, 1)).whole().a, rows.OneHot):
        return plain(tap.whole())
    W = example_matrices(tap).reshape(1, n, 1, k * o * i)
    return Tap(W, W.new_ones(1, 1, n, 1, 1))


def _check_size(taps: Taps) -> None:
    smaller = min(_columns(taps), _parameters(taps))
    if smaller > UNKNOWNS:
        raise HyperparameterError(
            f"the exact natural gradient needs a system of {smaller:,} unknowns ({_columns(taps):,} examples and "
            f"samples, {_parameters(taps):,} parameters); the limit is {UNKNOWNS:,}. Use fewer columns: "
            'fisher="mc" with few samples instead of "type2", or a part of the batch; or solve it through the model: '
            "ng.implicit_fisher(params, x).solve(grads, damping)."
        )


def _columns(taps: Mapping[str, Tap]) -> int:
    sizes = next(iter(taps.values())).sizes
    return sizes.s * sizes.n


def _parameters(taps: Mapping[str, Tap]) -> int:
    return sum(tap.sizes.k * tap.sizes.o * tap.sizes.i for tap in taps.values())


# systems ---------------------------------------------------------------------------------------------------------


def invert(factors: Taps, damping: Float[Tensor, ""], *, grouped: Any) -> Estimated:
    """Factorise the smaller system of every group of blocks by Cholesky."""
    systems: dict[str, System] = {}
    ok: dict[str, Tensor] = {}
    measured: dict[str, dict[str, Tensor]] = {"jitter": {}, "condition": {}}
    for name, taps in grouped(factors).items():
        systems[name], sound, found = _system(dict(taps), damping)
        ok |= dict.fromkeys(taps, sound)
        for what, value in found.items():
            measured[what] |= dict.fromkeys(taps, value)
    return Estimated(systems, ok, measured)


def _system(taps: Taps, damping: Float[Tensor, ""]) -> tuple[System, Tensor, dict[str, Tensor]]:
    matrix = (_fisher(taps) if _few_parameters(taps) else _grams(taps)).unsqueeze(0)
    # the floor is determined by the precision of the statistics
    shift, jitter = floored(matrix, damping.expand(1))
    factor, failed = torch.linalg.cholesky_ex(add_diagonal(matrix.double(), shift.double()))
    sound = (failed == 0).all() & torch.isfinite(factor.sum()) & (shift > 0).all()
    measured = {"jitter": jitter, "condition": condition(factor).squeeze(0)}
    return System(taps, factor.squeeze(0), shift.squeeze(0).to(damping.dtype)), sound, measured


def _few_parameters(taps: Mapping[str, Tap]) -> bool:
    return _parameters(taps) <= _columns(taps)


def _grams(taps: Mapping[str, Tap]) -> Float[Tensor, "m m"]:
    return torch.stack([gram(tap) for tap in taps.values()]).sum(0) / examples(taps)


def _fisher(taps: Mapping[str, Tap]) -> Float[Tensor, "p p"]:
    U = torch.cat([example_matrices(tap).flatten(2).flatten(0, 1) for tap in taps.values()], -1)
    return U.mT @ U / examples(taps)


def examples(taps: Mapping[str, Tap]) -> int:
    """Return N, at least 1: the Fisher without examples is zero."""
    return max(1, next(iter(taps.values())).sizes.n)


def precondition(inverses: dict[str, System], gradients: Mapping[str, Tensor | Tap], inner: bool) -> Preconditioned:
    """Return `(F + λI)⁻¹ ∇`, group by group."""
    solved: dict[str, Tensor] = {}
    for system in inverses.values():
        solved |= _solve(system, {key: gradients[key] for key in system.taps})
    products = [_inner(gradient, solved[key]) for key, gradient in gradients.items()] if inner else []
    return Preconditioned(solved, torch.stack(products).sum() if inner else ())


def _inner(gradient: Tensor | Tap, z: Tensor) -> Float[Tensor, ""]:
    if isinstance(gradient, Tensor):
        return (gradient * z).sum()
    return inner_products(gradient, z.to(gradient.g.dtype)).sum() / gradient.sizes.n


def as_matrix(gradient: Tensor | Tap) -> Tensor:
    """Return a gradient as its matrix, also if it is given as a loss tap."""
    if isinstance(gradient, Tensor):
        return gradient
    _, s, n, _, _, _ = gradient.sizes
    return combine(gradient, gradient.g.new_full((s, n), 1 / n))


def _solve(system: System, gradients: Mapping[str, Tensor | Tap]) -> dict[str, Tensor]:
    taps, factor, damping = system
    dtype = next(iter(taps.values())).g.dtype
    v = {key: gradient.to(dtype) for key, gradient in gradients.items()}
    if _few_parameters(taps):
        matrices = {key: as_matrix(V) for key, V in v.items()}
        flat = torch.cat([V.reshape(-1) for V in matrices.values()]).double()
        parts = _cholesky_solve(factor, flat).to(dtype).split([V.numel() for V in matrices.values()])
        return {key: part.reshape(V.shape) for (key, V), part in zip(matrices.items(), parts, strict=True)}
    root = math.sqrt(examples(taps))
    v = {key: V if _rows_serve(taps[key], V) else as_matrix(V) for key, V in v.items()}
    rhs = total(taps, v) / root
    c = _cholesky_solve(factor, rhs.reshape(-1).double()).to(dtype).reshape(rhs.shape) / root
    return {key: _remainder(V, taps[key], c) / damping.to(dtype) for key, V in v.items()}


def _rows_serve(tap: Tap, V: Tensor | Tap) -> bool:
    """Return True if the inner products can be computed from rows of both taps, without forming W or ∇."""
    if isinstance(V, Tensor):
        return False
    mine, other = tap.sizes, V.sizes
    return (mine.k, mine.o, mine.i) == (other.k, other.o, other.i) and mine.t == other.t == other.s == 1


def _remainder(V: Tensor | Tap, tap: Tap, c: Float[Tensor, "s n"]) -> Float[Tensor, "k o i"]:
    """Return `V − Σ_sn c_sn W_sn`, in one product for a gradient given as a loss tap."""
    if isinstance(V, Tensor):
        return V - combine(tap, c).reshape(V.shape)
    g = torch.cat([V.g.squeeze(1) / V.sizes.n, torch.einsum("sn,ksnto->knto", -c, tap.g)], 1)
    return rows.outer(g, torch.cat([rows.dense(V.a), rows.dense(tap.a)], 1))


def _cholesky_solve(factor: Float[Tensor, "m m"], rhs: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    return torch.cholesky_solve(rhs.unsqueeze(-1), factor).squeeze(-1)


def total(taps: Mapping[str, Tap], v: Mapping[str, Tensor | Tap]) -> Float[Tensor, "s n"]:
    """Return `Σ_l ⟨W_sn, V⟩` over the layers of a group, which share examples and samples."""
    return torch.stack([_overlaps(tap, v[key]) for key, tap in taps.items()]).sum(0)


def _overlaps(tap: Tap, V: Tensor | Tap) -> Float[Tensor, "s n"]:
    """Return `⟨W_sn, V⟩`; for a loss tap, the mean of the inner products with its examples."""
    if isinstance(V, Tap):
        return gram(tap, V).reshape(tap.sizes.s, tap.sizes.n, -1).mean(-1)
    return inner_products(tap, _shaped(V, tap).to(tap.g.dtype))


def _shaped(V: Tensor, tap: Tap) -> Float[Tensor, "k o i"]:
    """Reshape a matrix to the shape of a tap that may be compact."""
    sizes = tap.sizes
    return V.reshape(sizes.k, sizes.o, sizes.i)


# the Fisher itself -----------------------------------------------------------------------------------------------


def matvec(factors: Taps, v: Matrices, *, grouped: Any) -> dict[str, Tensor]:
    """Return `F v`."""
    product: dict[str, Tensor] = {}
    for taps in grouped(factors).values():
        c = total(taps, v) / examples(taps)
        product |= {key: combine(tap, c).reshape(v[key].shape) for key, tap in taps.items()}
    return product


def overlap(factors: Taps, taps: Mapping[str, AnyTap]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return `⟨F, F̂⟩` and `‖F̂‖²` of every diagonal block, where F̂ is the Fisher of the state's statistics."""

    def of(mine: Tap, other: AnyTap) -> tuple[Tensor, Tensor]:
        n = max(1, mine.sizes.n)
        cross = gram(mine, _like(mine, other.to(mine.g.dtype))).double().square().sum() / (n * other.sizes.n)
        return cross, (gram(mine).double() / n).square().sum()

    return {key: of(factors[key], tap) for key, tap in taps.items()}


def trace(factors: Taps, shapes: Mapping[str, Shape]) -> Float[Tensor, ""]:
    """Return the mean over examples of the squared gradient norms."""
    del shapes
    filled = [tap for tap in factors.values() if tap.sizes.n]  # before the first update there is no example
    sums = [squares(tap.to(torch.float64)).sum() for tap in filled] or [next(iter(factors.values())).g.new_zeros(())]
    return torch.stack(sums).sum() / examples(factors)


def spectrum(factors: Taps, shapes: Mapping[str, Shape], *, grouped: Any) -> Float[Tensor, " p"]:
    """Return all eigenvalues of F."""
    del shapes
    return torch.cat([eigenvalues(taps) for taps in grouped(factors).values()])


def logdet(inverses: dict[str, System]) -> Float[Tensor, ""]:
    r"""Return $-\log\det(F + \lambda I)$, from the factorised system, and λI on its complement."""

    def of(system: System) -> Tensor:
        solved = 2 * system.factor.diagonal().log().sum()
        return -(solved + (_parameters(system.taps) - len(system.factor)) * system.damping.double().log())

    return torch.stack([of(system) for system in inverses.values()]).sum()


def _like(mine: Tap, other: AnyTap) -> AnyTap:
    """Convert other statistics of the layer to the form of the state's."""
    k, s, n, _, o, i = other.sizes
    if (k, o, i) == (mine.sizes.k, mine.sizes.o, mine.sizes.i):
        return other
    W = example_matrices(other).reshape(1, s * n, 1, k * o * i)
    return Tap(W, W.new_ones(1, 1, s * n, 1, 1))
