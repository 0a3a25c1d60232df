r"""Two-level: a preconditioner of single layers, corrected on a coarse space that couples all layers.

M is the fine method's inverse, $F_\bullet = F + \lambda I$ the exact damped sampled Fisher of all layers, and the rows
of $R_0$ span a coarse space, each supported on one layer (`coarse_spaces.py`). With $F_c = R_0 F_\bullet R_0^\top$ and
$Q = R_0^\top F_c^{-1} R_0$,

- **multiplicative**: $z = M \nabla + Q (\nabla - F_\bullet M \nabla)$, the best correction in the space: the closest to
  $F_\bullet^{-1} \nabla$ in the norm of $F_\bullet$. It is not symmetric as an operator.
- **balanced**: $Q + P M P^\top$ with $P = I - Q F_\bullet$; symmetric positive definite.
- **additive**: $M \nabla + Q \nabla$; minimises nothing.

All products follow from the matrix of coefficients $C_{n,(l,p)} = \langle W_n^l, R_{l,p} \rangle$ and the numbers
$c_n = \sum_l \langle W_n^l, z^l \rangle$: $R_0 F z = \frac1N C^\top c$ and $F R_0^\top \beta = \frac1N \sum_n W_n
(C \beta)_n$, for any mixture of layers, without interpolation between feature maps or loops over pairs of layers.
$F_c = \frac1N C^\top C + \lambda I$, because the rows are orthonormal. It is recomputed with every basis and never
averaged. F is that of the newest statistics before an inversion, so the shapes of the state follow the batch.

Koroko et al. 2023, *Analysis and comparison of two-level KFAC methods for training deep neural networks*, section 3;
Tselepidis, Kohler & Orvieto 2020, *Two-level K-FAC preconditioning for deep learning*, section 4.

k group, s sample, n example, m example and sample, t position, i input, o output, l layer, p row of l, q any row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import tree
from fisherfn.base import Estimated, Method, Preconditioned, Rho
from fisherfn.errors import HyperparameterError, expect, expect_count, unknown
from fisherfn.gradients import Gradient, as_matrix, tap_is_cheaper
from fisherfn.lowrank import combine, examples, total
from fisherfn.methods.coarse_spaces import (
    COARSE,
    Rows,
    Space,
    lifted,
    ones,
    published,
    restricted,
    solved,
    space,
    spectral,
)
from fisherfn.methods.exact import Taps, compact, empty_tap
from fisherfn.methods.kfac import KFAC
from fisherfn.operators import Kind
from fisherfn.taps import AnyTap, Tap
from fisherfn.types import PyTree, Shape
from fisherfn.which import Which

FORMS = ("multiplicative", "balanced", "additive")
ALIASES = {"tpselepedis": "tselepidis"}
"""Other spellings in published commands."""

Coarse = Literal["nicolaides", "residual", "tselepidis", "spectral"]
Form = Literal["multiplicative", "balanced", "additive"]
Matrices = Mapping[str, Tensor]
Gradients = Mapping[str, Gradient]


class Factors(NamedTuple):
    """Factors of the fine method, the newest statistics, and the shapes of the layers."""

    fine: PyTree
    taps: Taps
    shapes: dict[str, Float[Tensor, "0 k o i"]]


class Inverse(NamedTuple):
    """The fine inverse, the statistics of F, and the space; `()` if every step computes its own space."""

    fine: PyTree
    taps: Taps
    damping: Float[Tensor, ""]
    space: Space | tuple[()]


@dataclass(frozen=True)
class TwoLevel(Method):
    """A fine method, corrected on a coarse space. Built by `ff.two_level`, which has the arguments."""

    name = "twolevel_kfac"
    fine: Method = field(default_factory=KFAC)
    coarse: Coarse | str = "nicolaides"
    krylov: bool = False
    form: Form | str = "multiplicative"
    vectors: int = 1

    def __post_init__(self) -> None:
        expect(self.fine, Method, "fine", "pass a method such as ff.kfac()")
        for what, name, known in (("coarse space", self.coarse, COARSE), ("form", self.form, FORMS)):
            if name not in known:
                raise unknown(what, name, known)
        expect_count("vectors", self.vectors)
        if self.vectors > 1 and self.coarse in ("residual", "tselepidis"):
            raise HyperparameterError(f"{self.coarse} has one row per layer, got vectors={self.vectors}.")
        if self.coarse == "tselepidis" and self.krylov:
            raise HyperparameterError("tselepidis is the published space of ones only: leave out krylov.")
        if self.coarse == "tselepidis" and self.form != "additive":
            raise HyperparameterError(f'tselepidis is additive, as published: leave out form, got "{self.form}".')

    @property
    def inverse_kind(self) -> Kind:
        """Return how the step depends on the gradient; a space that depends on the residual makes it nonlinear."""
        linear: Kind = "general" if self.form == "multiplicative" else self.fine.inverse_kind
        return "nonlinear" if self.coarse == "residual" else linear

    # state --------------------------------------------------------------------------------------------------------

    def init(
        self, shapes: Mapping[str, Shape], dtype: torch.dtype, device: torch.device, damping: Tensor
    ) -> tuple[Factors, Inverse]:
        """Return the empty state of the fine method, statistics without examples, and a space of zeros."""
        factors, inverses = self.fine.init(shapes, dtype, device, damping)
        taps = {key: empty_tap(shape, dtype, device) for key, shape in shapes.items()}
        nothing: Space | tuple[()] = ()
        if self.coarse != "residual":
            count = self.vectors * (2 if self.krylov else 1)
            zeros = {key: torch.zeros(count, shape.k * shape.o * shape.i, dtype=dtype, device=device)
                     for key, shape in shapes.items()}  # fmt: skip
            eye = torch.eye(count * len(shapes), dtype=torch.float64, device=device)
            nothing = Space(zeros, eye[:0], eye, dict(zeros) if self.form == "balanced" else ())
        like = {key: torch.zeros(0, *shape[:3], dtype=dtype, device=device) for key, shape in shapes.items()}
        return Factors(factors, taps, like), Inverse(inverses, dict(taps), damping.clone(), nothing)

    def update(self, factors: Factors, taps: Mapping[str, AnyTap], rho: Rho, inverting: Which = True) -> Estimated:
        """Update the fine method; replace the statistics if an inversion follows."""
        fine = self.fine.update(factors.fine, taps, rho, inverting)
        if not inverting:
            return fine._replace(factors=factors._replace(fine=fine.factors))
        cast = {key: tap.to(factors.taps[key].dtype) for key, tap in taps.items()}
        by_rows = self.coarse == "tselepidis"  # its sums need the rows themselves
        new = {key: tap.whole().copied() if by_rows else compact(tap) for key, tap in cast.items()}
        ok = {key: sound & tree.finite(new[key]) for key, sound in fine.ok.items()}
        return Estimated(Factors(fine.factors, new, factors.shapes), ok, fine.diagnostics)

    def invert(self, factors: Factors, damping: Float[Tensor, ""]) -> Estimated:
        """Invert the fine method, and compute the coarse space if it does not depend on the gradient."""
        fine = self.fine.invert(factors.fine, damping)
        inverse = Inverse(fine.factors, factors.taps, damping, ())
        if self.coarse == "residual":
            return fine._replace(factors=inverse)
        found = self._fixed_space(factors, inverse)
        sound = torch.isfinite(found.factor.sum())
        ok = {key: mask & sound for key, mask in fine.ok.items()}
        return Estimated(inverse._replace(space=found), ok, fine.diagnostics)

    def _fixed_space(self, factors: Factors, inverse: Inverse) -> Space:
        if self.coarse == "tselepidis":
            return published(factors.taps, inverse.damping)
        if self.coarse == "spectral":
            return self._space(inverse, spectral(factors.fine, self.vectors), factors.shapes)
        return self._space(inverse, ones(factors.taps, self.vectors), factors.shapes)

    def _space(self, inverse: Inverse, first: Rows, like: Matrices) -> Space:
        """Build the space of these rows, with their images under M for Krylov; `like` has the shapes of the layers."""
        vectors = first
        if self.krylov:
            images = self._images(inverse, first, like)
            vectors = {key: torch.cat([R, images[key]]) for key, R in first.items()}
        made = space(vectors, inverse.taps, inverse.damping)
        return made._replace(images=self._images(inverse, made.rows, like)) if self.form == "balanced" else made

    def _images(self, inverse: Inverse, R: Rows, like: Matrices) -> Rows:
        """Multiply every row by M."""
        count = next(iter(R.values())).shape[0]
        matrices = ({key: rows[p].reshape(like[key].shape[-3:]) for key, rows in R.items()} for p in range(count))
        images = [self._fine(inverse, row) for row in matrices]
        return {key: torch.stack([image[key].flatten() for image in images]) for key in R}

    # the step -----------------------------------------------------------------------------------------------------

    def precondition(self, inverse: Inverse, gradients: Gradients, inner: bool) -> Preconditioned:
        """Return the preconditioned gradient in the chosen form."""
        dtypes = {key: tap.dtype for key, tap in inverse.taps.items()}
        given = {key: gradient.to(dtypes[key]) for key, gradient in gradients.items()}
        grad = {key: as_matrix(gradient) for key, gradient in given.items()}
        forms = {"multiplicative": self.multiplicative, "balanced": self.balanced, "additive": self.additive}
        nat = forms[self.form](inverse, given, grad)
        return Preconditioned(nat, tree.dot(grad, nat) if inner else ())

    def multiplicative(self, inverse: Inverse, given: Gradients, grad: Matrices) -> dict[str, Tensor]:
        """Return `z + Q (∇ − F_• z)` with `z = M ∇`."""
        space, z = self._current(inverse, grad), self._fine(inverse, given)
        rest = restricted(space, grad) - _restricted_damped(inverse, space, z)
        return tree.add(z, lifted(space.rows, solved(space, rest), z))

    def balanced(self, inverse: Inverse, given: Gradients, grad: Matrices) -> dict[str, Tensor]:
        """Return `Q ∇ + P M Pᵀ ∇`."""
        space = self._current(inverse, grad)
        beta = solved(space, restricted(space, grad))
        y = tree.add(self._fine(inverse, given), self._fine_damped(inverse, space, beta, grad), scale=-1.0)
        back = solved(space, _restricted_damped(inverse, space, y))
        return tree.add(y, lifted(space.rows, beta - back, y))

    def additive(self, inverse: Inverse, given: Gradients, grad: Matrices) -> dict[str, Tensor]:
        """Return `M ∇ + Q ∇`."""
        space, z = self._current(inverse, grad), self._fine(inverse, given)
        return tree.add(z, lifted(space.rows, solved(space, restricted(space, grad)), z))

    def _current(self, inverse: Inverse, grad: Matrices) -> Space:
        """Return the space of the state, or that of this step's residual; numerical noise counts as zero."""
        if isinstance(inverse.space, Space):
            return inverse.space
        z = self._fine(inverse, grad)
        rest = tree.add(dict(grad), _damped(inverse, total(inverse.taps, z).flatten(), z), scale=-1.0)
        length = tree.norm(dict(grad))
        left = {
            key: torch.where(r.norm() > torch.finfo(r.dtype).eps ** 0.75 * length, r, 0.0) for key, r in rest.items()
        }
        first = {key: R.reshape(1, -1) for key, R in self._fine(inverse, left).items()}
        return self._space(inverse, first, z)

    def _fine(self, inverse: Inverse, grad: Gradients) -> dict[str, Tensor]:
        return self.fine.precondition(inverse.fine, grad, False).matrices

    def _fine_damped(
        self, inverse: Inverse, space: Space, beta: Float[Tensor, " q"], like: Matrices
    ) -> dict[str, Tensor]:
        """Return `M F_• R₀ᵀ β`, the part of F as a tap if that is cheaper, the part of λ by the images of the rows."""
        n, c = examples(inverse.taps), space.C @ beta

        def of(key: str, tap: Tap) -> Tensor | Tap:
            weights = c.to(tap.g.dtype).reshape(tap.sizes.s, tap.sizes.n)
            k, _, _, _, o, i = tap.sizes
            if isinstance(tap.a, Tensor) and (k, o, i) == like[key].shape and tap_is_cheaper(tap.sizes):
                return Tap(tap.a, torch.einsum("sn,ksnto->knto", weights, tap.g).unsqueeze(1))
            return combine(tap, weights / n).reshape(like[key].shape)

        of_F = self._fine(inverse, {key: of(key, tap) for key, tap in inverse.taps.items()})
        return tree.add(of_F, lifted(dict(space.images), beta * inverse.damping.double(), like))

    def matvec(self, factors: Factors, matrices: Matrices) -> dict[str, Tensor]:
        """Multiply by the fine method's approximation."""
        return self.fine.matvec(factors.fine, matrices)

    def overlap(self, factors: Factors, taps: Mapping[str, AnyTap]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return that of the fine method."""
        return self.fine.overlap(factors.fine, taps)

    def trace(self, factors: Factors, shapes: Mapping[str, Shape]) -> Float[Tensor, ""] | None:
        """Return that of the fine method."""
        return self.fine.trace(factors.fine, shapes)

    def rank(self, factors: Factors, outputs: int) -> int | None:
        """Return that of the fine method."""
        return self.fine.rank(factors.fine, outputs)

    def eigenvalues(self, factors: Factors, shapes: Mapping[str, Shape]) -> Float[Tensor, " p"] | None:
        """Return those of the fine method."""
        return self.fine.eigenvalues(factors.fine, shapes)


def two_level(
    fine: Method | None = None,
    coarse: Coarse | str = "nicolaides",
    krylov: bool | int = False,
    form: Form | str | None = None,
    vectors: int = 1,
) -> TwoLevel:
    """Build a two-level method: a fine method with a correction on a coarse space.

    Args:
        fine: any method; None for `kfac()`.
        coarse: "nicolaides", "spectral", "residual" or "tselepidis".
        krylov: True adds M times each row to the space.
        form: "multiplicative", "balanced" or "additive"; None: multiplicative, or additive for tselepidis.
        vectors: rows per layer, for nicolaides and spectral.

    Raises:
        UnknownNameError: an unknown coarse space or form.
        HyperparameterError: fewer than one vector, several for a space that has one, or a form that the space lacks.
        StructureError: `fine` is not a method.
    """
    coarse = ALIASES.get(coarse, coarse)
    form = form or ("additive" if coarse == "tselepidis" else "multiplicative")
    return TwoLevel(KFAC() if fine is None else fine, coarse, bool(krylov), form, vectors)


def _damped(inverse: Inverse, c: Float[Tensor, " m"], z: Matrices) -> dict[str, Tensor]:
    """Return `F_• z = F z + λ z`, given `c = Σ_l ⟨W, z^l⟩` of every sample and example."""

    def of(tap: Tap, v: Tensor) -> Tensor:
        weights = (c / examples(inverse.taps)).to(tap.g.dtype).reshape(tap.sizes.s, tap.sizes.n)
        return combine(tap, weights).reshape(v.shape) + inverse.damping.to(v.dtype) * v

    return {key: of(tap, z[key]) for key, tap in inverse.taps.items()}


def _restricted_damped(inverse: Inverse, space: Space, z: Matrices) -> Float[Tensor, " q"]:
    """Return `R₀ F_• z`."""
    c = total(inverse.taps, z).flatten().double()
    return space.C.mT @ c / examples(inverse.taps) + inverse.damping.double() * restricted(space, z)
