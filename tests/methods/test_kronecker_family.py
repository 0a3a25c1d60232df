"""Kronecker approximations by their Frobenius errors: against the SVD of the dense rearranged block, and in order.

With Z the rearrangement of a layer's block F: KPSVD leaves all singular values of Z but the first; Deflation and
Lanczos all but the first two among symmetric factors; K-FAC corrected all but the first of F minus K-FAC. Whatever is
best in a larger set is at least as good.
"""

import pytest
import torch
from hypothesis import given as drawn_given

import fisherfn as ff
from tests import kron_oracles, strategies, zoo
from tests.methods.kronecker import (
    FAMILY,
    ITERATIVE,
    TIGHT,
    blocks,
    dense,
    dense_taps,
    drawn_taps,
    factors_of,
    fewer,
    fit,
    given,
    norm,
    normal,
    optimum,
    pairs_of,
    taps_of,
)
from tests.oracles import close
from tests.zoo import sampled

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")
NETS = {
    "linear": strategies.problems(max_shared=1),
    "conv": strategies.read_out(strategies.convolutions(1)) | strategies.read_out(strategies.convolutions(2)),
    "transposed": strategies.read_out(strategies.transposed_convolutions(1))
    | strategies.read_out(strategies.transposed_convolutions(2)),
    "embedding": strategies.embeddings(),
}
EVERY_NET = pytest.mark.parametrize("nets", [pytest.param(nets, id=name) for name, nets in NETS.items()])
RANK_TWO = pytest.mark.parametrize("method", ["deflation", "lanczos"])


def target(name, F, factors):
    """What the method's last term is the best fit of, and with how many terms."""
    if name != "kfac_cor":
        return F, 1 if name == "kpsvd" else 2
    return F - dense(factors.first), 1


def check_optimum(run, params, tol, **options):
    Fs = blocks(run.stats)
    for name, make in ITERATIVE.items():
        for key, factors in fit(run, params, make(**options))[1].factors.items():
            block, rank = target(name, Fs[key], factors)
            least, error, noise = optimum(block, factors, rank), norm(Fs[key] - dense(factors)), 1e-7 * norm(Fs[key])
            assert least - noise <= error <= (1 + tol) * least + noise, f"{name}, {key}"


def errors(problem, fisher):
    """{method: {key: ‖F − F̂‖}} at default iterations, and {key: ‖F‖}."""
    run = sampled(problem, fisher)
    Fs = blocks(run.stats)
    fits = factors_of(run, problem.params, **{name: make() for name, make in FAMILY.items()})
    found = {name: {key: norm(Fs[key] - dense(one[key])) for key in Fs} for name, one in fits.items()}
    return found, {key: norm(F) for key, F in Fs.items()}


ORDER = [
    ("kfac_cor", "kfac", 1e-9),
    ("ekfac", "kfac", 1e-9),
    ("lanczos", "kpsvd", 1e-6),
    ("deflation", "kpsvd", 1e-6),
    ("kpsvd", "kfac", 1e-2),
    ("lanczos", "kfac_cor", 1e-2),
    ("lanczos", "deflation", 1e-2),
    ("deflation", "lanczos", 1e-2),
]


def check_order(problem, fisher):
    found, norms = errors(problem, fisher)
    for better, worse, slack in ORDER:
        for key, size in norms.items():
            limit = (1 + slack) * found[worse][key] + 1e-7 * size
            assert found[better][key] <= limit, f"{better} > {worse} in {key}"


# ------------------------------------------------------------------------------------------------- errors, optimum


@EVERY_NET
def test_errors_are_ordered(nets):
    """deflation = lanczos ≤ kfac_cor ≤ kfac, lanczos ≤ kpsvd ≤ kfac, ekfac ≤ kfac, layer by layer."""

    @fewer(0.4)
    @drawn_given(nets, strategies.fishers())
    def check(problem, fisher):
        check_order(problem, fisher)

    check()


@pytest.mark.parametrize("id", ["mlp-categorical", "sequence-pooled", "scale-vector", "conv-groups", "tokens"])
def test_errors_are_ordered_in_the_zoo(id):
    check_order(zoo.pick(id), "mc")


@EVERY_NET
def test_converged_methods_attain_the_optimum(nets):
    """Each of them the error of the dense SVD."""

    @fewer(0.4)
    @drawn_given(nets, strategies.fishers())
    def check(problem, fisher):
        run = sampled(problem, fisher)
        check_optimum(run, problem.params, 1e-6, iterations=TIGHT)

    check()


@fewer(0.4)
@drawn_given(drawn_taps())
def test_iterating_far_beyond_the_dimension_does_no_harm(taps):
    """A space that is exhausted must neither end in 0/0 nor bring a pair back as another one."""
    problem = given(*taps)
    check_optimum(problem.run, problem.params, 1e-6, iterations=60)


@fewer(0.4)
@drawn_given(drawn_taps(draws=3, examples=24, positions=3, width=8))
def test_default_iterations_attain_the_optimum_within_a_hundredth(taps):
    problem = given(*taps)
    check_optimum(problem.run, problem.params, 1e-2)


@pytest.mark.parametrize("positions", [1, 2])
def test_the_second_singular_value_of_a_larger_layer_is_found(positions):
    """128 examples: too few steps, or steps without orthogonalisation, give a σ₂ too small or σ₁ again."""  # D5
    a, g = taps_of((1, 1, 128, positions, 10, 12))
    problem = given(a, g)
    F = blocks(problem.run.stats)["weight"]
    sigma = kron_oracles.spectrum(F[0], 10, 12, "symmetric")[0]
    assert sigma[2] < 0.95 * sigma[1], "no gap: the second pair is not defined well enough to compare"
    for name in ("deflation", "lanczos"):
        factors = fit(problem.run, problem.params, ITERATIVE[name]())[1].factors["weight"]
        close(torch.stack([A.norm() * G.norm() for A, G in pairs_of(factors)]), sigma[:2], tol=1e-3)


@pytest.mark.parametrize("positions", [1, 2])
def test_two_equal_singular_values_are_two_pairs(positions):
    """Examples of equal length that have nothing in common: a Krylov space holds one direction of such a pair."""
    a = torch.eye(4, dtype=torch.float64).reshape(1, 4 // positions, positions, 4)
    problem = given(a, a[:, None, :, :, :3].flip(-1).clone())
    F = blocks(problem.run.stats)["weight"]
    sigma = kron_oracles.spectrum(F[0], 3, 4, "symmetric")[0]
    close(sigma[1], sigma[0])
    check_optimum(problem.run, problem.params, 1e-6)


def test_lanczos_and_deflation_find_the_very_same_sum():
    problem = given(*taps_of((2, 2, 6, 2, 3, 4)))
    fits = [fit(problem.run, problem.params, ITERATIVE[name](iterations=TIGHT)) for name in ("deflation", "lanczos")]
    close(*(dense(state.factors["weight"]) for _, state, _ in fits), tol=1e-6)


# ---------------------------------------------------------------------------------------------- structure of terms


@EVERY_NET
def test_leading_factors_are_positive_and_all_are_symmetric(nets):
    @fewer(0.2)
    @drawn_given(nets, strategies.fishers())
    def check(problem, fisher):
        fits = factors_of(sampled(problem, fisher), problem.params, **{n: make() for n, make in ITERATIVE.items()})
        for factors in (one for fit_ in fits.values() for one in fit_.values()):
            for rank, pair in enumerate(pairs_of(factors)):
                for M in (kron_oracles.matrix(m) for factor in pair for m in factor):
                    close(M, M.T, tol=1e-12)
                    assert rank or torch.linalg.eigvalsh(M)[0] >= -1e-8 * M.norm()

    check()


@RANK_TWO
@fewer(0.5)
@drawn_given(problem=strategies.problems(max_shared=1) | NETS["conv"])
def test_the_second_term_is_orthogonal_to_the_first(method, problem):
    """⟨A₁,A₂⟩ = ⟨G₁,G₂⟩ = 0: a second term that repeats the first doubles it instead."""  # D1
    factors = fit(sampled(problem), problem.params, ITERATIVE[method](iterations=TIGHT))[1].factors
    for key in factors:
        (A1, G1), (A2, G2) = pairs_of(factors[key])
        for first, second in ((A1, A2), (G1, G2)):
            for x, y in zip(first, second, strict=True):
                strong = (A2.norm() * G2.norm()) > 1e-6 * (A1.norm() * G1.norm())
                assert not strong or abs((x * y).sum()) <= 1e-5 * x.norm() * y.norm(), key


@drawn_given(strategies.problems(max_shared=1))
def test_what_kfac_corrected_leaves_has_nothing_along_its_second_term(problem):
    """⟨F − F̂, G₂ ⊗ A₂⟩ = 0 with K-FAC's own pair first: the correction is of F − K-FAC, not of F."""  # D1
    run = sampled(problem)
    Fs, taps = blocks(run.stats), dense_taps(run.stats)
    factors = fit(run, problem.params, ff.kfac_corrected(iterations=TIGHT))[1].factors
    for key, F in Fs.items():
        for k, one in enumerate(F):
            A, G = kron_oracles.kfac_pair(*(side[k] for side in taps[key]))
            (A1, G1), (A2, G2) = pairs_of(factors[key])
            close(kron_oracles.kron(A1[k], G1[k]), kron_oracles.kron(A, G))
            second = kron_oracles.kron(A2[k], G2[k])
            left = one - kron_oracles.kron(A, G) - second
            assert abs((left * second).sum()) <= 1e-8 * one.square().sum(), key


def antisymmetric_taps():
    """Gradients I, 0.9 J and 0.3 D (J a quarter turn, D = diag(1, -1)): Z maps J to more of J than D to D."""
    J, D = torch.tensor([[0.0, -1.0], [1.0, 0.0]]).double(), torch.diag(torch.tensor([1.0, -1.0])).double()
    W = torch.stack([torch.eye(2).double(), 0.9 * J, 0.3 * D]) + 0.02 * normal(3, 2, 2)
    return torch.eye(2).double().expand(1, 3, 2, 2).clone(), W.mT[None, None].clone()


def test_an_antisymmetric_second_pair_is_passed_over():
    """Over shared positions the second singular pair may be antisymmetric: no curvature, and no eigendecomposition."""
    problem = given(*antisymmetric_taps())
    F = blocks(problem.run.stats)["weight"]
    sigma, A, _, _ = kron_oracles.spectrum(F[0], 2, 2, "all")
    assert (A[1] + A[1].T).norm() < 1e-8 and sigma[1] > sigma[2] > 0.1 * sigma[0], "not the case that is meant"
    for name in ("deflation", "lanczos"):
        factors = fit(problem.run, problem.params, ITERATIVE[name](iterations=TIGHT))[1].factors["weight"]
        for M in (M for pair in pairs_of(factors) for M in pair):
            close(M, M.mT, tol=1e-12)
        close(norm(F - dense(factors)), kron_oracles.optimum(F[0], 2, 2, 2, "symmetric"), tol=1e-6)
        assert norm(F - dense(factors)) > 1.1 * kron_oracles.optimum(F[0], 2, 2, 2, "all")


def test_factors_above_the_width_are_the_best_diagonals():
    problem = given(*taps_of((2, 2, 5, 2, 3, 4)))
    F = blocks(problem.run.stats)["weight"]
    for limit, ndims in ((3, (2, 3)), (1, (2, 2))):
        for name, make in ITERATIVE.items():
            factors = fit(problem.run, problem.params, make(iterations=TIGHT, diagonal_above=limit))[1].factors
            assert [M.ndim for M in pairs_of(factors["weight"])[0]] == list(ndims)
            block, rank = target(name, F, factors["weight"])
            close(norm(F - dense(factors["weight"])), optimum(block, factors["weight"], rank), tol=1e-6)
