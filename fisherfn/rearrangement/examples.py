r"""The rearranged block in coefficients of its examples, for layers with one position.

$Z = \frac1N \sum_n \mathrm{vec}(a_n a_n^\top) \mathrm{vec}(\Gamma_n)^\top$ with $\Gamma_n = \sum_s g_{sn} g_{sn}^\top$
has rank N, so U and V are coefficients of these N matrices and Z is given by two N×N Gram matrices, for any number of
samples. An iteration is then almost free. It uses float64, because entries are fourth powers.

k group, s sample, n example, m example, o output, i input.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import products, rows
from fisherfn.linalg.golub_kahan import LinearMap, Vector
from fisherfn.linalg.kron import Factor, Forms, Pair
from fisherfn.taps import AnyTap, Tap

STEP = 1 << 26
"""Largest size of the Γ that are formed at a time for their Gram matrix, in numbers: 256 MiB in float32."""


def has_grams(tap: AnyTap) -> bool:
    """Return True if a block is given by Gram matrices: one position, and a batch held as a whole."""
    _, _, _, t, o, i = tap.sizes
    return tap.at_once and t == 1 and min(o, i) > 1


@dataclass(frozen=True)
class ExampleMap(LinearMap):
    """Z in coefficients of `a_n a_nᵀ` and `Γ_n/N`: both maps are the identity, the duals do the work."""

    K_a: Float[Tensor, "k n n"]
    K_g: Float[Tensor, "k n n"]

    @property
    def rounding(self) -> float:
        """Return a tolerance for norms that are roots of quadratic forms of a possibly singular matrix."""
        return 1e-7

    def left(self, dual_V: Vector) -> Vector:
        """Return `Z V`: the coefficient of `a_n a_nᵀ` is ⟨Γ_n/N, V⟩."""
        return dual_V

    def right(self, dual_U: Vector) -> Vector:
        """Return `Zᵀ U`: the coefficient of `Γ_n/N` is ⟨a_n a_nᵀ, U⟩."""
        return dual_U

    def left_dual(self, U: Vector) -> Vector:
        """Return the inner products of all `a_n a_nᵀ` with U."""
        return _times(self.K_a, U)

    def right_dual(self, V: Vector) -> Vector:
        """Return the inner products of all `Γ_n/N` with V."""
        return _times(self.K_g, V)

    def start(self, which: int) -> Vector:
        """Return positive, generic coefficients."""
        ones = torch.ones_like(self.K_a[..., 0])
        count = torch.arange(ones.shape[-1], dtype=ones.dtype, device=ones.device)
        return ones * (1.25 + torch.cos((1 + which) * count))


@dataclass(frozen=True)
class ExampleBlock:
    """A block whose vectors are coefficients of the examples; `g` of the tap is divided by √N."""

    Z: ExampleMap
    tap: Tap
    form: Forms

    @classmethod
    def of(cls, tap: Tap, form: Forms) -> ExampleBlock:
        """Build the block of a tap."""
        tap = tap.precise()
        tap = Tap(tap.a, tap.g / tap.sizes.n**0.5)
        return cls(ExampleMap(_input_gram(tap, form.A), _output_gram(tap, form.G)), tap, form)

    def pair(self, u: Vector, v: Vector) -> Pair:
        """Return `Σ_n u_n a_n a_nᵀ` and `Σ_n v_n Γ_n/N`; `recompressed` distributes scale and sign."""
        return Pair(_weighted_inputs(self.tap, u, self.form.A), _weighted_outputs(self.tap, v, self.form.G))

    def vectors(self, pair: Pair) -> tuple[Vector, Vector]:
        """Return the coefficients of K-FAC's A (1/N each) and G (1 each)."""
        ones = torch.ones_like(self.Z.K_a[..., 0])
        return ones / self.tap.sizes.n, ones


def _times(K: Float[Tensor, "k n n"], x: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
    return (x.unsqueeze(-2) @ K).squeeze(-2)  # K is symmetric; products with columns are six times slower


def _input_gram(tap: Tap, diagonal: bool) -> Float[Tensor, "k n n"]:
    """Return `⟨a_n a_nᵀ, a_m a_mᵀ⟩`, or the same of the diagonals."""
    if tap.one_hot:
        return rows.gram(tap.a).double()
    a = rows.dense(tap.a).squeeze(2).double()  # in float64, so that numerical noise does not make the matrix indefinite
    return products.gram(a.square()) if diagonal else products.gram(a).square()


def _output_gram(tap: Tap, diagonal: bool) -> Float[Tensor, "k n n"]:
    """Return `⟨Γ_n, Γ_m⟩` of `Γ_n = Σ_s g gᵀ`, or of the diagonals, from pairs of samples or from rows of Γ."""
    k, s, n, _, o, _ = tap.sizes
    g = tap.g.squeeze(3).double()
    if diagonal:
        squares = g.square().sum(1)
        return products.gram(squares)
    if s * s <= s * o + o:  # in units of n² o: pairs of samples against forming Γ, n s o² (n ~ o), and its products
        if s == 1:
            return products.gram(g.squeeze(1)).square()
        pairs = ((g[:, r] @ g[:, q].mT).square() for r in range(s) for q in range(s))
        return reduce(operator.add, pairs)
    step = max(1, STEP // (k * n * o))
    parts = (torch.einsum("ksnp,ksno->knpo", g[..., at : at + step], g).flatten(2) for at in range(0, o, step))
    return reduce(operator.add, (part @ part.mT for part in parts))


def _weighted_inputs(tap: Tap, c: Float[Tensor, "k n"], diagonal: bool) -> Factor:
    """Return `Σ_n c_n a_n a_nᵀ`, or its diagonal."""
    weights = c.to(tap.g.dtype)
    if diagonal:
        return rows.outer(weights[..., None, None], rows.squared(tap.a)).squeeze(1)
    a = rows.dense(tap.a).squeeze(2)
    return (a * weights.unsqueeze(-1)).mT @ a


def _weighted_outputs(tap: Tap, d: Float[Tensor, "k n"], diagonal: bool) -> Factor:
    """Return `Σ_n d_n Γ_n`, or its diagonal."""
    g, weights = tap.g.squeeze(3), d.to(tap.g.dtype)[:, None, :, None]
    if diagonal:
        return (weights * g.square()).sum((1, 2))
    return (weights * g).flatten(1, 2).mT @ g.flatten(1, 2)
