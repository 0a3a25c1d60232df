"""Spectra against torch's dense ones, and where matrices are singular."""

import pytest
import torch

from fisherfn.linalg.solve import eigh, psd_eigh


def psd(rank: int, size: int = 6, groups: int = 2) -> torch.Tensor:
    rows = torch.randn(groups, rank, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return rows.mT @ rows


def test_nan_is_a_mask_not_an_exception():
    nan = torch.full((1, 3, 3), torch.nan, dtype=torch.float64)
    assert not psd_eigh(nan).ok


def test_eigenvalues_that_are_rounding_are_zero():
    """Rank one in six dimensions: five eigenvalues are exactly zero, whatever sign their rounding had."""
    spectrum = psd_eigh(psd(1))
    assert (spectrum.values[:, :-1] == 0).all() and (spectrum.values[:, -1] > 0).all()
    rebuilt = (spectrum.vectors * spectrum.values.unsqueeze(-2)) @ spectrum.vectors.mT
    torch.testing.assert_close(rebuilt, psd(1), rtol=1e-10, atol=1e-10)


def test_eigenvectors_of_dead_units_are_finite(monkeypatch):
    """Low rank, half of the rows zero: float32 routines fail for some of these, unless every row is mixed in."""
    monkeypatch.setattr("fisherfn.linalg.solve._eigh64", None)
    for seed in range(300):
        rng = torch.Generator().manual_seed(seed)
        x = torch.randn(100, 8, generator=rng) * torch.logspace(0, -4, 8)
        x[torch.randperm(100, generator=rng)[:50]] = 0
        matrix = ((x * torch.sign(torch.randn(8, generator=rng))) @ x.mT).unsqueeze(0)
        values, vectors = eigh((matrix + matrix.mT) / 2)
        assert torch.isfinite(values).all() and torch.isfinite(vectors).all()
        assert ((vectors * values.unsqueeze(-2)) @ vectors.mT - matrix).norm() < 1e-5 * matrix.norm()
        assert (vectors.mT @ vectors - torch.eye(100)).abs().max() < 1e-5


@pytest.mark.parametrize("found", ["an error", "NaN"])
def test_a_failed_decomposition_in_float32_is_repeated_in_float64(found, monkeypatch):
    decompose, seen = torch.linalg.eigh, []

    def failing(matrix):
        seen.append(matrix.dtype)
        if matrix.dtype == torch.float64:
            return decompose(matrix)
        if found == "an error":
            raise torch.linalg.LinAlgError("did not converge")
        return matrix[..., 0], torch.full_like(matrix, torch.nan)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    matrix = psd(6).float()
    values, vectors = eigh(matrix)
    assert seen == [torch.float32, torch.float64] and vectors.dtype == torch.float32
    torch.testing.assert_close((vectors * values.unsqueeze(-2)) @ vectors.mT, matrix)
