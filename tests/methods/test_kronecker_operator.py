"""The operator that a Kronecker approximation is: its scale, its order of parameters, its distance to the Fisher."""

import copy

import pytest
import torch
from torch.utils import _pytree as pytree

from tests import kron_oracles, oracles, zoo
from tests.methods.kronecker import (
    FAMILY,
    ITERATIVE,
    TIGHT,
    as_installed,  # noqa: F401
    blocks,
    dense,
    dense_taps,
    fit,
    given,
    norm,
    taps_of,
)
from tests.oracles import close, unvec, vec
from tests.zoo import sampled

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")
EVERY = pytest.mark.parametrize("method", FAMILY)


# ------------------------------------------------------------------------------------------------- scale, mutation


@EVERY
@pytest.mark.parametrize("positions", [1, 2])
def test_the_scale_of_the_gradient_is_only_a_scale(method, positions):
    """F̂ scales by c² and the step at λc² by 1/c²: no absolute tolerance decides when to stop."""  # D6
    a, g = taps_of((1, 2, 6, positions, 3, 4))
    v, results = zoo.random_tree(given(a, g).params), []
    for c in (1.0, 1e-6, 1e6):
        problem = given(a, c * g)
        ng, state, _ = fit(problem.run, problem.params, FAMILY[method](), damping=1e-2 * c**2)
        results.append((vec(ng.matvec(state, v)) / c**2, vec(ng.precondition(ng.invert(state)[0], v)) * c**2))
    for scaled in results[1:]:
        close(torch.stack(scaled), torch.stack(results[0]), tol=1e-6)


def dense_matvec(ng, state, params):
    """The matrix of `ng.matvec`, column by column, in params order."""
    eye = torch.eye(sum(leaf.numel() for leaf in params.values()), dtype=torch.float64)
    return torch.stack([vec(ng.matvec(state, unvec(params, row))) for row in eye], dim=1)


@EVERY
@pytest.mark.parametrize("id", ["mlp-categorical", "conv"])
def test_an_update_leaves_statistics_and_the_old_state_as_they_were(method, id):
    """A normalisation in place would rescale the stored average."""  # D7
    problem = zoo.pick(id)
    ng, state, _ = fit(sampled(problem), problem.params, FAMILY[method]())
    stats = ng.stats(problem.params, (0.5 * problem.x, problem.y), generator=zoo.generator(3))
    kept = copy.deepcopy((stats, state))
    first, second = (ng.invert(ng.update(state, stats)[0])[0] for _ in range(2))
    for now, before in ((first, second), ((stats, state), kept)):
        assert all(torch.equal(x, y) for x, y in zip(*map(pytree.tree_leaves, (now, before)), strict=True))


# -------------------------------------------------------------------------------------- the operator of the network


@EVERY
@pytest.mark.parametrize("id", ["sequence-pooled", "scale-vector", "conv-groups", "tokens"])
def test_matvec_is_the_product_with_the_dense_factors(method, id):
    problem = zoo.pick(id)
    ng, state, _ = fit(sampled(problem), problem.params, FAMILY[method]())
    v = zoo.random_tree(problem.params)
    V, FV = ng.layout.matrices(v), ng.layout.matrices(ng.matvec(state, v))
    for key, factors in state.factors.items():
        rows_k = zip(dense(factors), V[key], strict=True)
        close(FV[key], torch.stack([(M @ W.reshape(-1)).reshape(W.shape) for M, W in rows_k]))


@pytest.mark.parametrize("id", ["sequence-pooled", "conv", "conv-transpose"])
@pytest.mark.parametrize("name", ["kpsvd", "deflation", "kfac_cor", "ekfac"])
def test_in_params_order_the_errors_add_up(id, name):
    """Against gradients by definition: a scrambled kernel, or a factor T too many, shows as a larger distance."""
    problem = zoo.pick(id)  # D8, D12
    run = sampled(problem)
    options = {"iterations": TIGHT} if name in ITERATIVE else {}
    ng, state, _ = fit(run, problem.params, FAMILY[name](**options))
    exact = oracles.fisher_matrix(problem, "mc", run.draws)
    exact = oracles.block_diagonal(problem.params, problem.blocks, exact)
    Fs = blocks(run.stats)
    least = torch.stack([norm(Fs[key] - dense(factors)) for key, factors in state.factors.items()]).norm()
    close(norm(exact - dense_matvec(ng, state, problem.params)), least)


# ------------------------------------------------------------------------------------------- distance to the Fisher


def whole_layer(a, g):
    """F of all groups together, `[K·o·i, K·o·i]`, with what lies between groups."""
    rows = torch.cat([kron_oracles.example_matrices(*one).flatten(1) for one in zip(a, g, strict=True)], dim=1)
    return rows.T @ rows / a.shape[1]


@EVERY
@pytest.mark.parametrize("id", ["sequence-pooled", "scale-vector", "conv-groups", "tokens"])
def test_fisher_error_is_the_relative_distance_of_each_layers_block(method, id):
    """To the blocks of any statistics: those that the factors come from, or others."""
    problem = zoo.pick(id)
    run = sampled(problem)
    ng, state, _ = fit(run, problem.params, FAMILY[method]())
    for stats in (run.stats, ng.stats(problem.params, problem.batch, generator=zoo.generator(5))):
        found = ng.fisher_error(state, stats)
        for key, taps in dense_taps(stats).items():
            F, fitted = whole_layer(*taps), torch.block_diag(*dense(state.factors[key]))
            assert abs(found[key] - (F - fitted).norm() / F.norm()) < 1e-6, key
