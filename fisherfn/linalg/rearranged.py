r"""The rearranged Fisher block of a layer as a pair of maps (Van Loan & Pitsianis 1993), never formed.

For a block $F = \frac1N \sum_{sn} \mathrm{vec}(W_{sn}) \mathrm{vec}(W_{sn})^\top$ the rearrangement Z(F) turns the
distance to Kronecker products into the distance to matrices of rank one: $\|F - G \otimes A\| = \|Z - \mathrm{vec}(A)
\mathrm{vec}(G)^\top\|$. As maps between symmetric matrices,

$$Z\,V = \frac1N \sum_{sn} W_{sn}^\top V W_{sn}, \qquad Z^\top U = \frac1N \sum_{sn} W_{sn} U W_{sn}^\top .$$

There are three ways to compute these maps; the shapes select one:

- **Gram** (one position): $Z = \frac1N \sum_n \mathrm{vec}(a_n a_n^\top) \mathrm{vec}(\Gamma_n)^\top$ with
  $\Gamma_n = \sum_s g_{sn} g_{sn}^\top$ has rank N, so U and V are coefficients of these N matrices and Z is given by
  two N×N Gram matrices, for any number of samples. An iteration is then almost free. It uses float64, because entries
  are fourth powers.
- **factored** (few positions): $W^\top V W = a^\top (g V g^\top) a$.
- **matrices** (many positions): the $W_{sn}$ are formed first.

If a factor is kept as a diagonal, Z is projected on diagonal matrices on that side, and the result is the best one of
this form. Every iterate is symmetrised: F is symmetric, so its singular pairs are symmetric or antisymmetric, and the
latter are no curvature (they occur with shared positions).

k group, s sample, n example, m example and sample, t and u positions, i input, o output.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn import rows
from fisherfn.linalg import kron
from fisherfn.linalg.kron import Factor, Forms, Pair
from fisherfn.taps import AnyTap, Mean, Sizes, Tap, example_matrices, matrix_windows

Element: TypeAlias = Tensor
"""A symmetric matrix of one side: the matrix (or its diagonal), or its coefficients `[k n]` with Gram matrices."""

JOINED = 1 << 24
"""Largest size of the Gram matrices of blocks that are iterated on together, in numbers: 128 MiB."""

KEPT = 1 << 26
"""Largest size of per-example gradients that are kept during the iterations, in numbers: 256 MiB in float32."""


class Rearranged(NamedTuple):
    """Z as a pair of maps between elements, U on the input side and V on the output side.

    The dual y' of an element y gives the Frobenius inner product ⟨x, y⟩ as a sum of x·y'. A matrix is its own dual. The
    maps take duals, which an iteration needs anyway.

    Attributes:
        left: V' -> `Z V`.
        right: U' -> `Zᵀ U`.
        left_dual: U -> U'.
        right_dual: V -> V'.
        start: 0 or 1 -> a generic V.
        rounding: relative norm below which an element is treated as zero.
    """

    left: Callable[[Element], Element]
    right: Callable[[Element], Element]
    left_dual: Callable[[Element], Element]
    right_dual: Callable[[Element], Element]
    start: Callable[[int], Element]
    rounding: float


class Block(NamedTuple):
    """The Z of a layer, and the conversion of its elements to matrices.

    Attributes:
        Z: the maps.
        pair: (U, V) -> a Kronecker product; `recompressed` distributes its scale and sign.
        moments: converts the A and G of K-FAC from matrices to elements.
        grams: the two Gram matrices, if they are used.
    """

    Z: Rearranged
    pair: Callable[[Element, Element], Pair]
    moments: Callable[[Pair], tuple[Element, Element]]
    grams: tuple[Float[Tensor, "k n n"], Float[Tensor, "k n n"]] | None = None


def rearranged(tap: AnyTap, guess: Sequence[Pair], mean: Mean, whole: bool) -> Block:
    """Build the rearranged block of a layer.

    Args:
        tap: the statistics of the layer.
        guess: pairs whose sum is the start of the iteration; a diagonal side stays diagonal.
        mean: computes a moment over the examples.
        whole: True if `mean` covers one batch held as a whole, so that examples may be multiplied with each other.
    """
    form = kron.forms_of(guess[0])
    if _has_grams(tap, whole):
        return _by_gram(_float(tap.whole()), form)
    G = reduce(operator.add, (pair.G for pair in guess))
    return Block(_by_maps(tap, form, G, mean, whole), Pair, lambda pair: (pair.A, pair.G))


def alike(taps: Mapping[str, AnyTap], whole: bool) -> list[list[str]]:
    """Group the blocks for `joined`: those with Gram matrices of equal size together, each other one alone."""
    lists: list[list[str]] = []
    latest: dict[int, list[str]] = {}
    for key, tap in taps.items():
        n, together = tap.sizes.n, latest.get(tap.sizes.n, [])
        numbers = 2 * n * n * sum(taps[other].sizes.k for other in [*together, key])
        if together and numbers <= JOINED and _has_grams(tap, whole):
            together.append(key)
            continue
        lists.append([key])
        if _has_grams(tap, whole):
            latest[n] = lists[-1]
    return lists


def joined(blocks: Sequence[Block]) -> Rearranged:
    """Stack the Z of blocks with Gram matrices of equal size; one iteration then serves all of them."""
    if len(blocks) == 1:
        return blocks[0].Z
    return _of_grams(*(torch.cat(side) for side in zip(*(block.grams or () for block in blocks), strict=True)))


def deflated(Z: Rearranged, u: Element, v: Element) -> Rearranged:
    """Return `Z − u vᵀ`, the residual of the block without a Kronecker product."""

    def left(dual_V: Element) -> Element:
        return Z.left(dual_V) - kron.times(u, kron.dot(v, dual_V))

    def right(dual_U: Element) -> Element:
        return Z.right(dual_U) - kron.times(v, kron.dot(u, dual_U))

    return Z._replace(left=left, right=right)


# one position: Gram matrices -------------------------------------------------------------------------------------


def _has_grams(tap: AnyTap, whole: bool) -> bool:
    _, _, _, t, o, i = tap.sizes
    return whole and t == 1 and min(o, i) > 1


def _by_gram(tap: Tap, form: Forms) -> Block:
    n = tap.sizes.n
    tap = Tap(tap.a, tap.g / n**0.5)
    grams = _input_gram(tap, form.A), _output_gram(tap, form.G)
    ones = torch.ones_like(grams[0][..., 0])
    return Block(
        Z=_of_grams(*grams),
        pair=lambda c, d: Pair(_weighted_inputs(tap, c, form.A), _weighted_outputs(tap, d, form.G)),
        moments=lambda _: (ones / n, ones),
        grams=grams,
    )


def _of_grams(K_a: Float[Tensor, "k n n"], K_g: Float[Tensor, "k n n"]) -> Rearranged:
    """Return Z in coefficients of `a_n a_nᵀ` and `Γ_n/n`: both maps are the identity, the duals do the work."""
    ones = torch.ones_like(K_a[..., 0])
    count = torch.arange(ones.shape[-1], dtype=ones.dtype, device=ones.device)
    return Rearranged(
        left=lambda dual: dual,
        right=lambda dual: dual,
        left_dual=lambda c: _times(K_a, c),
        right_dual=lambda d: _times(K_g, d),
        start=lambda which: ones * (1.25 + torch.cos((1 + which) * count)),  # positive, generic
        rounding=1e-7,  # norms are roots of quadratic forms of a possibly singular matrix
    )


def _times(K: Float[Tensor, "k n n"], x: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
    return (x.unsqueeze(-2) @ K).squeeze(-2)  # K is symmetric; products with columns are six times slower


def _input_gram(tap: Tap, diagonal: bool) -> Float[Tensor, "k n n"]:
    """Return `⟨a_n a_nᵀ, a_m a_mᵀ⟩`, or the same of the diagonals."""
    if isinstance(tap.a, rows.OneHot):
        return rows.gram(tap.a).double()
    a = rows.dense(tap.a).squeeze(2).double()  # in float64, so that numerical noise does not make the matrix indefinite
    return a.square() @ a.square().mT if diagonal else (a @ a.mT).square()


def _output_gram(tap: Tap, diagonal: bool) -> Float[Tensor, "k n n"]:
    """Return `⟨Γ_n, Γ_m⟩` of `Γ_n = Σ_s g gᵀ`, or of the diagonals, from pairs of samples or from rows of Γ."""
    k, s, n, _, o, _ = tap.sizes
    g = tap.g.squeeze(3).double()
    if diagonal:
        squares = g.square().sum(1)
        return squares @ squares.mT
    if s * s <= s * o + o:  # in units of n² o: pairs of samples against forming Γ, n s o² (n ~ o), and its products
        pairs = ((g[:, r] @ g[:, q].mT).square() for r in range(s) for q in range(s))
        return reduce(operator.add, pairs)
    step = max(1, KEPT // (k * n * o))
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


# any positions: maps between matrices ----------------------------------------------------------------------------


class _Maps(NamedTuple):
    """Functions for sums over examples: the pieces of a tap, and both maps of one piece."""

    pieces: Callable[[AnyTap], Iterable[Any]]
    left: Callable[[Any, Factor, Forms], Factor]
    right: Callable[[Any, Factor, Forms], Factor]


def _by_maps(tap: AnyTap, form: Forms, guess: Factor, mean: Mean, whole: bool) -> Rearranged:
    maps, numbers = (_FACTORED, _rows_of) if _factored_is_cheaper(tap) else (_MATRICES, _matrices_of)
    pieces = maps.pieces
    if whole and numbers(tap.sizes) <= KEPT:
        made = list(maps.pieces(tap))
        pieces = lambda _: made  # noqa: E731

    def applied(one: Callable[[Any, Factor, Forms], Factor], X: Factor, diagonal: bool) -> Factor:
        def moment(part: AnyTap) -> Factor:
            return reduce(operator.add, (one(piece, X, form) for piece in pieces(part))) / part.sizes.n

        return _symmetric(mean(moment, tap), diagonal)

    return Rearranged(
        left=lambda V: applied(maps.left, V, form.A),
        right=lambda U: applied(maps.right, U, form.G),
        left_dual=lambda U: U,
        right_dual=lambda V: V,
        start=lambda which: _start(guess, which),
        rounding=64 * torch.finfo(guess.dtype).eps,
    )


def _start(guess: Factor, which: int) -> Factor:
    """Return the guess plus a small part of every direction; the second start vector is only generic."""
    o = guess.shape[-1]
    ramp = torch.arange(1, o + 1, dtype=guess.dtype, device=guess.device)
    if kron.is_diagonal(guess):
        generic = 1 + 0.25 * torch.cos((1 + which) * ramp * ramp)
    else:
        eye = torch.eye(o, dtype=guess.dtype, device=guess.device)
        generic = eye + 0.25 / o**0.5 * torch.cos((1 + which) * ramp[:, None] * ramp)
    generic = generic / generic.square().sum().sqrt()
    norm = kron.dot(guess, guess).sqrt()
    return kron.times(guess, torch.where((norm > 0) & (which == 0), 1 / norm, 0.0)) + 0.1 * generic


def _factored_is_cheaper(tap: AnyTap) -> bool:
    """Return True if `aᵀ(gVgᵀ)a` needs fewer multiplications than `WᵀVW`, or if the rows are one-hot."""
    _, _, _, t, o, i = tap.sizes
    if isinstance(tap.window(slice(0, 1)).whole().a, rows.OneHot):
        return True
    return t * (o * o + i * i) + t * t * (o + i) < o * i * (o + i)


def _rows_of(sizes: Sizes) -> int:
    k, s, n, t, o, i = sizes
    return k * n * t * (i + s * o)


def _matrices_of(sizes: Sizes) -> int:
    k, s, n, _, o, i = sizes
    return k * s * n * o * i


def _made(tap: AnyTap) -> Iterable[Tap]:
    """Yield windows with `a` as a tensor, or one-hot."""
    for part in tap.windows():
        made = _float(part)
        yield made if isinstance(made.a, rows.OneHot) else Tap(rows.dense(made.a), made.g)


def _left_factored(tap: Any, V: Factor, form: Forms) -> Factor:
    """Return `Σ aᵀ (g V gᵀ) a`."""
    gV = tap.g * V[:, None, None, None] if form.G else tap.g @ V[:, None, None]
    M = torch.einsum("ksnto,ksnuo->kntu", gV, tap.g)
    if isinstance(tap.a, rows.OneHot):
        weights = (M * rows.alike(tap.a)).sum(-1, keepdim=True)
        return rows.outer(weights, tap.a).squeeze(1)
    a: Tensor = tap.a
    Ma = M @ a
    return (a * Ma).sum((1, 2)) if form.A else a.flatten(1, 2).mT @ Ma.flatten(1, 2)


def _right_factored(tap: Any, U: Factor, form: Forms) -> Factor:
    """Return `Σ gᵀ (a U aᵀ) g`."""
    if isinstance(tap.a, rows.OneHot):
        M = rows.times(tap.a, U.unsqueeze(-1)) * rows.alike(tap.a)
    else:
        aU = tap.a * U[:, None, None] if form.A else tap.a @ U[:, None]
        M = aU @ tap.a.mT
    g: Tensor = tap.g
    Mg = M.unsqueeze(1) @ g
    return (g * Mg).sum((1, 2, 3)) if form.G else g.flatten(1, 3).mT @ Mg.flatten(1, 3)


def _matrices(tap: AnyTap) -> Iterable[Float[Tensor, "k o m i"]]:
    """Yield W of some examples, in the layout in which both maps are plain products."""
    for part in matrix_windows(tap):
        yield example_matrices(_float(part)).flatten(0, 1).permute(1, 2, 0, 3).contiguous()


def _left_matrices(W: Float[Tensor, "k o m i"], V: Factor, form: Forms) -> Factor:
    """Return `Σ Wᵀ V W`."""
    VW = kron.left(V, W.flatten(2)).reshape(W.shape)
    return (W * VW).sum((1, 2)) if form.A else W.flatten(1, 2).mT @ VW.flatten(1, 2)


def _right_matrices(W: Float[Tensor, "k o m i"], U: Factor, form: Forms) -> Factor:
    """Return `Σ W U Wᵀ`."""
    WU = kron.right(W.flatten(1, 2), U).reshape(W.shape)
    return (WU * W).sum((2, 3)) if form.G else WU.flatten(2) @ W.flatten(2).mT


_FACTORED = _Maps(_made, _left_factored, _right_factored)
_MATRICES = _Maps(_matrices, _left_matrices, _right_matrices)


def _symmetric(x: Factor, diagonal: bool) -> Factor:
    return x if diagonal else (x + x.mT) / 2


def _float(tap: Any) -> Any:
    """Cast to at least float32, whatever the dtype of the model."""
    dtype = tap.window(slice(0, 1)).whole().g.dtype
    return tap.to(torch.promote_types(dtype, torch.float32))


def overlap(pairs: Sequence[Pair], tap: AnyTap) -> tuple[Tensor, Tensor]:
    """Return `⟨F, F̂⟩` and `‖F̂‖²` of a block and a sum of Kronecker products, without forming either."""
    Z = _by_maps(tap, kron.forms_of(pairs[0]), pairs[0].G, lambda moment, whole: moment(whole), whole=True)
    products = torch.stack([kron.dot(Z.left(pair.G), pair.A) for pair in pairs])
    return products.sum(), kron.inner(pairs, pairs).sum()
