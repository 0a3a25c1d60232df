r"""K-FAC: the Fisher block of a layer as one Kronecker product, $F \approx G \otimes A$.

$$A = \frac1N \sum_{n,t} a_{nt} a_{nt}^\top, \qquad G = \frac1{NT} \sum_{n,s,t} g_{snt} g_{snt}^\top$$

Exact when $aa^\top$ and $gg^\top$ are independent (and, over shared positions, "expand": positions are independent
and alike). Scale: $G \otimes A$ is in the units of the Fisher of the mean negative log-likelihood; the number of
positions T sits in A.

Martens & Grosse 2015, *Optimizing neural networks with Kronecker-factored approximate curvature*, sections 3 and 6.3;
Grosse & Martens 2016 for shared positions; running average as in section 5 of the first.

k group, s draw, n example, t position, i input, o output.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import rows
from fisherfn.base import Diagnostics, LayerMethod, Method, factorwise, layerwise, whole_mean
from fisherfn.errors import EmptyBatchError, HyperparameterError, unknown
from fisherfn.linalg import kron
from fisherfn.linalg.solve import damped_inverse, psd_eigh
from fisherfn.taps import AnyTap, Mean, Moment, Tap
from fisherfn.types import Product, Shape

DampingForm = Literal["factored", "eigen"]
Sharing = Literal["expand", "reduce"]
DAMPING_FORMS = ("factored", "eigen")
SHARINGS = ("expand", "reduce")
DIAGONAL_ABOVE = 8192
"""Width at which a factor and its inverse hold half a gigabyte in single precision."""


class Factors(NamedTuple):
    """The curvature of one block."""

    A: kron.Factor  # [k i i] second moment of inputs, or where it is wide its diagonal [k i]
    G: kron.Factor  # [k o o] second moment of output-gradients, likewise


class FactoredInverse(NamedTuple):
    """`(G + √λ/π I)⁻¹ ⊗ (A + π√λ I)⁻¹`."""

    A: kron.Factor
    G: kron.Factor


class EigenInverse(NamedTuple):
    """`(G ⊗ A + λI)⁻¹` in the factors' eigenvectors: its eigenvalues are `scale`."""

    QA: kron.Factor
    QG: kron.Factor
    scale: Float[Tensor, "k o i"]


def kfac(
    damping_form: DampingForm | str = "factored",
    sharing: Sharing | str = "expand",
    diagonal_above: int = DIAGONAL_ABOVE,
) -> Method:
    """K-FAC.

    Args:
        damping_form: "factored" damps each factor, with π sharing λ out between them: it adds
            `π√λ G⊗I + √λ/π I⊗A + λI`, more than λI, and costs a Cholesky factorisation each. "eigen" damps by λI
            exactly and costs an eigendecomposition each, 3 to 4 times as much.
        sharing: what is taken as independent over the positions that share a weight (sequence, pixels): "expand"
            every position, "reduce" only the mean of inputs and the sum of output-gradients (cheaper; exact where
            output-gradients are alike at all positions, as below a mean over them).
        diagonal_above: a factor wider than this is kept as its diagonal: a language model's vocabulary has no
            matrix. The input factor of an embedding is diagonal at any width, exactly.

    Raises:
        UnknownNameError: another damping form or sharing.
        HyperparameterError: a negative width.
    """
    for what, name, known in (("damping form", damping_form, DAMPING_FORMS), ("sharing", sharing, SHARINGS)):
        if name not in known:
            raise unknown(what, name, known)
    if diagonal_above < 0:
        raise HyperparameterError(f"diagonal_above must be >= 0, got {diagonal_above}.")
    moments = partial(estimate, moments=partial(MOMENTS[sharing], limit=diagonal_above))
    if damping_form == "factored":
        empty = partial(init_factored, limit=diagonal_above)
        layer = LayerMethod(empty, moments, factorwise, invert_factored, apply_factored, apply_tap_factored, matvec)
    else:
        init = partial(init_eigen, limit=diagonal_above)
        layer = LayerMethod(init, moments, factorwise, invert_eigen, apply_eigen, apply_tap_eigen, matvec)
    return layerwise("kfac", layer)


# factors ---------------------------------------------------------------------------------------------------------


def estimate(
    tap: AnyTap, previous: Factors | None = None, mean: Mean = whole_mean, moments: Moment | None = None
) -> tuple[Factors, Diagnostics]:
    """A and G of one batch, at least in float32."""
    return mean(moments or expand, tap), {}


def expand(tap: AnyTap, limit: int = DIAGONAL_ABOVE) -> Factors:
    """The two second moments over examples and positions: `F ≈ Σ_t E[aaᵀ] ⊗ mean_t E[ggᵀ]`."""
    n, t = tap.sizes.n, tap.sizes.t

    def of(part: Tap) -> Factors:
        g = part.g.flatten(1, 2)  # draws are rows like any other
        return Factors(_moment(part.a, limit), _moment(g, limit))

    A, G = _summed(of, tap)
    return Factors(A / n, G / (n * t))


def reduce(tap: AnyTap, limit: int = DIAGONAL_ABOVE) -> Factors:
    """The two second moments over examples: of the mean input, and of the summed output-gradient."""
    n, t = tap.sizes.n, tap.sizes.t

    def of(part: Tap) -> Factors:
        g = part.g.sum(3, keepdim=True).flatten(1, 2)
        if isinstance(part.a, rows.OneHot):  # summed rows are not one-hot: here the diagonal is an approximation
            return Factors(rows.total_diagonal(part.a) / t**2, _moment(g, limit))
        return Factors(_moment((rows.total(part.a) / t).unsqueeze(2), limit), _moment(g, limit))

    A, G = _summed(of, tap)
    return Factors(A / n, G / n)


MOMENTS = {"expand": expand, "reduce": reduce}


def _moment(a: rows.Rows, limit: int) -> kron.Factor:
    diagonal = isinstance(a, rows.OneHot) or rows.sizes(a)[3] > limit
    return rows.diagonal_moment(a) if diagonal else rows.second_moment(a)


def _summed(of: Callable[[Tap], Factors], tap: AnyTap) -> Factors:
    """Window by window, so that unfolded convolutions never exist as a whole."""
    dtype = None
    total = None
    for part in tap.windows():
        dtype = dtype or torch.promote_types(part.g.dtype, torch.float32)
        moments = of(part.to(dtype))
        total = moments if total is None else Factors(total.A + moments.A, total.G + moments.G)
    if total is None:
        raise EmptyBatchError("the tap has no examples: its mean does not exist.")
    return total


def matvec(factors: Factors, W: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
    """`(G ⊗ A) W = G W A`."""
    return kron.matvec(factors.G, factors.A, W)


# factored damping ------------------------------------------------------------------------------------------------


def init_factored(
    shape: Shape, dtype: torch.dtype, device: torch.device, damping: Tensor, limit: int = DIAGONAL_ABOVE
) -> tuple[Factors, FactoredInverse]:
    """Zero factors, and I/√λ twice."""
    factors, A, G = _empty(shape, dtype, device, limit)
    return factors, FactoredInverse(A / damping.sqrt(), G / damping.sqrt())


def invert_factored(factors: Factors, damping: Float[Tensor, ""]) -> tuple[FactoredInverse, Tensor, Diagnostics]:
    """`(A + π√λ I)⁻¹` and `(G + √λ/π I)⁻¹`."""
    pi = kron.pi(factors.A, factors.G)
    root = damping.sqrt()
    A = damped_inverse(factors.A, pi * root)
    G = damped_inverse(factors.G, root / pi)
    return FactoredInverse(A.inverse, G.inverse), A.ok & G.ok, {"jitter": torch.maximum(A.jitter, G.jitter)}


def apply_factored(inverse: FactoredInverse, grad: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
    """`G⁻¹ ∇ A⁻¹`."""
    return kron.matvec(inverse.G, inverse.A, grad)


def apply_tap_factored(inverse: FactoredInverse, tap: Tap, inner: bool) -> Product:
    """`G⁻¹ ∇ A⁻¹` from the loss tap."""
    return kron.precondition_tap(inverse.G, inverse.A, tap, inner)


# eigen damping ---------------------------------------------------------------------------------------------------


def init_eigen(
    shape: Shape, dtype: torch.dtype, device: torch.device, damping: Tensor, limit: int = DIAGONAL_ABOVE
) -> tuple[Factors, EigenInverse]:
    """Zero factors, and I/λ."""
    factors, A, G = _empty(shape, dtype, device, limit)
    return factors, EigenInverse(A, G, torch.ones(shape[:3], dtype=dtype, device=device) / damping)


def invert_eigen(factors: Factors, damping: Float[Tensor, ""]) -> tuple[EigenInverse, Tensor, Diagnostics]:
    """`1 / (s rᵀ + λ)` in the eigenvectors of G and A."""
    r, s = psd_eigh(factors.A), psd_eigh(factors.G)
    denominator = s.values.unsqueeze(-1) * r.values.unsqueeze(-2) + damping
    ok = r.ok & s.ok & (denominator > 0).all()
    return EigenInverse(r.vectors, s.vectors, denominator.reciprocal()), ok, {"jitter": torch.zeros_like(damping)}


def apply_eigen(inverse: EigenInverse, grad: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
    """`Q_G [(Q_Gᵀ ∇ Q_A) ∘ scale] Q_Aᵀ`."""
    return _back(inverse, _into(inverse, grad) * inverse.scale)


def apply_tap_eigen(inverse: EigenInverse, tap: Tap, inner: bool) -> Product:
    """The rotation into the eigenbasis from the loss tap, the way back as a matrix."""
    rotated = kron.rotate_tap(inverse.QG, inverse.QA, tap)
    scaled = rotated * inverse.scale
    return Product(_back(inverse, scaled), (rotated * scaled).sum() if inner else ())


def _into(inverse: EigenInverse, W: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
    return kron.right(kron.left(kron.transpose(inverse.QG), W), inverse.QA)


def _back(inverse: EigenInverse, W: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
    return kron.right(kron.left(inverse.QG, W), kron.transpose(inverse.QA))


def _empty(
    shape: Shape, dtype: torch.dtype, device: torch.device, limit: int
) -> tuple[Factors, kron.Factor, kron.Factor]:
    """Zero factors, and an identity of each one's size."""

    def identity(width: int, diagonal: bool) -> Tensor:
        if diagonal:
            return torch.ones(shape.k, width, dtype=dtype, device=device)
        return torch.eye(width, dtype=dtype, device=device).expand(shape.k, width, width)

    A = identity(shape.i, shape.one_hot or shape.i > limit)
    G = identity(shape.o, shape.o > limit)
    return Factors(torch.zeros_like(A), torch.zeros_like(G)), A.clone(), G.clone()
