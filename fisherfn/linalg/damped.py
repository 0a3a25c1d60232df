r"""Damped inverses of Kronecker products and of sums of two, in the two forms that damping takes.

- **factored**: $(G + \frac{\sqrt\lambda}{\pi} I) \otimes (A + \pi \sqrt\lambda I)$, with π sharing λ out between the
  factors (Martens & Grosse 2015, section 6.3); a second term is added undamped.
- **eigen**: plus λI, in the eigenvectors of the (leading) term.

A sum $G \otimes A + D \otimes C$ with a positive definite first term is solved by simultaneous diagonalisation: with
$K_A^\top A K_A = I$, $K_A^\top C K_A = \mathrm{diag}(w)$ and likewise for G and D,

$$(G \otimes A + D \otimes C)^{-1}\, X = K_G \bigl[(K_G^\top X K_A) \oslash (1 + w_G w_A^\top)\bigr] K_A^\top .$$

The second term is indefinite in general. Denominators below a floor are raised to it, which touches only the directions
that they belong to and keeps the inverse SPD; how many were is counted. Absolute values of the spectra, as one meets
them, would change every direction in which the two differ in sign.

k group, i input, o output.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn.errors import HyperparameterError, unknown
from fisherfn.linalg import kron
from fisherfn.linalg.kron import Factor, Pair
from fisherfn.linalg.solve import add_diagonal, condition, damped_inverse, eigh, floored, psd_eigh, spread
from fisherfn.operators import log_determinant
from fisherfn.taps import Tap
from fisherfn.types import Product

DAMPING_FORMS = ("factored", "eigen")
FLOOR = 0.1
"""Of the denominators of a sum: no direction is amplified more than tenfold beyond what the leading term does."""


class Rotated(NamedTuple):
    """`Q_G [(Q_Gᵀ X Q_A) ∘ scale] Q_Aᵀ`: an inverse that is diagonal in some basis."""

    QA: Factor
    QG: Factor
    scale: Float[Tensor, "k o i"]


Inverse: TypeAlias = Pair | Rotated
"""A pair of inverses, or one that is diagonal in some basis."""

Inverted: TypeAlias = tuple[Inverse, Tensor, dict[str, Tensor]]
"""An inverse, whether it is sound, and what was measured."""


class Damping(NamedTuple):
    """A form of damping.

    Attributes:
        empty: (identity of the block, damping) to the inverse that stands for I/λ.
        one: (pair, damping) to the damped inverse.
        two: (first, second, damping) to that of their sum.
    """

    empty: Callable[[Pair, Tensor], Inverse]
    one: Callable[[Pair, Tensor], Inverted]
    two: Callable[[Pair, Pair, Tensor], Inverted]


def damping_form(name: str, terms: int = 1, floor: float = FLOOR) -> Damping:
    """The form of damping of this name, for so many terms.

    Raises:
        UnknownNameError: another form.
        HyperparameterError: a floor outside (0, 1].
    """
    if name not in DAMPING_FORMS:
        raise unknown("damping form", name, DAMPING_FORMS)
    if not 0 < floor <= 1:
        raise HyperparameterError(f"floor must lie in (0, 1], got {floor}.")
    if name == "factored":
        return Damping(empty_pair if terms == 1 else empty_rotated, factored, partial(factored_sum, floor=floor))
    return Damping(empty_rotated, eigen, partial(eigen_sum, floor=floor))


# applying --------------------------------------------------------------------------------------------------------


def apply(inverse: Inverse, grad: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
    """The inverse times a gradient."""
    if isinstance(inverse, Pair):
        return kron.matvec(inverse.G, inverse.A, grad)
    rotated = kron.right(kron.left(kron.transpose(inverse.QG), grad), inverse.QA)
    return _back(inverse, rotated * inverse.scale)


def apply_tap(inverse: Inverse, tap: Tap, inner: bool) -> Product:
    """The same from the loss tap: products with its rows instead of with the gradient."""
    if isinstance(inverse, Pair):
        return kron.precondition_tap(inverse.G, inverse.A, tap, inner)
    rotated = kron.rotate_tap(inverse.QG, inverse.QA, tap)
    scaled = rotated * inverse.scale
    return Product(_back(inverse, scaled), (rotated * scaled).sum() if inner else ())


def _back(inverse: Rotated, W: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
    return kron.right(kron.left(inverse.QG, W), kron.transpose(inverse.QA))


def logdet(inverse: Inverse) -> Float[Tensor, ""]:
    r"""The log-determinant of an inverse, all groups together.

    Of a pair $d_{out} \log\det A^{-1} + d_{in} \log\det G^{-1}$; in a basis the sum of the scale's logarithms, and what
    the basis itself adds where it is not orthonormal.
    """
    if isinstance(inverse, Pair):
        i, o = inverse.A.shape[-1], inverse.G.shape[-1]
        return (o * _logdet(inverse.A) + i * _logdet(inverse.G)).sum()
    i, o = inverse.QA.shape[-1], inverse.QG.shape[-1]
    # |det Q|: a basis may be a reflection
    volume = o * _logdet(inverse.QA, absolute=True) + i * _logdet(inverse.QG, absolute=True)
    return inverse.scale.log().sum() + 2 * volume.sum()


def _logdet(F: Factor, absolute: bool = False) -> Float[Tensor, " k"]:
    if kron.is_diagonal(F):
        return (F.abs() if absolute else F).log().sum(-1)
    return torch.linalg.slogdet(F).logabsdet if absolute else log_determinant(F)


def eigenvalues(pair: Pair) -> Float[Tensor, "k o i"]:
    """`s rᵀ` of a product of two PSD factors."""
    return psd_eigh(pair.G).values.unsqueeze(-1) * psd_eigh(pair.A).values.unsqueeze(-2)


# one term --------------------------------------------------------------------------------------------------------


def empty_pair(eye: Pair, damping: Tensor) -> Pair:
    """I/√λ twice."""
    return Pair(eye.A / damping.sqrt(), eye.G / damping.sqrt())


def empty_rotated(eye: Pair, damping: Tensor) -> Rotated:
    """I/λ in the standard basis."""
    (k, i), o = eye.A.shape[:1] + eye.A.shape[-1:], eye.G.shape[-1]
    return Rotated(eye.A, eye.G, eye.A.new_ones(k, o, i) / damping)


def factored(pair: Pair, damping: Float[Tensor, ""]) -> Inverted:
    """`(A + π√λ I)⁻¹` and `(G + √λ/π I)⁻¹`, by Cholesky."""
    shift_A, shift_G = shares(pair, damping)
    A, G = damped_inverse(pair.A, shift_A), damped_inverse(pair.G, shift_G)
    measured = {"jitter": torch.maximum(A.jitter, G.jitter), "condition": (A.condition * G.condition).amax()}
    return Pair(A.inverse, G.inverse), A.ok & G.ok, measured


def shares(pair: Pair, damping: Float[Tensor, ""]) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """π√λ for A and √λ/π for G."""
    pi, root = kron.pi(pair.A, pair.G), damping.sqrt()
    return pi * root, root / pi


def eigen(pair: Pair, damping: Float[Tensor, ""]) -> Inverted:
    """`1 / (s rᵀ + λ)` in the eigenvectors of G and A."""
    r, s = psd_eigh(pair.A), psd_eigh(pair.G)
    denominator = s.values.unsqueeze(-1) * r.values.unsqueeze(-2) + damping
    ok = r.ok & s.ok & (denominator > 0).all()
    measured = {"jitter": torch.zeros_like(damping), "condition": spread(denominator.flatten(-2)).amax()}
    return Rotated(r.vectors, s.vectors, denominator.reciprocal()), ok, measured


# two terms -------------------------------------------------------------------------------------------------------


def factored_sum(first: Pair, second: Pair, damping: Float[Tensor, ""], floor: float = FLOOR) -> Inverted:
    """Simultaneous diagonalisation of the damped first term and the second."""
    shift_A, shift_G = shares(first, damping)
    A, G = _pencil(first.A, second.A, shift_A), _pencil(first.G, second.G, shift_G)
    ratio = 1 + G.values.unsqueeze(-1) * A.values.unsqueeze(-2)
    ok = A.ok & G.ok & torch.isfinite(ratio.sum())
    measured = {
        "jitter": torch.maximum(A.jitter, G.jitter),
        "condition": (A.condition * G.condition).amax(),
        "clipped": (ratio < floor).sum(),
    }
    return Rotated(A.basis, G.basis, ratio.clamp(min=floor).reciprocal()), ok, measured


def eigen_sum(first: Pair, second: Pair, damping: Float[Tensor, ""], floor: float = FLOOR) -> Inverted:
    """The first term's eigenvalues, the second's diagonal in its eigenvectors, and λ; no more than one basis allows.

    λI and two terms have no common diagonalisation, so here the second term loses what lies beside its diagonal.
    """
    r, s = psd_eigh(first.A), psd_eigh(first.G)
    base = s.values.unsqueeze(-1) * r.values.unsqueeze(-2) + damping
    more = diagonal_in(s.vectors, second.G).unsqueeze(-1) * diagonal_in(r.vectors, second.A).unsqueeze(-2)
    ratio = 1 + more / base
    ok = r.ok & s.ok & (base > 0).all() & torch.isfinite(ratio.sum())
    total = base * ratio.clamp(min=floor)
    measured = {
        "jitter": torch.zeros_like(damping),
        "condition": spread(total.flatten(-2)).amax(),
        "clipped": (ratio < floor).sum(),
    }
    return Rotated(r.vectors, s.vectors, total.reciprocal()), ok, measured


class _Pencil(NamedTuple):
    values: Float[Tensor, "k d"]
    basis: Factor
    ok: Tensor
    jitter: Tensor
    condition: Float[Tensor, " k"]


def _pencil(first: Factor, second: Factor, damping: Float[Tensor, " k"]) -> _Pencil:
    """K with `Kᵀ(M + δI)K = I` and `KᵀNK` diagonal; δ is floored as in `damped_inverse`."""
    shift, jitter = floored(first, damping)
    if kron.is_diagonal(first):
        damped = first + shift.unsqueeze(-1)
        ok = torch.isfinite(second.sum()) & (damped > 0).all()
        return _Pencil(second / damped, damped.rsqrt(), ok, jitter, spread(damped))
    L, failed = torch.linalg.cholesky_ex(add_diagonal(first, shift))
    half = torch.linalg.solve_triangular(L, second, upper=False)
    whitened = torch.linalg.solve_triangular(L, half.mT, upper=False)
    ok = (failed == 0).all() & torch.isfinite(whitened.sum())
    eye = torch.eye(first.shape[-1], dtype=first.dtype, device=first.device)
    values, Q = eigh(torch.where(ok, (whitened + whitened.mT) / 2, eye))
    return _Pencil(values, torch.linalg.solve_triangular(L.mT, Q, upper=True), ok, jitter, condition(L))


def diagonal_in(Q: Factor, M: Factor) -> Float[Tensor, "k d"]:
    """The diagonal of `QᵀMQ`."""
    return M if kron.is_diagonal(M) else (Q * (M @ Q)).sum(-2)
