r"""Damped inverses of Kronecker products and of sums of two, for both forms of damping.

- **factored**: $(G + \frac{\sqrt\lambda}{\pi} I) \otimes (A + \pi \sqrt\lambda I)$, with π distributing λ between the
  factors (Martens & Grosse 2015, section 6.3); a second term is added undamped.
- **eigen**: adds λI, in the eigenvectors of the (leading) term.

Both raise a damping below the working precision of what it is added to (`floored`), and report the increase as jitter.

A sum $G \otimes A + D \otimes C$ with a positive definite first term is inverted by simultaneous diagonalisation: with
$K_A^\top A K_A = I$, $K_A^\top C K_A = \mathrm{diag}(w)$ and likewise for G and D,

$$(G \otimes A + D \otimes C)^{-1}\, X = K_G \bigl[(K_G^\top X K_A) \oslash (1 + w_G w_A^\top)\bigr] K_A^\top .$$

The second term is indefinite in general. Denominators below a floor are raised to it and counted. This changes only
the affected directions and keeps the inverse SPD. Absolute values of the spectra, which the original code takes, would
change every direction in which the two spectra differ in sign.

k group, i input, o output.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fisherfn import tree
from fisherfn.linalg import kron
from fisherfn.linalg.kron import Factor, Pair, Sum
from fisherfn.linalg.solve import Spectrum, add_diagonal, condition, denoised, eigh, floored, psd_eigh, spread
from fisherfn.operators import log_determinant
from fisherfn.types import PyTree

DAMPING_FORMS = ("factored", "eigen")
FLOOR = 0.1
"""Smallest denominator of a sum: no direction is amplified more than ten times as much as by the leading term."""


class Rotated(NamedTuple):
    """An inverse that is diagonal in a basis: `Q_G [(Q_Gᵀ X Q_A) ∘ scale] Q_Aᵀ`."""

    QA: Factor
    QG: Factor
    scale: Float[Tensor, "k o i"]


Inverse: TypeAlias = Pair | Rotated
"""A pair of inverses, or an inverse that is diagonal in a basis."""

Inverted: TypeAlias = tuple[Inverse, Tensor, dict[str, Tensor]]
"""An inverse, and per group a mask that is true if it is valid, and diagnostics."""


# applying --------------------------------------------------------------------------------------------------------


def apply(inverse: Inverse, grad: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
    """Multiply a gradient by the inverse."""
    if isinstance(inverse, Pair):
        return kron.matvec(inverse.G, inverse.A, grad)
    rotated = kron.right(kron.left(kron.transpose(inverse.QG), grad), inverse.QA)
    return rotated_back(inverse, rotated * inverse.scale)


def rotated_back(inverse: Rotated, W: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
    """Return `Q_G W Q_Aᵀ`."""
    return kron.right(kron.left(inverse.QG, W), kron.transpose(inverse.QA))


def logdet(inverse: Inverse) -> Float[Tensor, ""]:
    r"""Return the log-determinant of an inverse, all groups together.

    For a pair it is $d_{out} \log\det A^{-1} + d_{in} \log\det G^{-1}$. In a basis it is the sum of the scale's
    logarithms, plus the contribution of the basis if it is not orthonormal.
    """
    if isinstance(inverse, Pair):
        i, o = inverse.A.shape[-1], inverse.G.shape[-1]
        return (o * _logdet(inverse.A) + i * _logdet(inverse.G)).sum()
    i, o = inverse.QA.shape[-1], inverse.QG.shape[-1]
    # |det Q|: a basis may be a reflection
    volume = o * _logdet(inverse.QA, absolute=True) + i * _logdet(inverse.QG, absolute=True)
    return inverse.scale.log().sum() + 2 * volume.sum()


def trace(inverse: Rotated) -> Float[Tensor, ""]:
    """Return the trace of an inverse that is diagonal in a basis, orthonormal or not."""
    G, A = (Q.square() if kron.is_diagonal(Q) else Q.square().sum(-2) for Q in (inverse.QG, inverse.QA))
    return (G.unsqueeze(-1) * inverse.scale * A.unsqueeze(-2)).sum()


def _logdet(F: Factor, absolute: bool = False) -> Float[Tensor, " k"]:
    if kron.is_diagonal(F):
        return (F.abs() if absolute else F).log().sum(-1)
    return torch.linalg.slogdet(F).logabsdet if absolute else log_determinant(F)


def eigenvalues(pair: Pair) -> Float[Tensor, "k o i"]:
    """Return the eigenvalues `s rᵀ` of a product of two PSD factors."""
    return psd_eigh(pair.G).values.unsqueeze(-1) * psd_eigh(pair.A).values.unsqueeze(-2)


def in_double(factors: PyTree) -> PyTree:
    """Return the factors of a block in float64; PSD ones without the numerical noise of their own type."""
    if isinstance(factors, Pair):
        return Pair(denoised(factors.A), denoised(factors.G))
    if isinstance(factors, Sum):
        return Sum(in_double(factors.first), Pair(factors.second.A.double(), factors.second.G.double()))
    return tree.map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, factors)


# one term --------------------------------------------------------------------------------------------------------


def empty_pair(eye: Pair, damping: Tensor) -> Pair:
    """Return I/√λ for both factors."""
    return Pair(eye.A / damping.sqrt(), eye.G / damping.sqrt())


def empty_rotated(eye: Pair, damping: Tensor) -> Rotated:
    """Return I/λ in the standard basis."""
    (k, i), o = eye.A.shape[:1] + eye.A.shape[-1:], eye.G.shape[-1]
    return Rotated(eye.A, eye.G, eye.A.new_ones(k, o, i) / damping)


def factored(pair: Pair, damping: Float[Tensor, ""]) -> Inverted:
    """Return `(A + π√λ I)⁻¹` and `(G + √λ/π I)⁻¹`, by Cholesky."""
    shift_A, shift_G = shares(pair, damping)
    A, G = damped_inverse(pair.A, shift_A), damped_inverse(pair.G, shift_G)
    measured = {"jitter": torch.maximum(A.jitter, G.jitter), "condition": A.condition * G.condition}
    return Pair(A.inverse, G.inverse), A.ok & G.ok, measured


def shares(pair: Pair, damping: Float[Tensor, ""]) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """Return π√λ for A and √λ/π for G."""
    share, root = pi(pair.A, pair.G), damping.sqrt()
    return share * root, root / share


def pi(A: Factor, G: Factor) -> Float[Tensor, " k"]:
    r"""Return $\pi = \sqrt{(\mathrm{tr} A / d_{in}) / (\mathrm{tr} G / d_{out})}$, which distributes the damping.

    It balances the scales of the two factors (Martens & Grosse 2015, section 6.3); 1 if a factor is zero. The ratio is
    computed in float64, because dividing by a denormal number can overflow in float32.
    """
    a, g = kron.diagonal(A).double().mean(-1), kron.diagonal(G).double().mean(-1)
    return torch.where((a > 0) & (g > 0), (a / g).sqrt(), 1.0).to(A.dtype)


class InvertedFactor(NamedTuple):
    """An inverse, a mask that is true if it is valid, the jitter added beyond the damping, and its `condition`."""

    inverse: Factor
    ok: Bool[Tensor, "k"]
    jitter: Float[Tensor, "k"]
    condition: Float[Tensor, "k"]


def damped_inverse(matrix: Factor, damping: Float[Tensor, "k"]) -> InvertedFactor:
    r"""$(M + \delta I)^{-1}$ of symmetric PSD matrices by Cholesky, or of diagonals entry by entry.

    The damping is at least the working precision of M, $\epsilon\,\mathrm{tr} M$, because a smaller number is below the
    numerical noise of M and cannot make it positive definite. This floor costs nothing. Retries with increasing
    damping would cost one factorisation per attempt, and could not stop early under vmap. The increase is reported
    as jitter.
    """
    shift, jitter = floored(matrix, damping)
    if kron.is_diagonal(matrix):
        inverse = (matrix + shift.unsqueeze(-1)).reciprocal()
        return InvertedFactor(inverse, kron.finite(inverse), jitter, spread(inverse))
    factor, failed = torch.linalg.cholesky_ex(add_diagonal(matrix, shift))
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    pivots += pivots == 0  # of a failed factorisation: torch would raise for all that are inverted together
    inverse = torch.cholesky_inverse(factor).mT  # symmetric: its transpose is itself, with rows in order
    return InvertedFactor(inverse, (failed == 0) & kron.finite(inverse), jitter, condition(factor))


def eigen(pair: Pair, damping: Float[Tensor, ""]) -> Inverted:
    """Return `1 / (s rᵀ + λ)` in the eigenvectors of G and A."""
    r, s, denominator, jitter = _damped_spectrum(pair, damping)
    ok = r.ok & s.ok & (denominator.amin((1, 2)) > 0) & (damping >= 0)
    measured = {"jitter": jitter, "condition": spread(denominator.flatten(1))}
    return Rotated(r.vectors, s.vectors, denominator.reciprocal()), ok, measured


def _damped_spectrum(
    pair: Pair, damping: Float[Tensor, ""]
) -> tuple[Spectrum, Spectrum, Float[Tensor, "k o i"], Float[Tensor, " k"]]:
    """Return the spectra of A and G, `s rᵀ + λ` with the floor of λ, and the jitter."""
    r, s = psd_eigh(pair.A), psd_eigh(pair.G)
    values = s.values.unsqueeze(-1) * r.values.unsqueeze(-2)
    shift, jitter = floored(values.flatten(1), damping.expand(len(values)))
    return r, s, values + shift.reshape(-1, 1, 1), jitter


# two terms -------------------------------------------------------------------------------------------------------


def factored_sum(first: Pair, second: Pair, damping: Float[Tensor, ""], floor: float = FLOOR) -> Inverted:
    """Invert a sum by simultaneous diagonalisation of the damped first term and the second."""
    shift_A, shift_G = shares(first, damping)
    A, G = _pencil(first.A, second.A, shift_A), _pencil(first.G, second.G, shift_G)
    ratio = 1 + G.values.unsqueeze(-1) * A.values.unsqueeze(-2)
    ok = A.ok & G.ok & kron.finite(ratio)
    measured = {
        "jitter": torch.maximum(A.jitter, G.jitter),
        "condition": A.condition * G.condition,
        "clipped": (ratio < floor).sum((1, 2)),
    }
    return Rotated(A.basis, G.basis, ratio.clamp(min=floor).reciprocal()), ok, measured


def eigen_sum(first: Pair, second: Pair, damping: Float[Tensor, ""], floor: float = FLOOR) -> Inverted:
    """Invert the eigenvalues of the first term plus the second term's diagonal in its eigenvectors plus λ.

    λI and two terms have no common diagonalisation, so the off-diagonal part of the second term is dropped.
    """
    r, s, base, jitter = _damped_spectrum(first, damping)
    more = product_diagonal(r.vectors, s.vectors, second)
    ratio = 1 + more / base
    ok = r.ok & s.ok & (base.amin((1, 2)) > 0) & (damping >= 0) & kron.finite(ratio)
    total = base * ratio.clamp(min=floor)
    measured = {
        "jitter": jitter,
        "condition": spread(total.flatten(1)),
        "clipped": (ratio < floor).sum((1, 2)),
    }
    return Rotated(r.vectors, s.vectors, total.reciprocal()), ok, measured


class _Pencil(NamedTuple):
    values: Float[Tensor, "k d"]
    basis: Factor
    ok: Bool[Tensor, " k"]
    jitter: Float[Tensor, " k"]
    condition: Float[Tensor, " k"]


def _pencil(first: Factor, second: Factor, damping: Float[Tensor, " k"]) -> _Pencil:
    """Return K with `Kᵀ(M + δI)K = I` and `KᵀNK` diagonal; δ has the floor of `damped_inverse`."""
    shift, jitter = floored(first, damping)
    if kron.is_diagonal(first):
        damped = first + shift.unsqueeze(-1)
        ok = kron.finite(second) & (damped.amin(1) > 0)
        return _Pencil(second / damped, damped.rsqrt(), ok, jitter, spread(damped))
    L, failed = torch.linalg.cholesky_ex(add_diagonal(first, shift))
    half = torch.linalg.solve_triangular(L, second, upper=False)
    whitened = torch.linalg.solve_triangular(L, half.mT, upper=False)
    ok = (failed == 0) & kron.finite(whitened)
    eye = torch.eye(first.shape[-1], dtype=first.dtype, device=first.device)
    values, Q = eigh(kron.where(ok, (whitened + whitened.mT) / 2, eye))
    return _Pencil(values, torch.linalg.solve_triangular(L.mT, Q, upper=True), ok, jitter, condition(L))


def product_diagonal(QA: Factor, QG: Factor, pair: Pair) -> Float[Tensor, "k o i"]:
    """Return the diagonal of a product of two factors in the basis `Q_G ⊗ Q_A`."""
    return diagonal_in(QG, pair.G).unsqueeze(-1) * diagonal_in(QA, pair.A).unsqueeze(-2)


def diagonal_in(Q: Factor, M: Factor) -> Float[Tensor, "k d"]:
    """Return the diagonal of `QᵀMQ`."""
    return M if kron.is_diagonal(M) else (Q * (M @ Q)).sum(-2)
