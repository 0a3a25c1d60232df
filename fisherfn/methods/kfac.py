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

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn.base import Diagnostics, LayerMethod, Method, Shape, factorwise, layerwise, whole_mean
from fisherfn.errors import unknown
from fisherfn.linalg import kron
from fisherfn.linalg.solve import damped_inverse, psd_eigh
from fisherfn.types import Mean, Product, Tap

DampingForm = Literal["factored", "eigen"]


class Factors(NamedTuple):
    """The curvature of one block."""

    A: Float[Tensor, "k i i"]  # second moment of inputs
    G: Float[Tensor, "k o o"]  # second moment of output-gradients


class FactoredInverse(NamedTuple):
    """`(G + √λ/π I)⁻¹ ⊗ (A + π√λ I)⁻¹`."""

    A: Float[Tensor, "k i i"]
    G: Float[Tensor, "k o o"]


class EigenInverse(NamedTuple):
    """`(G ⊗ A + λI)⁻¹` in the factors' eigenvectors: its eigenvalues are `scale`."""

    QA: Float[Tensor, "k i i"]
    QG: Float[Tensor, "k o o"]
    scale: Float[Tensor, "k o i"]


def kfac(damping_form: DampingForm | str = "factored") -> Method:
    """K-FAC.

    Args:
        damping_form: "factored" damps each factor, with π sharing λ out between them: it adds
            `π√λ G⊗I + √λ/π I⊗A + λI`, more than λI, and costs a Cholesky factorisation each. "eigen" damps by λI
            exactly and costs an eigendecomposition each, 3 to 4 times as much.

    Raises:
        UnknownNameError: another damping form.
    """
    if damping_form not in ("factored", "eigen"):
        raise unknown("damping form", damping_form, ("factored", "eigen"))
    if damping_form == "factored":
        layer = LayerMethod(
            init_factored, estimate, factorwise, invert_factored, apply_factored, apply_tap_factored, matvec
        )
    else:
        layer = LayerMethod(init_eigen, estimate, factorwise, invert_eigen, apply_eigen, apply_tap_eigen, matvec)
    return layerwise("kfac", layer)


def estimate(tap: Tap, previous: Factors | None = None, mean: Mean = whole_mean) -> tuple[Factors, Diagnostics]:
    """A and G of one batch, at least in float32."""
    return mean(moments, tap), {}


def moments(tap: Tap) -> Factors:
    """The two second moments: means over the tap's examples."""
    k, s, n, t, o = tap.g.shape
    dtype = torch.promote_types(tap.g.dtype, torch.float32)
    a = tap.a.reshape(k, n * t, -1).to(dtype)
    g = tap.g.reshape(k, s * n * t, o).to(dtype)
    return Factors(a.mT @ a / n, g.mT @ g / (n * t))


def matvec(factors: Factors, W: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
    """`(G ⊗ A) W = G W A`."""
    return kron.matvec(factors.G, factors.A, W)


# factored damping ------------------------------------------------------------------------------------------------


def init_factored(
    shape: Shape, dtype: torch.dtype, device: torch.device, damping: Tensor
) -> tuple[Factors, FactoredInverse]:
    """Zero factors, and I/√λ twice."""
    factors, A, G = _empty(shape, dtype, device)
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


def init_eigen(shape: Shape, dtype: torch.dtype, device: torch.device, damping: Tensor) -> tuple[Factors, EigenInverse]:
    """Zero factors, and I/λ."""
    factors, A, G = _empty(shape, dtype, device)
    return factors, EigenInverse(A, G, torch.ones(shape, dtype=dtype, device=device) / damping)


def invert_eigen(factors: Factors, damping: Float[Tensor, ""]) -> tuple[EigenInverse, Tensor, Diagnostics]:
    """`1 / (s rᵀ + λ)` in the eigenvectors of G and A."""
    r, s = psd_eigh(factors.A), psd_eigh(factors.G)
    denominator = s.values.unsqueeze(-1) * r.values.unsqueeze(-2) + damping
    ok = r.ok & s.ok & (denominator > 0).all()
    return EigenInverse(r.vectors, s.vectors, denominator.reciprocal()), ok, {"jitter": torch.zeros_like(damping)}


def apply_eigen(inverse: EigenInverse, grad: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
    """`Q_G [(Q_Gᵀ ∇ Q_A) ∘ scale] Q_Aᵀ`."""
    QA, QG = inverse.QA, inverse.QG
    return QG @ ((QG.mT @ grad @ QA) * inverse.scale) @ QA.mT


def apply_tap_eigen(inverse: EigenInverse, tap: Tap, inner: bool) -> Product:
    """The rotation into the eigenbasis from the loss tap, the way back as a matrix."""
    rotated = kron.rotate_tap(inverse.QG, inverse.QA, tap)
    scaled = rotated * inverse.scale
    matrix = inverse.QG @ scaled @ inverse.QA.mT
    return Product(matrix, (rotated * scaled).sum() if inner else ())


def _empty(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Factors, Tensor, Tensor]:
    """Zero factors, and an identity of each one's size."""
    k, o, i = shape
    A = torch.eye(i, dtype=dtype, device=device).expand(k, i, i)
    G = torch.eye(o, dtype=dtype, device=device).expand(k, o, o)
    return Factors(torch.zeros_like(A), torch.zeros_like(G)), A.clone(), G.clone()
