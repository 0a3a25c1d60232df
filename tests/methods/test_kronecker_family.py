"""Kronecker approximations by their Frobenius errors: against the SVD of the dense rearranged block, and in order.

With Z the rearrangement of a layer's block F: KPSVD leaves all singular values of Z but the first; Deflation and
Lanczos all but the first two among symmetric factors; K-FAC corrected all but the first of F minus K-FAC. Whatever is
best in a larger set is at least as good.
"""

import pytest
import torch

import fisherfn as ff
from tests import kron_oracles, strategies, zoo
from tests.methods.kronecker import (
    FAMILY,
    ITERATIVE,
    TIGHT,
    as_installed,  # noqa: F401
    blocks,
    dense,
    drawn,
    drawn_taps,
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


def fitted(run, params, builders, **options):
    """{key: {method: factors}}."""
    fits = {name: fit(run, params, make(**options))[1].factors for name, make in builders.items()}
    return {key: {name: fits[name][key] for name in fits} for key in run.stats.taps}


# ------------------------------------------------------------------------------------------------- the order of errors

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
    """Check the order of the errors at default iterations."""
    run = sampled(problem, fisher)
    Fs = blocks(run.stats)
    for key, fits in fitted(run, problem.params, FAMILY).items():
        errors = {name: norm(Fs[key] - dense(factors)) for name, factors in fits.items()}
        for better, worse, slack in ORDER:
            limit = (1 + slack) * errors[worse] + 1e-7 * norm(Fs[key])
            assert errors[better] <= limit, f"{better} > {worse} in {key}"


@EVERY_NET
def test_errors_are_ordered(nets):
    """deflation = lanczos ≤ kfac_cor ≤ kfac, lanczos ≤ kpsvd ≤ kfac, ekfac ≤ kfac, layer by layer."""

    @drawn(0.12, nets, strategies.fishers())
    def check(problem, fisher):
        check_order(problem, fisher)

    check()


@pytest.mark.parametrize("id", ["sequence-pooled", "scale-vector", "conv-groups", "tokens"])
def test_errors_are_ordered_in_the_zoo(id):
    check_order(zoo.pick(id), "mc")


# -------------------------------------------------------------------------------------------------------- the optimum


def check_optimum(F, fits, tol):
    """Each method's error is that of the dense SVD."""
    for name, factors in fits.items():
        target, rank = (F - dense(factors.first), 1) if name == "kfac_cor" else (F, 1 if name == "kpsvd" else 2)
        least, error, noise = optimum(target, factors, rank), norm(F - dense(factors)), 1e-7 * norm(F)
        assert least - noise <= error <= (1 + tol) * least + noise, name


def check_factors(F, fits):
    """Leading factors are PSD, all are symmetric: neither sign of a singular vector is taken for granted."""
    for factors in fits.values():
        for rank, pair in enumerate(pairs_of(factors)):
            for M in (kron_oracles.matrix(m) for factor in pair for m in factor):
                close(M, M.T, tol=1e-12)
                assert rank or torch.linalg.eigvalsh(M)[0] >= -1e-8 * M.norm()


def check_orthogonal(F, fits):
    """⟨A₁,A₂⟩ = ⟨G₁,G₂⟩ = 0: a second term that repeats the first would double it."""
    for name in ("deflation", "lanczos"):
        (A1, G1), (A2, G2) = pairs_of(fits[name])
        for k in range(len(A1)):
            strong = A2[k].norm() * G2[k].norm() > 1e-5 * A1[k].norm() * G1[k].norm()
            for x, y in ((A1[k], A2[k]), (G1[k], G2[k])):
                assert not strong or abs((x * y).sum()) <= 1e-5 * x.norm() * y.norm(), name


def check_projections(F, fits):
    """⟨F − F̂, F̂⟩ = 0: no multiple of F̂ is closer, so sums over positions are counted once, without a factor T."""
    for name in ("kpsvd", "deflation", "lanczos"):
        assert abs(((F - dense(fits[name])) * dense(fits[name])).sum()) <= 1e-6 * F.square().sum(), name


@EVERY_NET
def test_converged_fits_are_those_of_the_dense_svd(nets):
    @drawn(0.2, nets, strategies.fishers())
    def check(problem, fisher):
        run = sampled(problem, fisher)
        Fs = blocks(run.stats)
        for key, fits in fitted(run, problem.params, ITERATIVE, iterations=TIGHT).items():
            check_optimum(Fs[key], fits, 1e-6)
            check_factors(Fs[key], fits)
            check_orthogonal(Fs[key], fits)
            check_projections(Fs[key], fits)

    check()


@drawn(0.12, drawn_taps())
def test_iterating_far_beyond_the_dimension_does_no_harm(taps):
    """A space that is exhausted must neither end in 0/0 nor bring a pair back as another one."""
    problem = given(*taps)
    F, fits = blocks(problem.run.stats)["weight"], fitted(problem.run, problem.params, ITERATIVE, iterations=40)
    check_optimum(F, fits["weight"], 1e-6)
    check_orthogonal(F, fits["weight"])


@drawn(0.25, drawn_taps(groups=1, draws=3, examples=24, positions=3, width=8))
def test_default_iterations_attain_the_optimum_within_a_hundredth(taps):
    problem = given(*taps)
    check_optimum(blocks(problem.run.stats)["weight"], fitted(problem.run, problem.params, ITERATIVE)["weight"], 1e-2)


@pytest.mark.parametrize("positions", [1, 2])
def test_the_second_singular_value_of_a_larger_layer_is_found(positions):
    """128 examples: too few steps, or steps without orthogonalisation, give a σ₂ too small or σ₁ again."""
    problem = given(*taps_of((1, 1, 128, positions, 10, 12)))
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
    check_optimum(F, fitted(problem.run, problem.params, ITERATIVE)["weight"], 1e-6)


# --------------------------------------------------------------------------------------------------- particular pairs


def test_lanczos_and_deflation_find_the_very_same_sum():
    problem = given(*taps_of((2, 2, 6, 2, 3, 4)))
    fits = fitted(problem.run, problem.params, ITERATIVE, iterations=TIGHT)["weight"]
    close(dense(fits["lanczos"]), dense(fits["deflation"]), tol=1e-6)


@drawn(0.25, drawn_taps())
def test_the_residual_of_kfac_corrected_is_orthogonal_to_its_second_term(taps):
    """⟨F − F̂, G₂ ⊗ A₂⟩ = 0 with K-FAC's own pair first: the correction is of F − K-FAC, not of F."""
    problem = given(*taps)
    factors = fit(problem.run, problem.params, ITERATIVE["kfac_cor"]())[1].factors["weight"]
    F_k, second = blocks(problem.run.stats)["weight"], dense(factors.second)
    first = torch.stack([kron_oracles.kron(*kron_oracles.kfac_pair(*one)) for one in zip(*taps, strict=True)])
    close(dense(factors.first), first)
    assert abs(((F_k - first - second) * second).sum()) <= 1e-8 * F_k.square().sum()


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
    fits = fitted(problem.run, problem.params, ITERATIVE, iterations=TIGHT)["weight"]
    check_factors(F, fits)
    for name in ("deflation", "lanczos"):
        close(norm(F - dense(fits[name])), kron_oracles.optimum(F[0], 2, 2, 2, "symmetric"), tol=1e-6)
        assert norm(F - dense(fits[name])) > 1.1 * kron_oracles.optimum(F[0], 2, 2, 2, "all")


@pytest.mark.parametrize(("limit", "ndims"), [(3, [2, 3]), (1, [2, 2])])
def test_factors_above_the_width_are_the_best_diagonals(limit, ndims):
    problem = given(*taps_of((2, 2, 5, 2, 3, 4)))
    F = blocks(problem.run.stats)["weight"]
    fits = fitted(problem.run, problem.params, ITERATIVE, iterations=TIGHT, diagonal_above=limit)["weight"]
    assert all([M.ndim for M in pair] == ndims for factors in fits.values() for pair in pairs_of(factors))
    check_optimum(F, fits, 1e-6)


def test_the_residual_says_how_far_the_leading_pair_has_converged():
    problem = given(*taps_of((1, 1, 24, 2, 7, 8)))
    for name, make in ITERATIVE.items():
        few, many = (fit(problem.run, problem.params, make(iterations=steps))[2] for steps in (2, 30))
        assert 1e-6 < few.diagnostics["residual"]["weight"] < 1, name
        assert many.diagnostics["residual"]["weight"] < 1e-8, name


# ------------------------------------------------------------------------------------------------- the scale of F


@pytest.mark.parametrize("power", [-40, 40, 60])
@pytest.mark.parametrize("name", ITERATIVE)
def test_a_variance_scales_the_factors(name, power):
    """A power of two changes no digit of the statistics: 30 orders of magnitude in float32."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 6, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(96, 2))
    model, params, context = ff.functional(net)
    batch = torch.randn(6, 2, 6, 6), torch.randn(6, 2)

    def found(variance):
        likelihood, method = ff.Gaussian(variance=variance), ITERATIVE[name]()
        ng = ff.natural_gradient(
            model, params, batch[0], likelihood=likelihood, method=method, fisher="type2", context=context
        )
        state, info = ng.update(ng.init(params), ng.stats(params, batch, context=context))
        return pairs_of(state.factors["0"]), info.diagnostics["residual"]["0"]

    (pairs, residual), (scaled, same) = found(1.0), found(2.0**power)
    assert residual > 0
    torch.testing.assert_close(same, residual)
    for one, other in zip(pairs, scaled, strict=True):
        product, expected = (torch.einsum("kij,kop->kijop", *(F.double() for F in pair)) for pair in (other, one))
        close(product * 2.0**power, expected, tol=1e-6)
