"""A rearranged block: its map Z, and the conversion of Z's vectors to matrices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from fisherfn.linalg.golub_kahan import LinearMap, Vector
from fisherfn.linalg.kron import Pair


class Block(ABC):
    """The Z of a layer; a subclass says what its vectors are."""

    Z: LinearMap

    @abstractmethod
    def pair(self, u: Vector, v: Vector) -> Pair:
        """Return the Kronecker product `mat(v) ⊗ mat(u)`; `recompressed` distributes its scale and sign."""

    @abstractmethod
    def vectors(self, pair: Pair) -> tuple[Vector, Vector]:
        """Return u and v of the A and G of K-FAC for the same statistics."""


@dataclass(frozen=True)
class MatrixBlock(Block):
    """A block whose vectors are the matrices themselves, or their diagonals."""

    Z: LinearMap

    def pair(self, u: Vector, v: Vector) -> Pair:
        """Return the two as they are."""
        return Pair(u, v)

    def vectors(self, pair: Pair) -> tuple[Vector, Vector]:
        """Return the factors as they are."""
        return pair.A, pair.G
