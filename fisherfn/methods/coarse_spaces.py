r"""Coarse spaces of two-level methods: one or more rows per layer, and the matrix of the Fisher on them.

**nicolaides**: ones (Nicolaides 1987), including the bias column; for several rows, ones on equal parts of the layer's
entries. **spectral**: eigenvectors $q_G q_A^\top$ of the smallest eigenvalues of the fine method's
leading Kronecker product. **residual**: $M (\nabla - F_\bullet M \nabla)$, a new row at every step, computed in
`two_level.py`. **tselepidis**: ones, with the published matrix of cross-layer Kronecker factors.

Rows are orthonormal: within a layer by Gram–Schmidt, between layers by their supports. A row is stored flat, groups
first and then row-major.

k group, s sample, n example, m example and sample, t position, i input, o output, l and j layer, p row of a layer,
q row of any layer, d entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import rows
from fisherfn.errors import HyperparameterError
from fisherfn.linalg import kron
from fisherfn.linalg.kron import Pair
from fisherfn.linalg.solve import floored, psd_eigh
from fisherfn.lowrank import examples, inner_products
from fisherfn.methods.exact import Taps
from fisherfn.taps import Tap
from fisherfn.types import PyTree

COARSE = ("nicolaides", "residual", "tselepidis", "spectral")

CUTOFF = 1e-5
"""Relative length below which the part of a row outside the span of the previous rows is treated as zero."""

Rows = dict[str, Float[Tensor, "p d"]]


class Space(NamedTuple):
    """A coarse space.

    Attributes:
        rows: rows of every layer, orthonormal, zero if they were dependent.
        C: `⟨W_sn, R_p⟩` of every example and row, which determines F on the space; empty if it is not used.
        factor: Cholesky factor of F_c.
        images: M times the rows, for the balanced form.
    """

    rows: Rows
    C: Float[Tensor, "m q"]
    factor: Float[Tensor, "q q"]
    images: Rows | tuple[()] = ()


def restricted(space: Space, v: Mapping[str, Tensor]) -> Float[Tensor, " q"]:
    """Return `R₀ v`."""
    return torch.cat([R @ v[key].flatten() for key, R in space.rows.items()]).double()


def lifted(rows: Rows, beta: Float[Tensor, " q"], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `R₀ᵀ β`, in the shapes of `like`."""
    parts = beta.split([R.shape[0] for R in rows.values()])
    pairs = zip(rows.items(), parts, strict=True)
    return {key: (part.to(R.dtype) @ R).reshape(like[key].shape) for (key, R), part in pairs}


def solved(space: Space, rhs: Float[Tensor, " q"]) -> Float[Tensor, " q"]:
    """Return `F_c⁻¹ rhs`."""
    return torch.cholesky_solve(rhs.unsqueeze(-1), space.factor).squeeze(-1)


def ones(taps: Taps, vectors: int) -> Rows:
    """Return rows of ones: row p is 1 on the p-th part of the layer's entries."""

    def of(tap: Tap) -> Float[Tensor, "p d"]:
        k, _, _, _, o, i = tap.sizes
        part = torch.arange(k * o * i, device=tap.g.device) * vectors // (k * o * i)
        return torch.stack([part == p for p in range(vectors)]).to(tap.g.dtype)

    return {key: of(tap) for key, tap in taps.items()}


def spectral(factors: PyTree, vectors: int) -> Rows:
    """Return the eigenvectors `q_G q_Aᵀ` of each layer's leading product G ⊗ A with the smallest eigenvalues."""

    def of(pair: Pair) -> Float[Tensor, "p d"]:
        of_A, of_G = psd_eigh(pair.A), psd_eigh(pair.G)
        values = of_G.values.unsqueeze(-1) * of_A.values.unsqueeze(-2)
        smallest = values.flatten().topk(min(vectors, values.numel()), largest=False).indices
        single = torch.zeros(vectors, values.numel(), dtype=values.dtype, device=values.device)
        count = torch.arange(smallest.shape[0], device=values.device).unsqueeze(-1)
        chosen = single.index_put((count.squeeze(-1), smallest), values.new_ones(()))
        return torch.stack(
            [
                kron.right(kron.left(of_G.vectors, row), kron.transpose(of_A.vectors)).flatten()
                for row in chosen.reshape(vectors, *values.shape)
            ]
        )

    by_layer = factors if isinstance(factors, Mapping) else {"all": factors}
    return {key: of(_leading(block)) for key, block in by_layer.items()}


def _leading(block: PyTree) -> Pair:
    found: Any = getattr(block, "first", block)
    if not hasattr(found, "A") or not hasattr(found, "G"):
        raise HyperparameterError(
            "the spectral coarse space needs the Kronecker factors of the fine method, and this method has none: "
            'use coarse="nicolaides".'
        )
    return Pair(found.A, found.G)


def orthonormal(R: Float[Tensor, "p d"]) -> Float[Tensor, "p d"]:
    """Orthonormalise by two passes of Gram–Schmidt; a row that depends on the previous ones becomes zero."""
    found: list[Tensor] = []
    for row in R:
        length = row.norm()
        rest = row
        for _ in range(2):
            for other in found:
                rest = rest - (other * rest).sum() * other
        norm = rest.norm()
        found.append(torch.where(norm > CUTOFF * length, rest / norm, 0.0))
    return torch.stack(found)


def space(vectors: Rows, taps: Taps, damping: Float[Tensor, ""]) -> Space:
    """Return the space of orthonormal rows, with the factor of `F_c = CᵀC/N + λI`."""
    basis = {key: orthonormal(R) for key, R in vectors.items()}
    C = coefficients(taps, basis)
    # a dependent row is zero; 1 on its diagonal entry keeps F_c definite and its coefficient zero
    alive = torch.cat([R.square().sum(-1) > 0.5 for R in basis.values()])
    F_c = C.mT @ C / examples(taps)
    # a row on which F is zero leaves noise: λ is at least the working precision of the statistics
    λ = floored(F_c.unsqueeze(0), damping.expand(1), next(iter(basis.values())).dtype)[0].double()
    return Space(basis, C, _cholesky(F_c, torch.where(alive, λ, 1.0)))


def coefficients(taps: Taps, basis: Rows) -> Float[Tensor, "m q"]:
    """Return `⟨W_sn^l, R_{l,p}⟩`, in float64."""
    shapes = {key: (tap.sizes.k, tap.sizes.o, tap.sizes.i) for key, tap in taps.items()}
    columns = [inner_products(taps[key], row.reshape(shapes[key])).flatten() for key, R in basis.items() for row in R]
    return torch.stack(columns, -1).double()


def _cholesky(matrix: Float[Tensor, "q q"], diagonal: Float[Tensor, " q"]) -> Float[Tensor, "q q"]:
    """Return the Cholesky factor, or NaN if the matrix is not positive definite."""
    factor, failed = torch.linalg.cholesky_ex(matrix + torch.diag_embed(diagonal))
    return torch.where(failed == 0, factor, torch.nan)


def published(taps: Taps, damping: Float[Tensor, ""]) -> Space:
    """Return the published space: ones, with `F_c[l, j] = (Σ E[a_l a_jᵀ]) (Σ E[g_l g_jᵀ])` for layers l and j, plus λI.

    Each Σ runs over the entries of its matrix. The rows are not normalised. Positions are averaged in a and summed in
    g, so that maps of different size need no interpolation. The groups of a layer count as one, with their exact
    gradient.
    """
    inputs, outputs = zip(*(_sums(tap) for tap in taps.values()), strict=True)
    a, g = torch.stack(inputs).double(), torch.stack(outputs).double()
    n = examples(taps)
    F_c = (a @ a.mT / n) * (torch.einsum("lsn,jsn->lj", g, g) / n)
    λ = floored(F_c.unsqueeze(0), damping.expand(1), inputs[0].dtype)[0].double()
    return Space(ones(taps, 1), a.new_zeros(0, len(taps)), _cholesky(F_c, λ.expand(len(taps))))


def _sums(tap: Tap) -> tuple[Float[Tensor, " n"], Float[Tensor, "s n"]]:
    """Return the sums of a layer's inputs (averaged over positions) and of its output-gradients, per example."""
    k, _, n, t, o, i = tap.sizes
    if k == 1:
        return rows.total(tap.a).sum((0, 2)) / t, tap.g.sum((0, 3, 4))
    return tap.g.new_ones(n), inner_products(tap, tap.g.new_ones(k, o, i))
