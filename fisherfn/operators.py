r"""Linear operators on trees like params: as matrices, and as scipy sees them.

A vector is a tree raveled: params order, each tensor row-major (docs/conventions.md). What an operator knows of itself
(trace, eigenvalues, log-determinant) comes from its factors; without such knowledge it is made dense, up to `LARGEST`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn.errors import MissingPackageError, StructureError, TooLargeError, expect_number
from fisherfn.types import Tree

Kind = Literal["symmetric", "general", "nonlinear"]
"""How a preconditioner depends on the gradient."""

LARGEST = 4096
"""Rows of a matrix that is made dense where no structure helps: 128 MiB in float64."""

COLUMNS = 32
"""Products of a matrix with an operator that are made at a time."""


@dataclass(frozen=True)
class Operator:
    """A linear operator on trees, by its products.

    Attributes:
        like: a tree of the shapes, types and device that the operator acts on.
        product: a tree to a tree.
        symmetric: whether it is its own transpose.
    """

    like: Tree
    product: Callable[[Tree], Tree]
    symmetric: bool = True

    def __matmul__(self, v: Tree) -> Tree:
        """The product with a tree."""
        if not isinstance(v, dict) or v.keys() != self.like.keys():
            raise StructureError(f"a tree like params is wanted, with {', '.join(map(repr, self.like))}.")
        return self.product(v)

    def dense(self) -> Float[Tensor, "p p"]:
        """The matrix, `[P, P]`, column by column.

        Raises:
            TooLargeError: P above 4096.
        """
        size = sum(leaf.numel() for leaf in self.like.values())
        check_size(size, "the dense matrix of this operator")
        eye = torch.eye(size, dtype=_dtype(self.like), device=_device(self.like))
        return _products(self.product, self.like)(eye)

    def to_scipy(self, damping: float = 0.0) -> Any:
        """This operator plus damping · I as a `scipy.sparse.linalg.LinearOperator` on vectors of P numbers.

        Raises:
            MissingPackageError: scipy is not installed.
        """
        return to_scipy(self.product, self.like, damping, self.symmetric)


@dataclass(frozen=True)
class Approximation(Operator):
    r"""A method's undamped approximation $\hat F$ of the Fisher, as a state holds it. Made by `ng.approximation`.

    Attributes:
        of_trace: the trace, where the factors give it.
        of_spectrum: all eigenvalues in any order, where the factors give them.
    """

    of_trace: Callable[[], Tensor] | None = None
    of_spectrum: Callable[[], Tensor] | None = None

    def trace(self) -> Float[Tensor, ""]:
        """The sum of all eigenvalues, in float64."""
        return self.of_trace() if self.of_trace else self.dense().double().trace()

    def spectrum(self) -> Float[Tensor, " p"]:
        """All P eigenvalues, ascending, in float64.

        Raises:
            TooLargeError: neither Kronecker factors nor a Gram matrix have them, and a block has more than 4096 rows.
        """
        if self.of_spectrum:
            return self.of_spectrum().sort().values
        return torch.linalg.eigvalsh(self.dense().double())  # type: ignore[no-any-return]

    def logdet(self, damping: float | Tensor = 0.0) -> Float[Tensor, ""]:
        r"""$\log\det(\hat F + \lambda I)$ in float64: `-inf` where it is singular, NaN where it is not PSD.

        Raises:
            HyperparameterError: a negative damping.
            TooLargeError: as `spectrum`.
        """
        return logdet(self.spectrum(), damping)


@dataclass(frozen=True)
class DampedInverse(Operator):
    """What a state multiplies gradients by, with the damping it was inverted at. Made by `ng.inverse`.

    Attributes:
        of_logdet: the log-determinant, where the factors give it.
    """

    of_logdet: Callable[[], Tensor] | None = None

    def logdet(self) -> Float[Tensor, ""]:
        """The logarithm of the determinant in float64; NaN where that is negative.

        Raises:
            TooLargeError: no factors have it, and P is above 4096.
        """
        return self.of_logdet() if self.of_logdet else log_determinant(self.dense().double())


# numbers ---------------------------------------------------------------------------------------------------------


def logdet(spectrum: Float[Tensor, " p"], damping: float | Tensor) -> Float[Tensor, ""]:
    """`Σ log(s + λ)`."""
    expect_number("damping", damping, lambda number: number >= 0, "must be >= 0")
    return (spectrum + damping).log().sum()


def log_determinant(matrix: Float[Tensor, "*k d d"]) -> Float[Tensor, "*k"]:
    """The logarithm of a determinant; NaN where that is negative."""
    sign, logabs = torch.linalg.slogdet(matrix)
    return torch.where(sign < 0, torch.nan, logabs)


def check_size(size: int, what: str, largest: int | None = None) -> None:
    """Raise `TooLargeError` for a matrix of more rows than are made dense, `LARGEST` or another number."""
    largest = LARGEST if largest is None else largest
    if size > largest:
        raise TooLargeError(
            f"{what} would have {size:,} rows, and at most {largest:,} are made dense. Use products instead: "
            "`.to_scipy()` with scipy.sparse.linalg (eigsh for extreme eigenvalues, cg for systems)."
        )


# vectors ---------------------------------------------------------------------------------------------------------


def ravel(values: Mapping[str, Tensor]) -> Float[Tensor, " p"]:
    """A tree as one vector: its order, each tensor row-major."""
    return torch.cat([leaf.reshape(-1) for leaf in values.values()])


def unravel(vector: Float[Tensor, " p"], like: Tree) -> Tree:
    """The inverse of `ravel`, in the shapes of a tree."""
    parts = vector.split([leaf.numel() for leaf in like.values()])
    return {name: part.reshape(leaf.shape) for (name, leaf), part in zip(like.items(), parts, strict=True)}


def to_scipy(product: Callable[[Tree], Tree], like: Tree, damping: float = 0.0, symmetric: bool = True) -> Any:
    """`product + damping · I` as a scipy `LinearOperator`; a transpose that is not itself comes from autograd.

    Raises:
        MissingPackageError: scipy is not installed.
        HyperparameterError: a negative damping.
    """
    expect_number("damping", damping, lambda number: number >= 0, "must be >= 0")
    try:
        from scipy.sparse.linalg import LinearOperator
    except ImportError as error:
        raise MissingPackageError(
            "to_scipy needs scipy, which fisherfn itself does without: pip install scipy (or fisherfn[operators])."
        ) from error
    size, dtype, device = sum(leaf.numel() for leaf in like.values()), _dtype(like), _device(like)

    def on_arrays(times: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
        def matmat(array: Any) -> Any:
            X = torch.as_tensor(array).to(device=device, dtype=dtype)
            Y = times(X.reshape(size, -1)) + damping * X.reshape(size, -1)
            return Y.reshape(X.shape).cpu().numpy()

        return matmat

    forward = on_arrays(_products(product, like))
    back = forward if symmetric else on_arrays(_products(transposed(product, like), like))
    return LinearOperator(
        (size, size), matvec=forward, rmatvec=back, matmat=forward, rmatmat=back,
        dtype=torch.zeros((), dtype=dtype).numpy().dtype,
    )  # fmt: skip


def transposed(product: Callable[[Tree], Tree], like: Tree) -> Callable[[Tree], Tree]:
    """The transpose of a linear function of trees: what pulls a vector back through it."""
    _, pull = torch.func.vjp(product, {name: torch.zeros_like(leaf) for name, leaf in like.items()})  # type: ignore[misc]
    return lambda v: pull({name: leaf.to(like[name].dtype) for name, leaf in v.items()})[0]


def _products(product: Callable[[Tree], Tree], like: Tree) -> Callable[[Tensor], Tensor]:
    """The product with every column of a matrix, some of them at a time."""
    of_columns = torch.vmap(lambda column: ravel(product(unravel(column, like))), 1, 1, chunk_size=COLUMNS)
    return lambda X: of_columns(X) if X.shape[1] else X.clone()


def _dtype(like: Tree) -> torch.dtype:
    """The common type of a tree, at least float32."""
    dtype = torch.float32
    for leaf in like.values():
        dtype = torch.promote_types(dtype, leaf.dtype)
    return dtype


def _device(like: Tree) -> torch.device:
    return next(iter(like.values())).device
