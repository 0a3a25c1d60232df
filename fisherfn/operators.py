r"""Linear operators on trees like params, with conversion to matrices and to scipy.

A vector is a flattened tree: params order, each tensor row-major (docs/conventions.md). Trace, eigenvalues and
log-determinant are computed from the factors of an operator if possible, else from its dense matrix, up to `LARGEST`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from fisherfn import tree
from fisherfn.errors import MissingPackageError, StructureError, TooLargeError, expect_number
from fisherfn.types import Tree

Kind = Literal["symmetric", "general", "nonlinear"]
"""Dependence of a preconditioner on the gradient."""

LARGEST = 4096
"""Largest number of rows of a dense matrix, where no structure can be used: 128 MiB in float64."""

COLUMNS = 32
"""Number of columns of a matrix that are multiplied at a time."""


@dataclass(frozen=True)
class Operator:
    """A linear operator on trees, defined by its products.

    Attributes:
        like: a tree with the shapes and device of the operator's arguments; it computes in their common type.
        product: function from tree to tree.
        symmetric: True if the operator is its own transpose.
    """

    like: Tree
    product: Callable[[Tree], Tree]
    symmetric: bool = True

    def __matmul__(self, v: Tree) -> Tree:
        """Multiply a tree by the operator.

        The product is computed in the type of the operator (`like`, at least float32) and returned in the types of v.
        """
        check_like(v, self.like)
        dtype = _dtype(self.like)
        given = {name: leaf.to(dtype) for name, leaf in v.items()}
        return {name: leaf.to(v[name].dtype) for name, leaf in self.product(given).items()}

    def dense(self) -> Float[Tensor, "p p"]:
        """Return the matrix `[P, P]`, column by column.

        Raises:
            TooLargeError: P above 4096.
        """
        size = sum(leaf.numel() for leaf in self.like.values())
        check_size(size, "the dense matrix of this operator")
        eye = torch.eye(size, dtype=_dtype(self.like), device=_device(self.like))
        return _products(self.product, self.like)(eye)

    def to_scipy(self, damping: float = 0.0) -> Any:
        """Return this operator plus damping · I as a `scipy.sparse.linalg.LinearOperator` on vectors of P numbers.

        Raises:
            MissingPackageError: scipy is not installed.
        """
        return to_scipy(self.product, self.like, damping, self.symmetric)


def none() -> None:
    """Return None: the factors do not give the quantity."""


@dataclass(frozen=True)
class Approximation(Operator):
    r"""A method's undamped approximation $\hat F$ of the Fisher in a state. Returned by `ng.approximation`.

    Attributes:
        of_trace: the trace, or None if the factors do not give it.
        of_spectrum: all eigenvalues in any order, or None.
    """

    of_trace: Callable[[], Tensor | None] = none
    of_spectrum: Callable[[], Tensor | None] = none

    def trace(self) -> Float[Tensor, ""]:
        """Return the sum of all eigenvalues, in float64."""
        trace = self.of_trace()
        return self.dense().double().trace() if trace is None else trace

    def spectrum(self) -> Float[Tensor, " p"]:
        """Return all P eigenvalues, ascending, in float64.

        Raises:
            TooLargeError: neither Kronecker factors nor a Gram matrix give them, and a block has more than 4096 rows.
        """
        found = self.of_spectrum()
        return torch.linalg.eigvalsh(self.dense().double()) if found is None else found.sort().values

    def logdet(self, damping: float | Tensor = 0.0) -> Float[Tensor, ""]:
        r"""Return $\log\det(\hat F + \lambda I)$ in float64: `-inf` if it is singular, NaN if it is not PSD.

        Raises:
            HyperparameterError: a negative damping.
            TooLargeError: see `spectrum`.
        """
        return logdet(self.spectrum(), damping)


@dataclass(frozen=True)
class DampedInverse(Operator):
    """The damped inverse that preconditions gradients, with the damping of the last `invert`. Returned by `ng.inverse`.

    Attributes:
        of_logdet: the log-determinant, or None if the factors do not give it.
    """

    of_logdet: Callable[[], Tensor | None] = none

    def logdet(self) -> Float[Tensor, ""]:
        """Return the logarithm of the determinant in float64; NaN if the determinant is negative.

        Raises:
            TooLargeError: the factors do not provide it, and P is above 4096.
        """
        found = self.of_logdet()
        return log_determinant(self.dense().double()) if found is None else found


# numbers ---------------------------------------------------------------------------------------------------------


def logdet(spectrum: Float[Tensor, " p"], damping: float | Tensor) -> Float[Tensor, ""]:
    """Return `Σ log(s + λ)`."""
    expect_number("damping", damping, lambda number: number >= 0, "must be >= 0")
    return (spectrum + damping).log().sum()


def log_determinant(matrix: Float[Tensor, "*k d d"]) -> Float[Tensor, "*k"]:
    """Return the logarithm of a determinant; NaN if the determinant is negative."""
    sign, logabs = torch.linalg.slogdet(matrix)
    return torch.where(sign < 0, torch.nan, logabs)


def check_like(v: Any, like: Tree) -> None:
    """Raise unless v is a tree with the names and shapes of another.

    Raises:
        StructureError: other names, or a value that is no tensor.
        ShapeError: another shape, or a tensor of integers or flags.
    """
    if not isinstance(v, dict) or v.keys() != like.keys():
        raise StructureError(f"expected a tree like params, with {', '.join(map(repr, like))}.")
    tree.check_leaves(v, {name: leaf.shape for name, leaf in like.items()})


def check_size(size: int, what: str, largest: int | None = None) -> None:
    """Raise `TooLargeError` for a dense matrix with more rows than `LARGEST` or another number."""
    largest = LARGEST if largest is None else largest
    if size > largest:
        raise TooLargeError(
            f"{what} would have {size:,} rows; the limit for a dense matrix is {largest:,}. Use products instead: "
            "`.to_scipy()` with scipy.sparse.linalg (eigsh for extreme eigenvalues, cg for systems)."
        )


# vectors ---------------------------------------------------------------------------------------------------------


def ravel(values: Mapping[str, Tensor]) -> Float[Tensor, " p"]:
    """Flatten a tree to one vector: its order, each tensor row-major."""
    return torch.cat([leaf.reshape(-1) for leaf in values.values()])


def unravel(vector: Float[Tensor, " p"], like: Tree) -> Tree:
    """Invert `ravel`, in the shapes of a tree."""
    parts = vector.split([leaf.numel() for leaf in like.values()])
    return {name: part.reshape(leaf.shape) for (name, leaf), part in zip(like.items(), parts, strict=True)}


def to_scipy(product: Callable[[Tree], Tree], like: Tree, damping: float = 0.0, symmetric: bool = True) -> Any:
    """Return `product + damping · I` as a scipy `LinearOperator`; autograd computes the transpose if needed.

    Raises:
        MissingPackageError: scipy is not installed.
        HyperparameterError: a negative damping.
    """
    expect_number("damping", damping, lambda number: number >= 0, "must be >= 0")
    try:
        from scipy.sparse.linalg import LinearOperator
    except ImportError as error:
        raise MissingPackageError(
            "to_scipy needs scipy, which fisherfn does not install: pip install scipy."
        ) from error
    size, dtype, device = sum(leaf.numel() for leaf in like.values()), _dtype(like), _device(like)

    def on_arrays(times: Callable[[Tensor], Tensor]) -> Callable[[NDArray[Any]], NDArray[Any]]:
        def matmat(array: NDArray[Any]) -> NDArray[Any]:
            if np.iscomplexobj(array):
                return matmat(array.real) + 1j * matmat(array.imag)
            X = torch.as_tensor(np.ascontiguousarray(array)).to(device=device, dtype=dtype)  # torch has no steps < 0
            Y = times(X.reshape(size, -1)) + damping * X.reshape(size, -1)
            return np.asarray(Y.reshape(X.shape).detach().cpu())

        return matmat

    forward = on_arrays(_products(product, like))
    back = forward if symmetric else on_arrays(_products(transposed(product, like), like))
    return LinearOperator(
        (size, size), matvec=forward, rmatvec=back, matmat=forward, rmatmat=back,
        dtype=np.asarray(torch.zeros((), dtype=dtype)).dtype,
    )  # fmt: skip


def transposed(product: Callable[[Tree], Tree], like: Tree) -> Callable[[Tree], Tree]:
    """Return the transpose of a linear function of trees, by a vector-Jacobian product."""
    _, pull = torch.func.vjp(product, {name: torch.zeros_like(leaf) for name, leaf in like.items()})  # type: ignore[misc]
    return lambda v: pull({name: leaf.to(like[name].dtype) for name, leaf in v.items()})[0]


def _products(product: Callable[[Tree], Tree], like: Tree) -> Callable[[Tensor], Tensor]:
    """Return the product with every column of a matrix, some columns at a time."""
    of_columns = torch.vmap(lambda column: ravel(product(unravel(column, like))), 1, 1, chunk_size=COLUMNS)
    return lambda X: of_columns(X) if X.shape[1] else X.clone()


def _dtype(like: Tree) -> torch.dtype:
    """Return the common type of a tree, at least float32."""
    dtype = torch.float32
    for leaf in like.values():
        dtype = torch.promote_types(dtype, leaf.dtype)
    return dtype


def _device(like: Tree) -> torch.device:
    return next(iter(like.values())).device
