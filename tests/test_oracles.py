"""The oracles among themselves: two definitions that share no formula must agree. No library code runs here."""

import itertools

import pytest
import torch
from torch.distributions import Bernoulli

from tests import oracles, zoo
from tests.oracles import close


def every_target(problem):
    """Yield all label vectors of a batch in which every example has the same one."""
    dist = problem.density(problem.model(problem.params, problem.x))
    values = range(2) if isinstance(dist, Bernoulli) else range(dist.probs.shape[-1])
    for labels in itertools.product(values, repeat=dist.batch_shape[1:].numel()):
        yield torch.tensor(labels, dtype=problem.y.dtype).reshape(1, *dist.batch_shape[1:]).expand_as(problem.y)


@pytest.mark.parametrize(
    "id", ["mlp-categorical", "mlp-bernoulli", "mlp-bernoulli-probs", "sequence-pooled", "two-axes"]
)
def test_type2_is_the_expectation_over_all_labels(id):
    """F = 1/N Σ_n Σ_y p(y | x_n) ∇log p ∇log pᵀ = 1/N Σ_n Jᵀ H J."""
    problem = zoo.pick(id)
    if id == "two-axes":
        problem = zoo.from_net(zoo.mlp(2, 2), (2, 1, 2, 2), "bernoulli")
    size = len(problem.x)
    total = 0
    for targets in every_target(problem):
        log_p = problem.density(problem.model(problem.params, problem.x)).log_prob(targets).reshape(size, -1).sum(1)
        U = oracles.columns(problem, "mc", [targets])  # [P, N]: one draw
        total = total + (U * log_p.exp()) @ U.T
    close(total, oracles.fisher_matrix(problem, "type2"), tol=1e-7)


def test_per_layer_gradients_are_the_taps():
    """∇W_n = Σ_t g_nt a_ntᵀ, bias as last column: hooks against autograd in the parameters."""
    for make in (c.make for c in zoo.CASES if "linear" in c.tags):
        problem = make()
        U = oracles.columns(problem, "empirical") * len(problem.x) ** 0.5
        for name, (a, g) in oracles.taps(problem, "empirical").items():
            W = torch.einsum("nto,nti->noi", g[:, 0], a)
            close(W.flatten(1).T, U[oracles.matrix_positions(problem.params, problem.blocks[name])])


def test_vec_round_trip():
    tree = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.arange(2.0)}
    close(oracles.unvec(tree, oracles.vec(tree)), tree)
    assert oracles.vec(tree).tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert oracles.matrix_positions(tree, ("b", "a")).tolist() == [0, 1, 2, 6, 3, 4, 5, 7]
