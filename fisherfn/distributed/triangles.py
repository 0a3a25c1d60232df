"""Symmetric matrices on the wire: the numbers of one triangle, moved as blocks instead of one by one.

With h = ⌈d/2⌉ and l = ⌊d/2⌋, a symmetric matrix is

    M = [ P  Sᵀ ]     P h × h, S l × h, Q l × l,
        [ S  Q  ]

and the lower triangle of P and the upper triangle of Q together fill a rectangle of h × (l + 1):

    R = lower(P) + upper(Q), moved by one column to the right.

R and S have d (d + 1)/2 numbers. An index per number would take about ten times as long.

k group, d width.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def triangle(moment: Float[Tensor, "k d *d"]) -> Float[Tensor, "k m"]:
    """Return the different numbers of a symmetric matrix, `[k, d (d + 1) / 2]`; a diagonal as it is."""
    if moment.ndim < 3:
        return moment
    h = (moment.shape[-1] + 1) // 2
    P, S, Q = moment[:, :h, :h], moment[:, h:, :h], moment[:, h:, h:]
    R = moment.new_zeros(len(moment), h, S.shape[1] + 1)
    R[:, : S.shape[1], 1:] = Q.triu()
    # the lower triangle of P ends in the last column of R or before it
    R[:, :, :h] += P.tril()
    return torch.cat([R.flatten(1), S.flatten(1)], -1)


def filled(packed: Float[Tensor, "k m"], like: Float[Tensor, "k d *d"]) -> Float[Tensor, "k d *d"]:
    """Return the symmetric matrix with these numbers, in the shape of `like`; a diagonal as it is."""
    if like.ndim < 3:
        return packed
    k, d = like.shape[:2]
    h, l = (d + 1) // 2, d // 2
    R, S = packed.split([h * (l + 1), l * h], -1)
    R, S = R.view(k, h, l + 1), S.view(k, l, h)
    full = packed.new_empty(k, d, d)
    full[:, :h, :h] = _mirrored(R[:, :, :h].tril())
    full[:, h:, :h] = S
    full[:, :h, h:] = S.mT
    full[:, h:, h:] = _mirrored(R[:, :l, 1:].triu().mT)
    return full


def _mirrored(lower: Float[Tensor, "k d d"]) -> Float[Tensor, "k d d"]:
    """Return the symmetric matrix of a lower triangle."""
    return lower + lower.tril(-1).mT
