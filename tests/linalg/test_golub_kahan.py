"""Leading singular triplets of small maps against `torch.linalg.svd`: also equal, zero and unsound ones."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisherfn.linalg.golub_kahan import Deflated, LinearMap, Triplet, by_block, leading
from tests import drawn
from tests.oracles import close


@dataclass(frozen=True)
class Dense(LinearMap):
    """A matrix per group; the two sides have the inner products `xᵀ P y` and `xᵀ R y`, or the usual ones."""

    Z: torch.Tensor
    P: torch.Tensor | None = None
    R: torch.Tensor | None = None
    rounding = 1e-13

    def left(self, dual_V):
        return self.times(self.Z, dual_V)

    def right(self, dual_U):
        return self.times(self.Z.mT, dual_U)

    def left_dual(self, U):
        return U if self.P is None else self.times(self.P, U)

    def right_dual(self, V):
        return V if self.R is None else self.times(self.R, V)

    def start(self, which):
        count = torch.arange(self.Z.shape[-1], dtype=self.Z.dtype)
        return (1.25 + torch.cos((1 + which) * count)).expand(len(self.Z), -1).clone()

    @staticmethod
    def times(matrix, x):
        return (matrix @ x.unsqueeze(-1)).squeeze(-1)


def rank_one(triplet):
    """Return `u vᵀ` of each group: free of the sign of both."""
    return triplet.u.unsqueeze(-1) * triplet.v.unsqueeze(-2)


def check(Z, triplets):
    """Compare with the SVD, where the singular values have a gap."""
    U, sigma, Vh = torch.linalg.svd(Z, full_matrices=False)
    for r, triplet in enumerate(triplets):
        close(triplet.square, sigma[:, r].square())
        close(rank_one(triplet), sigma[:, r, None, None] * U[..., r : r + 1] * Vh[:, r : r + 1], tol=1e-6)
        close(triplet.v.norm(dim=-1), torch.ones(len(Z)).double())


def with_values(sigma, rows=6, columns=5, seed=0):
    """Return matrices with these singular values, two groups."""
    U = torch.linalg.qr(drawn.normal(2, rows, rows, seed=seed))[0][..., : len(sigma)]
    V = torch.linalg.qr(drawn.normal(2, columns, columns, seed=seed + 1))[0][..., : len(sigma)]
    return U * torch.tensor(sigma).double() @ V.mT


@given(st.integers(2, 6), st.integers(2, 6), st.integers(1, 2), drawn.SEEDS)
def test_all_steps_give_the_leading_triplets(rows, columns, rank, seed):
    Z = with_values([3.0, 2.0, 1.0, 0.5, 0.2, 0.1][: min(rows, columns)], rows, columns, seed)
    triplets = leading(Dense(Z), columns + 1, rank)
    assert len(triplets) == rank
    check(Z, triplets)


def test_steps_far_beyond_the_dimension_do_no_harm():
    Z = with_values([3.0, 1.0, 0.3])
    check(Z, leading(Dense(Z), 30, 2))


def test_two_equal_singular_values_are_two_triplets():
    """One start has a Krylov space with one direction of such a pair; a second start continues."""
    Z = with_values([2.0, 2.0, 1.0])
    first, second = leading(Dense(Z), 8, 2)
    close(first.square, torch.full((2,), 4.0).double())
    close(second.square, torch.full((2,), 4.0).double())
    assert (first.v * second.v).sum(-1).abs().max() < 1e-8
    rest = Z - rank_one(first) - rank_one(second)
    close(torch.linalg.svdvals(rest)[:, 0], torch.ones(2).double())


def test_a_triplet_is_sought_after_a_known_one():
    Z = with_values([3.0, 2.0, 1.0, 0.2])
    first, guess = leading(Dense(Z), 3, 2)
    (second,) = leading(Dense(Z), 6, after=(leading(Dense(Z), 8)[0], guess))
    check(Z, (first._replace(**leading(Dense(Z), 8)[0]._asdict()), second))


def test_deflation_subtracts_a_product_from_both_maps():
    Z, u, v = drawn.normal(2, 4, 3), drawn.normal(2, 4, seed=1), drawn.normal(2, 3, seed=2)
    rest, map_ = Z - u.unsqueeze(-1) * v.unsqueeze(-2), Deflated(Dense(Z), u, v)
    x, y = drawn.normal(2, 3, seed=3), drawn.normal(2, 4, seed=4)
    close(map_.left(x), Dense.times(rest, x))
    close(map_.right(y), Dense.times(rest.mT, y))
    check(rest, leading(map_, 5, 2))
    assert map_.rounding == Dense.rounding and torch.equal(map_.start(1), Dense(Z).start(1))


def test_inner_products_of_the_sides_are_those_of_the_duals():
    """The SVD of P^½ Z R^½ in the coordinates P^½ u and R^½ v."""
    Z, P, R = drawn.normal(2, 4, 3), drawn.psd(2, 4, 1), drawn.psd(2, 3, 2)
    map_ = Dense(Z, P, R)
    root_P, root_R = (torch.linalg.cholesky(M).mT for M in (P, R))
    # the map takes duals: Z R v, with ⟨x, y⟩ = xᵀ R y
    _, sigma, _ = torch.linalg.svd(root_P @ Z @ root_R.mT)
    triplets = leading(map_, 5, 2)
    for r, triplet in enumerate(triplets):
        close(triplet.square, sigma[:, r].square())
        close(Dense.times(root_R, triplet.v).norm(dim=-1), torch.ones(2).double())
        close(triplet.u, Dense.times(Z, Dense.times(R, triplet.v)))
    deflated = Deflated(map_, triplets[0].u, triplets[0].v)
    close(leading(deflated, 5)[0].square, sigma[:, 1].square())


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_residual_is_what_the_triplet_misses(steps):
    """‖Zᵀu − σ² v‖ / σ², also before convergence."""
    Z = with_values([3.0, 2.5, 2.0, 1.0])
    (triplet,) = leading(Dense(Z), steps)
    missed = Dense.times(Z.mT, triplet.u) - triplet.square.unsqueeze(-1) * triplet.v
    assert (missed.norm(dim=-1) > 1e-3).all(), "converged: what is compared is numerical noise"
    close(triplet.residual, missed.norm(dim=-1) / triplet.square)


@pytest.mark.parametrize("power", [-70, -30, 30, 60])
def test_the_scale_of_a_map_scales_its_triplets(power):
    """The fourth power of a singular value overflows in float32 above 2**32."""
    Z = with_values([3.0, 2.5, 1.0, 0.5]).float()
    for one, scaled in zip(leading(Dense(Z), 3, 2), leading(Dense(Z * 2.0**power), 3, 2), strict=True):
        assert (one.residual > 1e-3).all(), "converged: what is compared is numerical noise"
        torch.testing.assert_close(scaled.u * 2.0**-power, one.u)
        torch.testing.assert_close(scaled.v, one.v)
        torch.testing.assert_close(scaled.residual, one.residual)


def test_a_map_of_denormal_numbers_has_finite_triplets():
    for triplet in leading(Dense(with_values([3.0, 2.0, 1.0]).float() * 1e-42), 3, 2):
        assert all(torch.isfinite(part).all() for part in triplet)


def test_a_map_of_zeros_has_triplets_of_zeros():
    for triplet in leading(Dense(torch.zeros(2, 4, 3).double()), 4, 2):
        assert not triplet.u.any() and not triplet.square.any() and torch.isfinite(triplet.residual).all()


def test_a_group_that_is_not_finite_spoils_no_other():
    Z = with_values([3.0, 2.0, 1.0])
    bad = Z.clone()
    bad[0, 1, 1] = torch.nan
    for found, clean in zip(leading(Dense(bad), 6, 2), leading(Dense(Z), 6, 2), strict=True):
        assert not torch.isfinite(found.u[0]).all()
        close(rank_one(found)[1], rank_one(clean)[1])


def test_groups_are_split_into_blocks():
    triplets = [Triplet(*(drawn.normal(3, 2, seed=r), drawn.normal(3, 4), *drawn.normal(2, 3))) for r in range(2)]
    one, two = by_block(triplets, [1, 2])
    assert len(one) == len(two) == 2
    close(one[1].u, triplets[1].u[:1])
    close(two[0].v, triplets[0].v[1:])
    close(two[1].square, triplets[1].square[1:])
