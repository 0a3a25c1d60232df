r"""Leading singular triplets of a linear map, by Golub & Kahan's bidiagonalisation (1965).

From a start $q_1$ the vectors $q_j$ are $Z^\top Z\, q_{j-1}$, orthonormalised against all previous ones: the right
vectors of the bidiagonalisation, whose span contains the result of power iteration. Without reorthogonalisation
converged triplets return as copies; against the q is enough (Simon & Zha 2000). The eigenpairs
(σ², y) of $T = (ZQ)^\top ZQ$ give the best triplets of the space, $v = Q y$ and $\sigma u = Z Q y$.

One start finds only one direction per singular value. When its space is exhausted, a second start vector continues, so
that two equal singular values give two triplets. The number of steps is fixed, because nothing may depend on values; a
space that stays exhausted continues with zeros.

k group, j step, r term.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn.linalg import kron

Vector: TypeAlias = Tensor
"""A vector of one side, with the groups first: a symmetric matrix, its diagonal, or coefficients of other vectors."""


class LinearMap(ABC):
    """A linear map Z from vectors V to vectors U, given by products; the two sides may have their own inner products.

    The dual y' of a vector y gives the inner product ⟨x, y⟩ as a sum of x·y'. The maps take duals, which an iteration
    needs anyway. A vector is its own dual unless a subclass says otherwise.
    """

    @property
    @abstractmethod
    def rounding(self) -> float:
        """Return the relative norm below which a vector is treated as zero."""

    @abstractmethod
    def left(self, dual_V: Vector) -> Vector:
        """Return `Z V`, given V'."""

    @abstractmethod
    def right(self, dual_U: Vector) -> Vector:
        """Return `Zᵀ U`, given U'."""

    @abstractmethod
    def start(self, which: int) -> Vector:
        """Return a generic V, for 0 or 1."""

    def left_dual(self, U: Vector) -> Vector:
        """Return U'."""
        return U

    def right_dual(self, V: Vector) -> Vector:
        """Return V'."""
        return V


@dataclass(frozen=True)
class Deflated(LinearMap):
    """The map `Z − u vᵀ`."""

    Z: LinearMap
    u: Vector
    v: Vector

    @property
    def rounding(self) -> float:
        """Return that of Z."""
        return self.Z.rounding

    def left(self, dual_V: Vector) -> Vector:
        """Return `Z V − u ⟨v, V⟩`."""
        return self.Z.left(dual_V) - kron.times(self.u, kron.dot(self.v, dual_V))

    def right(self, dual_U: Vector) -> Vector:
        """Return `Zᵀ U − v ⟨u, U⟩`."""
        return self.Z.right(dual_U) - kron.times(self.v, kron.dot(self.u, dual_U))

    def start(self, which: int) -> Vector:
        """Return that of Z."""
        return self.Z.start(which)

    def left_dual(self, U: Vector) -> Vector:
        """Return that of Z."""
        return self.Z.left_dual(U)

    def right_dual(self, V: Vector) -> Vector:
        """Return that of Z."""
        return self.Z.right_dual(V)


class Triplet(NamedTuple):
    """A singular triplet `u vᵀ` with `u = Z v` and v of length 1; σ², and the residual relative to σ."""

    u: Vector
    v: Vector
    square: Float[Tensor, " k"]
    residual: Float[Tensor, " k"]

    def balanced(self) -> tuple[Vector, Vector]:
        """Return u/√σ and √σ v: the coefficients of v can be larger than any number in float32 if σ is small."""
        root = self.square**0.25
        return kron.times(self.u, _inverse(root, 0.0)), kron.times(self.v, root)


def leading(
    Z: LinearMap, steps: int, rank: int = 1, after: tuple[Triplet, Triplet] | None = None
) -> tuple[Triplet, ...]:
    """Compute the `rank` (one or two) leading triplets.

    Args:
        Z: the map.
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


class _Krylov(NamedTuple):
    """An orthonormal basis q, Z q, their duals, and the length of the vector after the last q."""

    basis: Float[Tensor, "k j *d"]
    images: Float[Tensor, "k j *e"]
    image_duals: Float[Tensor, "k j *e"]
    beyond: Float[Tensor, " k"]


def _krylov(Z: LinearMap, steps: int, restart: bool, after: tuple[Triplet, Triplet] | None) -> _Krylov:
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
        square = kron.dot(images[-1], image_duals[-1]).clamp(min=0)
        r = Z.right(_divided(image_duals[-1], square.sqrt()))  # of length σ: σ² could overflow or underflow
        if second is not None and step:
            r = r + kron.times(second, largest.sqrt() * (length == 0))
        largest = torch.maximum(largest, square)
        # numerical noise in Z q, mostly along u₁, returns through Zᵀ amplified by σ₁
        q, dual, length = _unit(Z, _orthogonal(r, Q, D, Z.rounding), Z.rounding * largest.sqrt())
    basis = Q[:, before:].reshape(Q.shape[0], steps, *q.shape[1:])
    return _Krylov(basis, torch.stack(images, 1), torch.stack(image_duals, 1), beyond=length * square.sqrt())


def _orthogonal(r: Vector, Q: Float[Tensor, "k j d"], D: Float[Tensor, "k j d"], rounding: float) -> Vector:
    """Return the part of r that is orthogonal to the q, whose duals are D."""
    rest = r.flatten(1).unsqueeze(1)  # as a row: products of many matrices with one column each are slow
    once = torch.finfo(r.dtype).eps <= 1e-8 * rounding  # once is enough if the rest is never much shorter
    for _ in range(1 if once else 2):
        rest = torch.baddbmm(rest, rest @ D.mT, Q, alpha=-1)
    return rest.reshape(r.shape)


def _column(x: Vector) -> Float[Tensor, "k 1 d"]:
    return x.flatten(1).unsqueeze(1)


def _unit(Z: LinearMap, x: Vector, floor: Tensor | float) -> tuple[Vector, Vector, Float[Tensor, " k"]]:
    """Normalise a vector of the output side and its dual; return both and the length, or zeros below the floor."""
    dual = Z.right_dual(x)
    length = kron.dot(x, dual).clamp(min=0).sqrt()
    return _divided(x, length, floor), _divided(dual, length, floor), length * (length > floor)


def _divided(x: Vector, length: Float[Tensor, " k"], floor: Tensor | float = 0.0) -> Vector:
    """Return x divided by its length, or zeros if that is not above the floor.

    The reciprocal of a small length would overflow in float32.
    """
    size = kron.peak(x)
    return kron.times(kron.unit(x, size), (size * _inverse(length, floor)).to(x.dtype))


def _inverse(x: Float[Tensor, " k"], floor: Tensor | float) -> Float[Tensor, " k"]:
    """Return 1/x, and 0 if x is not above the floor; always finite."""
    return torch.where(x > floor, 1 / x.clamp(min=torch.finfo(x.dtype).tiny), 0.0)


def _combined(basis: Float[Tensor, "k j *d"], y: Float[Tensor, "k j"]) -> Float[Tensor, "k *d"]:
    """Return `Σ_j y_j q_j`."""
    return (y.to(basis.dtype).unsqueeze(1) @ basis.flatten(2)).reshape(basis.shape[0], *basis.shape[2:])
