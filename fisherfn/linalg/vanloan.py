r"""Best Kronecker approximations in the Frobenius norm: leading singular triplets of the rearranged block.

From a start $q_1$ the vectors $q_j$ are $Z^\top Z\, q_{j-1}$, orthonormalised against all previous ones: the right
vectors of Golub & Kahan's bidiagonalisation (1965), whose span contains the result of power iteration. Without
reorthogonalisation converged triplets return as copies; against the q is enough (Simon & Zha 2000). The eigenpairs
(σ², y) of $T = (ZQ)^\top ZQ$ give the best triplets of the space, $v = Q y$ and $\sigma u = Z Q y$.

One start finds only one direction per singular value. When its space is exhausted, a second start vector continues, so
that two equal singular values give two triplets. The number of steps is fixed, because nothing may depend on values; a
space that stays exhausted continues with zeros.

k group, j step, r term.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn.linalg import kron
from fisherfn.linalg.kron import Pair
from fisherfn.linalg.rearranged import Element, Rearranged


class Triplet(NamedTuple):
    """A singular triplet `u vᵀ` with `u = Z v` and v of length 1; σ², and the residual relative to σ."""

    u: Element
    v: Element
    square: Float[Tensor, " k"]
    residual: Float[Tensor, " k"]


def leading(
    Z: Rearranged, steps: int, rank: int = 1, after: tuple[Triplet, Triplet] | None = None
) -> tuple[Triplet, ...]:
    """Compute the `rank` (one or two) leading triplets.

    Args:
        Z: the block.
        steps: number of applications of Z and its transpose, at least `rank`.
        rank: number of triplets.
        after: a known triplet, to which the others are orthogonal, and a guess of the next one as start.
    """
    space = _krylov(Z, steps, rank > 1, after)
    T = space.images.flatten(2).double() @ space.image_duals.flatten(2).double().mT
    sound = torch.isfinite(T.sum((-2, -1), keepdim=True))  # group by group: groups may belong to several blocks
    values, Y = torch.linalg.eigh(torch.where(sound, (T + T.mT) / 2, torch.eye(steps, dtype=T.dtype, device=T.device)))
    Y = torch.where(sound, Y, torch.nan)
    triplets = []
    for r in range(1, rank + 1):
        y = Y[..., -r]
        residual = space.beyond * y[:, -1].abs() * _inverse(values[:, -r], 1e-15 * values[:, -1])
        u, v = _combined(space.images, y), _combined(space.basis, y)
        triplets.append(Triplet(u, v, values[:, -r].clamp(min=0), residual))
    return tuple(triplets)


def by_block(triplets: Sequence[Triplet], groups: Sequence[int]) -> list[tuple[Triplet, ...]]:
    """Split triplets that were computed together into blocks with these numbers of groups."""
    parts = [zip(*(field.split(list(groups)) for field in triplet), strict=True) for triplet in triplets]
    return [tuple(Triplet(*fields) for fields in block) for block in zip(*parts, strict=True)]


def recompressed(sums: Sequence[Sequence[Pair]], weights: Sequence[Tensor], rank: int) -> list[tuple[Pair, ...]]:
    r"""Return the best sum of `rank` Kronecker products for $\sum_r w_r\, G_r \otimes A_r$, an average of operators.

    With the Gram matrices of the A and of the G, with one row per term, $K_G = H H^\top$ and
    $M = \mathrm{diag}(w)$: eigenpairs (σ², y) of $H^\top M K_A M H$ give the coefficients $c = M H y / \sigma$ of the A
    and $d = M K_A c / \sigma$ of the G. Averaging factor by factor would give another operator, and the
    arbitrary sign of the second pair could cancel it. Both factors get the norm √σ. The sign is chosen by tr G ≥ 0,
    which makes a leading pair PSD.

    Args:
        sums: the terms of each block; the small matrices of all blocks are solved together.
        weights: w, the same for all blocks.
        rank: number of terms of the result.
    """
    A, G = ([torch.stack([getattr(pair, side) for pair in terms], 1) for terms in sums] for side in ("A", "G"))
    K_A, K_G = torch.cat([_gram(of_block) for of_block in A]), torch.cat([_gram(of_block) for of_block in G])
    M = torch.stack(list(weights)).to(K_A.dtype).unsqueeze(-1)
    sound = torch.isfinite((K_A + K_G).sum((-2, -1), keepdim=True) + M.sum())  # group by group
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
    """Return `⟨F_r, F_q⟩`, with sums of rows in float64."""
    if factors.ndim == 3:
        return factors.double() @ factors.double().mT
    by_row = factors.transpose(1, 2)
    return (by_row @ by_row.mT).double().sum(1)


def _mixed(factors: Float[Tensor, "k r *d"], c: Float[Tensor, "k r q"]) -> Float[Tensor, "k q *d"]:
    """Return `Σ_r c_rq F_r`."""
    flat = c.mT.to(factors.dtype) @ factors.flatten(2)
    return flat.reshape(*flat.shape[:2], *factors.shape[2:])


class _Krylov(NamedTuple):
    """An orthonormal basis q, Z q, their duals, and the length of the vector after the last q."""

    basis: Float[Tensor, "k j *d"]
    images: Float[Tensor, "k j *e"]
    image_duals: Float[Tensor, "k j *e"]
    beyond: Float[Tensor, " k"]


def _krylov(Z: Rearranged, steps: int, restart: bool, after: tuple[Triplet, Triplet] | None) -> _Krylov:
    """Compute the Krylov space; a known triplet comes first among the q."""
    if after is None:
        q, dual, length = _unit(Z, Z.start(0), 0.0)
        largest = torch.zeros_like(length)
        Q = D = q[:, None][:, :0].flatten(2)
    else:
        known, guess = after
        largest = known.square
        Q, D = _column(known.v), _column(Z.right_dual(known.v))
        q, dual, length = _unit(Z, _orthogonal(guess.v, Q, D, Z.rounding), 1e-6)
    before = Q.shape[1]
    second = _unit(Z, Z.start(1), 0.0)[0] if restart else None
    images, image_duals = [], []
    for step in range(steps):
        Q, D = torch.cat([Q, _column(q)], 1), torch.cat([D, _column(dual)], 1)
        images.append(Z.left(dual))
        image_duals.append(Z.left_dual(images[-1]))
        r = Z.right(image_duals[-1])
        again = largest * (length == 0) if second is not None and step else None
        if second is not None and again is not None:
            r = r + kron.times(second, again)
        square = kron.dot(images[-1], image_duals[-1]).clamp(min=0)
        largest = torch.maximum(largest, square)
        # numerical noise in Z q, mostly along u₁, returns through Zᵀ amplified by σ₁
        square = square if again is None else square + again
        q, dual, length = _unit(Z, _orthogonal(r, Q, D, Z.rounding), Z.rounding * (largest * square).sqrt())
    basis = Q[:, before:].reshape(Q.shape[0], steps, *q.shape[1:])
    return _Krylov(basis, torch.stack(images, 1), torch.stack(image_duals, 1), beyond=length)


def _orthogonal(r: Element, Q: Float[Tensor, "k j d"], D: Float[Tensor, "k j d"], rounding: float) -> Element:
    """Return the part of r that is orthogonal to the q, whose duals are D."""
    rest = r.flatten(1).unsqueeze(1)  # as a row: products of many matrices with one column each are slow
    once = torch.finfo(r.dtype).eps <= 1e-8 * rounding  # once is enough if the rest is never much shorter
    for _ in range(1 if once else 2):
        rest = torch.baddbmm(rest, rest @ D.mT, Q, alpha=-1)
    return rest.reshape(r.shape)


def _column(x: Element) -> Float[Tensor, "k 1 d"]:
    return x.flatten(1).unsqueeze(1)


def _unit(Z: Rearranged, x: Element, floor: Tensor | float) -> tuple[Element, Element, Float[Tensor, " k"]]:
    """Normalise an element of the output side and its dual; return both and the length, or zeros below the floor."""
    dual = Z.right_dual(x)
    length = _norm(x, dual)
    inverse = _inverse(length, floor)
    return kron.times(x, inverse), kron.times(dual, inverse), length * (inverse > 0)


def _norm(x: Element, dual: Element) -> Float[Tensor, " k"]:
    return kron.dot(x, dual).clamp(min=0).sqrt()


def _inverse(x: Tensor, floor: Tensor | float) -> Tensor:
    """Return 1/x, and 0 if x is not above the floor."""
    return torch.where(x > floor, 1 / x, 0.0)


def _combined(basis: Float[Tensor, "k j *d"], y: Float[Tensor, "k j"]) -> Float[Tensor, "k *d"]:
    """Return `Σ_j y_j q_j`."""
    return (y.to(basis.dtype).unsqueeze(1) @ basis.flatten(2)).reshape(basis.shape[0], *basis.shape[2:])
