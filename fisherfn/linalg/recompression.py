r"""The best sum of few Kronecker products for a weighted sum of many: averages of operators, not of factors.

With $\langle G_1 \otimes A_1, G_2 \otimes A_2 \rangle = \langle A_1, A_2 \rangle \langle G_1, G_2 \rangle$ the sum
$\sum_r w_r\, G_r \otimes A_r$ is the matrix $\sum_r w_r\, \mathrm{vec}(A_r) \mathrm{vec}(G_r)^\top$ of low rank, whose
singular triplets come from two Gram matrices with one row per term.

k group, r term of the sum, q term of the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn.linalg.kron import Pair


def recompressed(sums: Sequence[Sequence[Pair]], weights: Sequence[Tensor], rank: int) -> list[tuple[Pair, ...]]:
    r"""Return the best sum of `rank` Kronecker products for $\sum_r w_r\, G_r \otimes A_r$, an average of operators.

    With the Gram matrices of the A and of the G, with one row per term, $K_G = H H^\top$ and
    $M = \mathrm{diag}(w)$: eigenpairs (σ², y) of $H^\top M K_A M H$ give the coefficients $c = M H y / \sigma$ of the A
    and $d = M K_A c / \sigma$ of the G. Averaging factor by factor would give another operator, and the
    arbitrary sign of the second pair could cancel it. Both factors get the norm √σ. The sign is chosen by tr G ≥ 0,
    which makes a leading pair PSD.

    Args:
        sums: the terms of each block; the small matrices of all blocks are solved together.
        weights: w, for each term one number for all blocks, or one per block.
        rank: number of terms of the result.
    """
    A, G = ([torch.stack([getattr(pair, side) for pair in terms], 1) for terms in sums] for side in ("A", "G"))
    K_A, K_G = torch.cat([_gram(of_block) for of_block in A]), torch.cat([_gram(of_block) for of_block in G])
    each = torch.stack([w.expand(len(sums)) for w in weights], -1).to(K_A.dtype)  # one row per block
    M = torch.cat([w.expand(len(of_block), -1) for w, of_block in zip(each, A, strict=True)]).unsqueeze(-1)
    sound = torch.isfinite((K_A + K_G + M).sum((-2, -1), keepdim=True))  # group by group
    squares, vectors = _psd(torch.where(sound, K_G, 0.0))
    MH = M * vectors * squares.sqrt().unsqueeze(-2)
    squares, y = _psd(torch.where(sound, MH.mT @ K_A @ MH, 0.0))
    sigma = squares[..., -rank:].sqrt().unsqueeze(-2)
    inverse = torch.where(sigma > 0, 1 / sigma, 0.0)
    c = MH @ y[..., -rank:] * inverse
    d = M * (K_A @ c) * inverse
    traces = torch.cat([(g if g.ndim == 3 else g.diagonal(dim1=-2, dim2=-1)).sum(-1) for g in G]).unsqueeze(1)
    half = torch.where(traces.double() @ d < 0, -1.0, 1.0) * torch.where(sound, sigma.sqrt(), torch.nan)
    groups = [len(of_block) for of_block in A]
    mixed_A, mixed_G = (
        [_mixed(factors, part) for factors, part in zip(side, coefficients.split(groups), strict=True)]
        for side, coefficients in ((A, c * half), (G, d * half))
    )
    return [tuple(Pair(a[:, -r], g[:, -r]) for r in range(1, rank + 1)) for a, g in zip(mixed_A, mixed_G, strict=True)]


def _psd(matrix: Float[Tensor, "k r r"]) -> tuple[Float[Tensor, "k r"], Float[Tensor, "k r r"]]:
    """Decompose small finite PSD matrices in float64; eigenvalues that are numerical noise are set to zero."""
    values, vectors = torch.linalg.eigh(matrix)
    return torch.where(values > 1e-15 * values[..., -1:], values, 0.0), vectors


def _gram(factors: Float[Tensor, "k r *d"]) -> Float[Tensor, "k r r"]:
    """Return `⟨F_r, F_q⟩`, in float64: in float32 the square of a small factor is zero."""
    flat = factors.flatten(2).double()
    return flat @ flat.mT


def _mixed(factors: Float[Tensor, "k r *d"], c: Float[Tensor, "k r q"]) -> Float[Tensor, "k q *d"]:
    """Return `Σ_r c_rq F_r`."""
    flat = c.mT.to(factors.dtype) @ factors.flatten(2)
    return flat.reshape(*flat.shape[:2], *factors.shape[2:])
