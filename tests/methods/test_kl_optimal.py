"""KL-optimal Kronecker factors against dense algebra, one example at a time."""

import pytest
import torch
from torch.func import grad

import fisherfn as ff
from fisherfn.linalg import kron
from fisherfn.linalg.kron import Pair
from fisherfn.taps import Tap
from fisherfn.types import Shape
from tests import kron_oracles
from tests.methods.kronecker import normal, taps_of
from tests.oracles import close

FULL = (1, 1, 40, 1, 3, 4)
"""Sizes of a block with enough examples for a definite F."""
EXACTLY = {"iterations": 60, "relative_damping": 1e-13}


def fitted(method, taps, old=None, rho=0.0):
    a, g = taps
    old = old or Pair(*(torch.zeros(len(a), d, d, dtype=a.dtype) for d in (a.shape[-1], g.shape[-1])))
    factors, measured = method.update_block(old, Tap(a, g), torch.tensor(rho, dtype=a.dtype), inverting=True)
    return factors, measured


def dense_block(taps):
    a, g = taps
    return kron_oracles.block(a[0], g[0])


def divergence(F, A, G):
    """KL(N(0, F) ‖ N(0, G ⊗ A)) from the dense matrices."""
    M = kron_oracles.kron(A, G)
    return 0.5 * (torch.linalg.solve(M, F).trace() - len(F) - torch.linalg.slogdet(F)[1] + torch.linalg.slogdet(M)[1])


def flip_flop(F, o, i, sweeps, damping):
    """Return the dense product of A and G, by sums over all pairs of entries of F as the formula says."""
    F4, A, G = F.reshape(o, i, o, i), torch.eye(i, dtype=F.dtype), torch.eye(o, dtype=F.dtype)

    def inverse(M):
        M = M / (M.trace() / len(M))
        V = torch.linalg.inv(M + damping * torch.eye(len(M), dtype=M.dtype))
        return M, V / (M @ V).trace()

    for _ in range(sweeps):
        A = torch.einsum("piqj,pq->ij", F4, inverse(G)[1])
        unit, V = inverse(A)
        G = torch.einsum("piqj,ij->pq", F4, V)
    return kron_oracles.kron(unit, G)


@pytest.mark.parametrize("sizes", [FULL, (1, 2, 5, 3, 3, 4)], ids=["one position", "three positions"])
@pytest.mark.parametrize("damping", [1e-3, 0.5])
def test_the_factors_are_those_of_the_formula(sizes, damping):
    taps = taps_of(sizes)
    factors, _ = fitted(ff.kl_optimal(iterations=3, relative_damping=damping), taps)
    close(kron_oracles.kron(factors.A[0], factors.G[0]), flip_flop(dense_block(taps), 3, 4, 3, damping))
    empty = Pair(torch.zeros_like(factors.A), torch.zeros_like(factors.G))
    alone = ff.kl_optimal(iterations=3, relative_damping=damping).estimate(Tap(*taps), empty)
    close(alone.A, factors.A)
    close(factors.A.diagonal(dim1=-2, dim2=-1).mean(), factors.G.diagonal(dim1=-2, dim2=-1).mean())
    for M in (*factors.A, *factors.G):
        close(M, M.mT)
        assert torch.linalg.eigvalsh(M)[0] > -1e-12


def test_the_fixed_point_minimises_the_divergence():
    taps = taps_of(FULL)
    F = dense_block(taps)
    factors, measured = fitted(ff.kl_optimal(**EXACTLY), taps)
    A, G = factors.A[0], factors.G[0]
    assert measured["residual"] < 1e-10
    for slope in grad(lambda AG: divergence(F, *AG))((A, G)):
        assert slope.abs().max() < 1e-8
    least = divergence(F, A, G)
    for method in (ff.kfac(), ff.kpsvd(iterations=20)):
        other = method.estimate(Tap(*taps), Pair(torch.zeros_like(factors.A), torch.zeros_like(factors.G)))
        assert divergence(F, other.A[0], other.G[0]) > 1.01 * least


def test_every_sweep_lowers_the_divergence():
    taps = taps_of(FULL, seed=3)
    F, divergences = dense_block(taps), []
    for sweeps in range(1, 5):
        factors, _ = fitted(ff.kl_optimal(iterations=sweeps, relative_damping=1e-13), taps)
        divergences.append(float(divergence(F, factors.A[0], factors.G[0])))
    assert all(later < earlier for earlier, later in zip(divergences, divergences[1:], strict=False))


@pytest.mark.parametrize("damping", [1e-6, 1.0])
def test_a_block_that_is_one_product_is_recovered_whatever_its_rank(damping):
    """The examples are all pairs of three inputs and two output-gradients, in five and four dimensions."""
    a, g = normal(3, 5, seed=1), normal(2, 4, seed=2)
    rows = [(x, y) for x in a for y in g]
    taps = (
        torch.stack([x for x, _ in rows])[None, :, None],
        torch.stack([y for _, y in rows])[None, None, :, None],
    )
    factors, _ = fitted(ff.kl_optimal(iterations=1, relative_damping=damping), taps)
    close(kron_oracles.kron(factors.A[0], factors.G[0]), dense_block(taps))


def test_large_relative_damping_gives_the_factors_of_shampoo():
    taps = taps_of(FULL)
    W = kron_oracles.example_matrices(taps[0][0], taps[1][0])
    A, G = torch.einsum("noi,noj->ij", W, W), torch.einsum("noi,npi->op", W, W)
    factors, _ = fitted(ff.kl_optimal(relative_damping=1e9), taps)
    close(factors.A[0] / factors.A[0].trace(), A / A.trace(), tol=1e-7)
    close(factors.G[0] / factors.G[0].trace(), G / G.trace(), tol=1e-7)


def test_the_running_average_is_the_best_product_for_the_average_of_the_operators():
    method, first, second = ff.kl_optimal(**EXACTLY), taps_of(FULL), taps_of(FULL, seed=7)
    old, _ = fitted(method, first)
    new, _ = fitted(method, second, old, rho=0.7)
    mean = 0.7 * kron_oracles.kron(old.A[0], old.G[0]) + 0.3 * dense_block(second)
    close(kron_oracles.kron(new.A[0], new.G[0]), flip_flop(mean, 3, 4, 60, 1e-13), tol=1e-7)


def test_a_diagonal_factor_is_the_best_diagonal():
    taps = taps_of(FULL)
    F, one = dense_block(taps), torch.ones((), dtype=torch.float64)
    old, _ = ff.kl_optimal(diagonal_above=3).init_block(Shape(1, 3, 4), one.dtype, one.device, one)
    assert kron.forms_of(old) == (True, False)
    factors, _ = fitted(ff.kl_optimal(diagonal_above=3, **EXACTLY), taps, old)
    for slope in grad(lambda AG: divergence(F, *AG))((factors.A[0], factors.G[0])):
        assert slope.abs().max() < 1e-8


def test_a_dead_input_stays_zero_and_an_empty_block_is_zero():
    a, g = taps_of(FULL)
    a[..., 1] = 0
    factors, measured = fitted(ff.kl_optimal(), (a, g))
    assert not factors.A[0][1].any() and not factors.A[0][:, 1].any() and bool(torch.isfinite(measured["residual"]))
    factors, _ = fitted(ff.kl_optimal(), (a, 0 * g))
    assert not kron_oracles.kron(factors.A[0], factors.G[0]).any()
