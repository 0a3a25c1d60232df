"""The rearranged block against the dense one, entry by entry: both maps, by examples, by rows and by matrices.

With Z the rearrangement of F, `Z vec(V)` is `vec(1/N Σ Wᵀ V W)`, and `uᵀ Z v` is the inner product of F with
`mat(v) ⊗ mat(u)`. Vectors of a diagonal side are diagonals.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisherfn import rearrangement
from fisherfn.linalg import kron
from fisherfn.linalg.golub_kahan import leading
from fisherfn.linalg.kron import Forms, Pair
from fisherfn.rearrangement import examples
from fisherfn.rearrangement.examples import ExampleBlock, has_grams
from fisherfn.rearrangement.matrices import ExampleMatrixMap, FactoredMap, MatrixBlock, matrix_map
from fisherfn.taps import ChunkedTap, Tap
from tests import drawn, kron_oracles
from tests.oracles import close

FORMS = st.sampled_from([Forms(False, False), Forms(True, False), Forms(False, True), Forms(True, True)])


def dense(W):
    """Return Z `[k, i·i, o·o]` of the block with these per-example gradients `[s n k o i]`."""
    rows = W.flatten(0, 1)
    blocks = [rows[:, k].flatten(1).T @ rows[:, k].flatten(1) / W.shape[1] for k in range(W.shape[2])]
    return torch.stack([kron_oracles.rearranged(F, *W.shape[3:]) for F in blocks])


def symmetric(k, size, diagonal, seed):
    full = drawn.symmetric(k, size, seed)
    return full.diagonal(dim1=1, dim2=2) if diagonal else full


def flat(factor):
    return drawn.matrix(factor).flatten(1)


def in_form(matrices, diagonal):
    """Return what a map gives for these matrices: their symmetric part, or their diagonal."""
    return matrices.diagonal(dim1=1, dim2=2) if diagonal else (matrices + matrices.mT) / 2


def any_matrix(k, size, diagonal, seed):
    full = drawn.normal(k, size, size, seed=seed)
    return full.diagonal(dim1=1, dim2=2) if diagonal else full


def check_maps(Z, W, form, seed):
    """Compare both maps with products with the dense Z: of matrices of no symmetry, the results are symmetrised."""
    _, _, k, o, i = W.shape
    V, U = any_matrix(k, o, form.G, seed), any_matrix(k, i, form.A, seed + 1)
    expected = dense(W)
    left, right = (expected @ flat(V).unsqueeze(-1)).squeeze(-1), (flat(U).unsqueeze(1) @ expected).squeeze(1)
    close(Z.left(V), in_form(left.reshape(k, i, i), form.A))
    close(Z.right(U), in_form(right.reshape(k, o, o), form.G))


@pytest.mark.parametrize("kind", drawn.ROWS)
@pytest.mark.parametrize("cls", [FactoredMap, ExampleMatrixMap])
@given(drawn.sizes(), FORMS, drawn.SEEDS, st.sampled_from([0, 1, 2]))
def test_maps_between_matrices_are_products_with_z(kind, cls, sizes, form, seed, chunk):
    """Take a whole batch, or chunks of one or two examples; the last chunk may be shorter."""
    tap, W = drawn.tap(kind, sizes, seed)
    k, _, _, _, o, _ = sizes
    form = Forms(True, form.G) if kind == "one-hot" else form
    Z = cls(ChunkedTap(tap, chunk) if chunk else tap, form, drawn.factor(k, o, form.G))
    check_maps(Z, W, form, seed)


@pytest.mark.parametrize("cls", [FactoredMap, ExampleMatrixMap])
def test_pieces_that_are_not_kept_are_computed_again(cls, monkeypatch):
    monkeypatch.setattr("fisherfn.rearrangement.matrices.KEPT", 0)
    tap, W = drawn.tap("dense", (2, 2, 3, 2, 3, 4))
    check_maps(cls(tap, Forms(False, False), drawn.psd(2, 3)), W, Forms(False, False), 0)


@pytest.mark.parametrize("kind", drawn.ROWS)
@pytest.mark.parametrize("samples", [1, 2, 9])
@given(st.tuples(*[st.integers(1, 3)] * 2), st.tuples(*[st.integers(2, 4)] * 2), FORMS, drawn.SEEDS)
def test_coefficients_of_examples_are_vectors_of_z(kind, samples, many, widths, form, seed):
    """A vector is a combination of `a aᵀ` or of Γ/N; the duals are its inner products with these."""
    (k, n), (o, i) = many, widths
    tap, W = drawn.tap(kind, (k, samples, n, 1, o, i), seed)
    form = Forms(True, form.G) if kind == "one-hot" else form
    block = ExampleBlock.of(tap, form)
    c, d = drawn.normal(k, n, seed=seed), drawn.normal(k, n, seed=seed + 1)
    pair, Z = block.pair(c, d), dense(W)
    image, back = block.pair(block.Z.left(block.Z.right_dual(d)), block.Z.right(block.Z.left_dual(c)))
    left = (Z @ flat(pair.G).unsqueeze(-1)).squeeze(-1).reshape(k, i, i)
    right = (flat(pair.A).unsqueeze(1) @ Z).squeeze(1).reshape(k, o, o)
    close(image, in_form(left, form.A))
    close(back, in_form(right, form.G))
    close(kron.dot(c, block.Z.left_dual(c)), kron.dot(pair.A, pair.A))
    close(kron.dot(d, block.Z.right_dual(d)), kron.dot(pair.G, pair.G))
    assert torch.linalg.matrix_rank(torch.stack([block.Z.start(0), block.Z.start(1)], 1)).min() == min(2, n)


def test_rows_of_gamma_are_computed_some_at_a_time(monkeypatch):
    """Many samples: Γ is formed, a row of every example at a time."""
    tap, W = drawn.tap("dense", (2, 9, 3, 1, 4, 3))
    whole = ExampleBlock.of(tap, Forms(False, False)).Z.K_g
    monkeypatch.setattr(examples, "STEP", 1)
    close(ExampleBlock.of(tap, Forms(False, False)).Z.K_g, whole)
    gammas = torch.einsum("ksno,ksnp->knop", tap.g.squeeze(3), tap.g.squeeze(3)).flatten(2) / 3
    close(whole, gammas @ gammas.mT)


@pytest.mark.parametrize("positions", [1, 2])
@pytest.mark.parametrize("form", [Forms(False, False), Forms(True, False)])
def test_vectors_of_a_pair_are_turned_back_into_it(positions, form):
    """K-FAC's own factors, in whatever form the block has its vectors."""
    tap, W = drawn.tap("dense", (1, 2, 4, positions, 3, 4))
    A, G = tap.input_moment(3 if form.A else 9) / 4, tap.output_moment(9) / (4 * positions)
    block = rearrangement.rearranged(tap, [Pair(A, G)])
    assert isinstance(block, ExampleBlock if positions == 1 else MatrixBlock)
    found = block.pair(*block.vectors(Pair(A, G)))
    close(kron.times(found.A, 1 / found.A.norm().reshape(1)), kron.times(A, 1 / A.norm().reshape(1)))
    close(found.A.norm() * found.G.norm(), A.norm() * G.norm())
    assert kron.forms_of(found) == form


def test_the_route_follows_positions_widths_and_chunks():
    tap, _ = drawn.tap("dense", (1, 1, 4, 1, 3, 4))
    assert has_grams(tap) and not has_grams(ChunkedTap(tap, 2))
    assert not has_grams(drawn.tap("dense", (1, 1, 4, 2, 3, 4))[0])
    assert not has_grams(drawn.tap("dense", (1, 1, 4, 1, 1, 4))[0])
    few, many = (drawn.tap("dense", (1, 1, 2, t, 6, 6))[0] for t in (1, 40))
    assert isinstance(matrix_map(few, Forms(False, False), drawn.psd(1, 6)), FactoredMap)
    assert isinstance(matrix_map(many, Forms(False, False), drawn.psd(1, 6)), ExampleMatrixMap)
    one_hot = drawn.tap("one-hot", (1, 1, 2, 40, 6, 6))[0]
    assert isinstance(matrix_map(one_hot, Forms(True, False), drawn.psd(1, 6)), FactoredMap)


@pytest.mark.parametrize("diagonal", [False, True])
def test_the_first_start_is_near_the_guess_and_the_second_is_not(diagonal):
    tap, _ = drawn.tap("dense", (2, 1, 3, 2, 4, 3))
    guess = 1e3 * drawn.factor(2, 4, diagonal)
    Z = FactoredMap(tap, Forms(False, diagonal), guess)
    first, second = Z.start(0), Z.start(1).expand_as(guess)
    cosine = torch.nn.functional.cosine_similarity(first.flatten(1), guess.flatten(1))
    assert (cosine > 0.98).all() and (cosine < 1).all()
    assert torch.isfinite(FactoredMap(tap, Forms(False, diagonal), 0 * guess).start(0)).all()
    close(flat(second).norm(dim=1), torch.full((2,), 0.1, dtype=torch.float64))


@pytest.mark.parametrize("kind", drawn.ROWS)
@pytest.mark.parametrize("positions", [1, 3])
def test_overlaps_are_those_of_the_dense_matrices(kind, positions):
    tap, W = drawn.tap(kind, (2, 2, 3, positions, 3, 4))
    pairs = [Pair(symmetric(2, 4, kind == "one-hot", r), symmetric(2, 3, False, r + 5)) for r in range(2)]
    rows = W.flatten(0, 1).transpose(0, 1).flatten(2)
    F = rows.mT @ rows / 3
    fitted = torch.stack([kron_oracles.kron_sum(*[(p.A[k], p.G[k]) for p in pairs]) for k in range(2)])
    cross, square = rearrangement.overlap(pairs, tap)
    close(cross, (F * fitted).sum())
    close(square, fitted.square().sum())


def test_stacked_blocks_have_the_triplets_of_each():
    taps = [Tap(drawn.normal(k, 5, 1, 4, seed=k), drawn.normal(k, 1, 5, 1, 3, seed=k + 3)) for k in (1, 2)]
    pairs = [Pair(drawn.psd(k, 4), drawn.psd(k, 3)) for k in (1, 2)]
    blocks = [rearrangement.rearranged(tap, [pair]) for tap, pair in zip(taps, pairs, strict=True)]
    together = leading(rearrangement.stack_blocks(blocks), 5, 2)
    alone = [leading(block.Z, 5, 2) for block in blocks]
    for r in range(2):
        close(together[r].square, torch.cat([each[r].square for each in alone]))
    assert rearrangement.stack_blocks(blocks[:1]) is blocks[0].Z


# ----------------------------------------------------------------------------------- blocks that are iterated together

TAPS = {key: drawn.tap("dense", sizes)[0] for key, sizes in drawn.TOGETHER.items()}


def test_in_one_list_are_blocks_of_one_position_and_as_many_examples():
    assert rearrangement.group_by_batch_size(TAPS) == [["linear", "groups", "wide"], ["shared"], ["half"], ["narrow"]]
    chunks = {key: ChunkedTap(tap, 3) for key, tap in TAPS.items()}
    assert rearrangement.group_by_batch_size(chunks) == [[key] for key in TAPS]


@pytest.mark.parametrize(("groups", "lists"), [(4, 1), (3, 2), (2, 3), (0, 3)])
def test_the_gram_matrices_of_a_list_fit_into_a_stated_memory(monkeypatch, groups, lists):
    """`groups` has two of them; a block alone is iterated on whatever it needs."""
    monkeypatch.setattr(rearrangement, "JOINED", 2 * 8**2 * groups)
    taps = {key: TAPS[key] for key in ("linear", "groups", "wide")}
    assert len(rearrangement.group_by_batch_size(taps)) == lists
