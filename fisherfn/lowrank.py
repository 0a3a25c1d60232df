r"""The sampled Fisher of coupled blocks as $F = U U^\top$, and damped systems with it in the smaller of two spaces.

$$U = \frac{1}{\sqrt N} [\dots \mathrm{vec}(W_{sn}) \dots], \qquad W_{sn} = \sum_t g_{snt} a_{nt}^\top$$

By the Woodbury identity,

$$(U U^\top + \lambda I)^{-1} v = \frac1\lambda \bigl(v - U (U^\top U + \lambda I)^{-1} U^\top v\bigr),$$

a system with one unknown per example and sample. Its Gram matrix is a sum over blocks, with the same examples and
samples in each; no W is formed for layers with few positions. If there are fewer parameters, the system is F + λI
itself. Systems are factorised in float64.

k group, s sample, n example, t position, i input, o output; columns m of U run over samples, then examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import rows
from fisherfn.gradients import Gradient, as_matrix
from fisherfn.linalg.solve import add_diagonal
from fisherfn.operators import check_size
from fisherfn.per_example import example_matrices, flat_example_matrices
from fisherfn.taps import WINDOW, AnyTap, Sizes, Tap
from fisherfn.types import Matrix

EIGENVALUES = 16384
"""The largest matrix whose eigenvalues are computed: 2 GiB in float64."""

HALVED = 512
"""Rows from which on a product of a matrix with its own transpose is made from halves: below, calls cost more."""

Taps = Mapping[str, Any]
"""The taps (`AnyTap`) of coupled blocks, by key."""


class System(NamedTuple):
    """A factorised system, `UᵀU + λI` in example space or `UUᵀ + λI` in parameter space, whichever is smaller."""

    taps: dict[str, Any]
    factor: Float[Tensor, "m m"]
    damping: Float[Tensor, ""]


# sizes -----------------------------------------------------------------------------------------------------------


def examples(taps: Taps) -> int:
    """Return N, at least 1: the Fisher without examples is zero."""
    sizes: Sizes = next(iter(taps.values())).sizes
    return max(1, sizes.n)


def columns(taps: Taps) -> int:
    """Return the number of columns of U: samples times examples."""
    sizes: Sizes = next(iter(taps.values())).sizes
    return sizes.s * sizes.n


def parameters(taps: Taps) -> int:
    """Return the number of rows of U."""
    return sum(tap.sizes.k * tap.sizes.o * tap.sizes.i for tap in taps.values())


def in_parameters(taps: Taps) -> bool:
    """Return True if the smaller system is that of the parameters."""
    return parameters(taps) <= columns(taps)


# products --------------------------------------------------------------------------------------------------------


def inner_products(tap: AnyTap, V: Float[Tensor, "k o i"]) -> Float[Tensor, "s n"]:
    """Return `⟨W_sn, V⟩` without forming W."""
    parts = [torch.einsum("ksnto,knto->sn", part.g, rows.times(part.a, V.mT)) for part in tap.windows()]
    return torch.cat(parts, 1)


def combine(tap: AnyTap, c: Float[Tensor, "s n"]) -> Float[Tensor, "k o i"]:
    """Return `Σ_sn c_sn W_sn` without forming W."""
    sums, start = [], 0
    for part in tap.windows():
        here = c[:, start : start + part.sizes.n]
        sums.append(rows.outer(_weighted(part.g, here), part.a))
        start += part.sizes.n
    return reduce(torch.add, sums)


def _weighted(g: Float[Tensor, "k s n t o"], c: Float[Tensor, "s n"]) -> Float[Tensor, "k n t o"]:
    """Return `Σ_s c_sn g_sn`."""
    if g.shape[1] == 1:
        return g.squeeze(1) * c.reshape(-1, 1, 1)
    return torch.einsum("sn,ksnto->knto", c, g)


def gram(tap: AnyTap, other: AnyTap | None = None) -> Float[Tensor, "m p"]:
    """Return `⟨W_sn, W_rm⟩` of a tap with itself or with another of the same layer.

    Rows run over samples, then examples. With few positions the result is `Σ_k Σ_tt' (g gᵀ) ∘ (a aᵀ)`, without forming
    W; otherwise some rows of W are formed at a time. Neither needs memory of the order (N T)².
    """
    x = tap.whole()
    y = x if other is None else other.whole()
    k, s, n, t, o, i = x.sizes
    u = y.sizes.t
    if x.one_hot or t * u * (o + i) < o * i:
        step = max(1, WINDOW // max(1, k * s * t * y.sizes.s * y.sizes.n * u))
        parts = [_pairs(x.window(slice(at, at + step)), y) for at in range(0, max(n, 1), step)]
        return torch.cat(parts, 1).flatten(0, 1)
    starts = range(0, o, max(1, WINDOW // max(1, k * s * n * i)))
    step = starts.step
    if other is None:
        return reduce(torch.add, (_own_products(_output_rows(x, at, step)) for at in starts))
    return reduce(torch.add, (_output_rows(x, at, step) @ _output_rows(y, at, step).mT for at in starts))


def _pairs(x: Tap, y: Tap) -> Float[Tensor, "s n m"]:
    """Return rows of the Gram matrix: `Σ_k Σ_tu (g_t · g_u)(a_t · a_u)`."""
    k, s, n, t, o, _ = x.sizes
    _, r, m, u, _, _ = y.sizes
    products = x.g.reshape(k, s * n * t, o) @ y.g.reshape(k, r * m * u, o).mT
    inputs = rows.gram(x.a, y.a)
    if s == t == r == u == 1:
        return (products * inputs).sum(0).unsqueeze(0) if k > 1 else products * inputs
    inputs = inputs.reshape(k, 1, n, t, 1, m, u)
    return (products.reshape(k, s, n, t, r, m, u) * inputs).sum((0, 3, 6)).reshape(s, n, r * m)


def _output_rows(tap: Tap, start: int, size: int) -> Float[Tensor, "m d"]:
    """Return some rows of every W, flat."""
    return example_matrices(Tap(tap.a, tap.g[..., start : start + size])).flatten(2).flatten(0, 1)


def _own_products(rows_: Float[Tensor, "m d"]) -> Float[Tensor, "m m"]:
    """Return `R Rᵀ`; of large ones, only the products on one side of the diagonal are computed."""
    if len(rows_) < HALVED:
        return rows_ @ rows_.mT
    upper, lower = rows_.split((len(rows_) + 1) // 2)
    across = upper @ lower.mT
    return torch.cat(
        [torch.cat([_own_products(upper), across], 1), torch.cat([across.mT, _own_products(lower)], 1)]
    )  # fmt: skip


def total(taps: Taps, v: Mapping[str, Gradient]) -> Float[Tensor, "s n"]:
    """Return `Σ_l ⟨W_sn, V⟩` over coupled blocks: √N times `Uᵀv`. A gradient may be given as a loss tap."""
    return torch.stack([_overlaps(tap, v[key]) for key, tap in taps.items()]).sum(0)


def _overlaps(tap: Any, V: Gradient) -> Float[Tensor, "s n"]:
    """Return `⟨W_sn, V⟩`; for a loss tap, the mean of the inner products with its examples."""
    if isinstance(V, Tap):
        return gram(tap, V).reshape(tap.sizes.s, tap.sizes.n, -1).mean(-1)
    return inner_products(tap, V.reshape(tap.sizes.k, tap.sizes.o, tap.sizes.i).to(tap.dtype))


# systems ---------------------------------------------------------------------------------------------------------


def smaller_matrix(taps: Taps) -> Float[Tensor, "m m"]:
    """Return F in parameter space, or `UᵀU`, which has the same nonzero eigenvalues, whichever is smaller."""
    if in_parameters(taps):
        U = flat_example_matrices(taps.values())
        return U.mT @ U / examples(taps)
    return reduce(torch.add, (gram(tap) for tap in taps.values())) / examples(taps)


def factorise(matrix: Float[Tensor, "m m"], damping: Float[Tensor, ""]) -> tuple[Float[Tensor, "m m"], Tensor]:
    """Return the Cholesky factor of `matrix + λI` in float64, and a mask that is true if it is valid."""
    factor, failed = torch.linalg.cholesky_ex(add_diagonal(matrix.double().unsqueeze(0), damping.double().reshape(1)))
    return factor.squeeze(0), (failed == 0).all() & torch.isfinite(factor.sum())


def solve(system: System, gradients: Mapping[str, Gradient]) -> dict[str, Tensor]:
    """Return `(F + λI)⁻¹ ∇`, one matrix per block."""
    taps, factor, damping = system
    dtype = next(iter(taps.values())).dtype
    v = {key: gradient.to(dtype) for key, gradient in gradients.items()}
    if in_parameters(taps):
        matrices = {key: as_matrix(V) for key, V in v.items()}
        flat = torch.cat([V.reshape(-1) for V in matrices.values()]).double()
        parts = _cholesky_solve(factor, flat).to(dtype).split([V.numel() for V in matrices.values()])
        return {key: part.reshape(V.shape) for (key, V), part in zip(matrices.items(), parts, strict=True)}
    root = math.sqrt(examples(taps))
    v = {key: V if _rows_serve(taps[key], V) else as_matrix(V) for key, V in v.items()}
    rhs = total(taps, v) / root
    c = _cholesky_solve(factor, rhs.reshape(-1).double()).to(dtype).reshape(rhs.shape) / root
    return {key: _remainder(V, taps[key], c) / damping.to(dtype) for key, V in v.items()}


def solve_own(
    system: System, c: Float[Tensor, "s n"], near: Mapping[str, Matrix] | None, inner: bool
) -> tuple[dict[str, Tensor], Tensor | tuple[()]]:
    r"""Return `(F + λI)⁻¹ (∇ + λφ)` for a gradient in the rows of F, `∇ = 1/N Σ c_sn W_sn`; with ⟨∇, nat⟩ if requested.

    With b = c/√N the gradient is Ub, so that

    $$(U U^\top + \lambda I)^{-1} (U b + \lambda\varphi) = \varphi + U y, \qquad
    y = (U^\top U + \lambda I)^{-1} (b - U^\top\varphi).$$

    Neither the gradient nor its inner products with the rows are computed, and without φ, ⟨∇, nat⟩ is `‖b‖² − λ bᵀy`.
    Nothing is divided by λ: `solve` returns (∇ − U…)/λ, whose rounding errors are of size ε‖∇‖/λ in the directions
    that no row has, and outweigh the step once λ is near ε tr F.
    """
    taps, factor, damping = system
    dtype, n = next(iter(taps.values())).dtype, examples(taps)
    if in_parameters(taps):
        v = {key: combine(tap, (c / n).to(dtype)) for key, tap in taps.items()}
        pull = {} if near is None else {key: (damping * near[key]).to(dtype) for key in v}
        nat = solve(system, {key: V + pull[key].reshape(V.shape) if pull else V for key, V in v.items()})
        return nat, torch.stack([(V * nat[key]).sum() for key, V in v.items()]).sum() if inner else ()
    b = c.double().reshape(-1) / math.sqrt(n)
    rhs = b if near is None else b - total(taps, near).reshape(-1).double() / math.sqrt(n)
    y = _cholesky_solve(factor, rhs)
    step = (y / math.sqrt(n)).to(dtype).reshape(c.shape)
    nat = {key: combine(tap, step) for key, tap in taps.items()}
    if near is None:
        return nat, (b @ b - damping.double() * (b @ y)).to(dtype) if inner else ()
    pulled = {key: near[key].reshape(W.shape).to(dtype) + W for key, W in nat.items()}
    return pulled, (b @ (total(taps, pulled).reshape(-1).double() / math.sqrt(n))).to(dtype) if inner else ()


def _rows_serve(tap: Any, V: Gradient) -> bool:
    """Return True if the inner products can be computed from rows of both taps, without forming W or ∇."""
    if isinstance(V, Tensor):
        return False
    mine, other = tap.sizes, V.sizes
    return (mine.k, mine.o, mine.i) == (other.k, other.o, other.i) and mine.t == other.t == other.s == 1


def _remainder(V: Gradient, tap: Any, c: Float[Tensor, "s n"]) -> Float[Tensor, "k o i"]:
    """Return `V − Σ_sn c_sn W_sn`, in one product for a gradient given as a loss tap."""
    if isinstance(V, Tensor):
        return V - combine(tap, c).reshape(V.shape)
    g = torch.cat([V.g.squeeze(1) / V.sizes.n, _weighted(tap.g, -c)], 1)
    return rows.outer(g, torch.cat([rows.dense(V.a), rows.dense(tap.a)], 1))


def _cholesky_solve(factor: Float[Tensor, "m m"], rhs: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    return torch.cholesky_solve(rhs.unsqueeze(-1), factor).squeeze(-1)


def logdet(system: System) -> Float[Tensor, ""]:
    """Return `log det(F + λI)`, from the factorised system, and λ on its complement."""
    complement = parameters(system.taps) - len(system.factor)
    return 2 * system.factor.diagonal().log().sum() + complement * system.damping.double().log()


def eigenvalues(taps: Taps) -> Float[Tensor, " p"]:
    """Return all eigenvalues of F in float64: those of the smaller of UᵀU and UUᵀ, and zeros.

    Raises:
        TooLargeError: the smaller one has more than `EIGENVALUES` rows.
    """
    check_size(min(columns(taps), parameters(taps)), "the smaller of Gram matrix and Fisher", EIGENVALUES)
    found = torch.linalg.eigvalsh(smaller_matrix({key: tap.to(torch.float64) for key, tap in taps.items()}))
    return torch.cat([found.clamp(min=0), found.new_zeros(parameters(taps) - len(found))])
