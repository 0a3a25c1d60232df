"""The condition that `info` reports: exact where eigenvalues are there, else a lower bound that costs nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fisherfn as ff
from fisherfn.linalg import damped
from fisherfn.linalg.kron import Pair
from fisherfn.linalg.solve import condition
from tests import zoo
from tests.methods.protocol import METHODS


def psd(seed, d):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(2, d, d, generator=generator, dtype=torch.float64)
    return root @ torch.diag(torch.logspace(0, -3, d, dtype=torch.float64)) @ root.mT


def dense(G, A, shift):
    """The condition numbers of both groups."""
    blocks = [torch.kron(g, a) for g, a in zip(G, A, strict=True)]
    return torch.stack([torch.linalg.cond(block + shift * torch.eye(len(block))) for block in blocks])


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 5))
def test_with_eigenvalues_it_is_the_condition_number(seed, o, i):
    pair, λ = Pair(psd(seed, i), psd(seed + 1, o)), torch.tensor(0.1, dtype=torch.float64)
    _, _, measured = damped.eigen(pair, λ)
    torch.testing.assert_close(measured["condition"], dense(pair.G, pair.A, λ))


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 5))
def test_with_cholesky_factors_it_is_a_lower_bound(seed, o, i):
    pair, λ = Pair(psd(seed, i), psd(seed + 1, o)), torch.tensor(0.1, dtype=torch.float64)
    _, _, measured = damped.factored(pair, λ)
    shift_A, shift_G = damped.shares(pair, λ)
    A, G = (M + s[:, None, None] * torch.eye(M.shape[-1]) for M, s in ((pair.A, shift_A), (pair.G, shift_G)))
    assert (measured["condition"] >= 1).all() and (measured["condition"] <= dense(G, A, 0.0) * (1 + 1e-9)).all()


def test_the_estimate_is_exact_for_diagonal_matrices():
    values = torch.tensor([[1.0, 4.0, 0.5], [1.0, 1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(condition(torch.diag_embed(values.sqrt())), torch.tensor([8.0, 1.0]).double())
    pair = Pair(values, torch.ones(2, 1, dtype=torch.float64))
    _, _, measured = damped.factored(pair, torch.tensor(0.0, dtype=torch.float64))
    torch.testing.assert_close(measured["condition"], torch.tensor([8.0, 1.0]).double())


@pytest.mark.parametrize("id", ["mlp-categorical", "conv"])
@METHODS
def test_every_method_reports_condition_and_jitter_of_every_block(method, id):
    problem = zoo.pick(id)
    ng = problem.build(fisher="mc", method=ff.METHODS[method]())
    generator = torch.Generator().manual_seed(0)
    _, _, info = ng.step(problem.params, ng.init(problem.params, damping=0.1), problem.batch, generator=generator)
    blocks = {block.key for block in ng.layout.blocks}
    for name in ("jitter", "condition"):
        assert info.diagnostics[name].keys() == blocks, name
    assert all(torch.isfinite(value) and value >= 1 for value in info.diagnostics["condition"].values())


@METHODS
def test_more_damping_never_makes_it_worse(method):
    problem = zoo.pick("mlp-categorical")
    ng = problem.build(fisher="mc", method=ff.METHODS[method]())
    found = []
    for damping in (1e-3, 1e3):
        generator = torch.Generator().manual_seed(0)
        state = ng.init(problem.params, damping=damping)
        found.append(ng.step(problem.params, state, problem.batch, generator=generator)[2].diagnostics["condition"])
    assert all(found[1][key] <= found[0][key] for key in found[0])
