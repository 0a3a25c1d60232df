"""Products of the Fisher through the model are those of the type-2 Fisher from taps, and solutions likewise."""

import pytest
import torch

import fisherfn as ff
from tests import zoo
from tests.oracles import close, differs, vec

IDS = ["mlp-categorical", "mlp-gaussian", "sequence-pooled", "tokens", "conv-transpose", "scale-vector"]


@pytest.mark.parametrize("id", IDS)
def test_products_are_those_of_type_2(id):
    problem = zoo.pick(id)
    ng = problem.build(fisher="type2")
    F = ng.fisher(ng.stats(problem.params, problem.batch))
    v = zoo.random_tree(problem.params)
    close(ng.implicit_fisher(problem.params, problem.x) @ v, F @ v, tol=1e-10)


@pytest.mark.parametrize("id", IDS)
def test_conjugate_gradients_reach_the_direct_solution(id):
    problem = zoo.pick(id)
    ng = problem.build(fisher="type2")
    stats = ng.stats(problem.params, problem.batch)
    exact, F = ng.fisher(stats).solve(stats.grads, 0.1), ng.implicit_fisher(problem.params, problem.x)
    x, residual = F.solve(stats.grads, 0.1, iterations=80)
    close(x, exact, tol=1e-7)
    assert residual < 1e-8
    near, further = (F.solve(stats.grads, 0.1, iterations=2, start=start) for start in (x, None))
    close(near.x, exact, tol=1e-7)
    assert further.residual > near.residual and differs(vec(further.x), vec(exact), 1e-6)


@pytest.mark.parametrize(
    "likelihood", [ff.Categorical(), ff.Bernoulli(), ff.Bernoulli(logits=False), ff.Gaussian(0.3)], ids=str
)
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 4)])
def test_a_likelihoods_product_is_that_of_its_root(likelihood, shape):
    outputs = torch.rand(shape, generator=zoo.generator(0), dtype=torch.float64)
    v = torch.randn(shape, generator=zoo.generator(1), dtype=torch.float64)
    columns = likelihood.fisher_sqrt(outputs)
    expected = sum(s * (s * v).flatten(1).sum(1).reshape(-1, *[1] * (v.ndim - 1)) for s in columns)
    close(likelihood.fisher_product(outputs, v), expected)


class Own:
    """A likelihood of one's own with a root and no product."""

    def nll(self, outputs, targets):
        return ff.Gaussian().nll(outputs, targets)

    def fisher_sqrt(self, outputs):
        return ff.Gaussian().fisher_sqrt(outputs)


class Bare:
    def nll(self, outputs, targets):
        return ff.Gaussian().nll(outputs, targets)


def test_a_likelihood_of_ones_own():
    problem = zoo.pick("mlp-gaussian")
    v = zoo.random_tree(problem.params)
    products = [
        ff.natural_gradient(problem.model, problem.params, problem.x, likelihood=likelihood, fisher="empirical")
        .implicit_fisher(problem.params, problem.x)
        for likelihood in (Own(), ff.Gaussian())
    ]  # fmt: skip
    close(products[0] @ v, products[1] @ v)
    bare = ff.natural_gradient(problem.model, problem.params, problem.x, likelihood=Bare(), fisher="empirical")
    with pytest.raises(ff.errors.LikelihoodError, match="fisher_sqrt"):
        bare.implicit_fisher(problem.params, problem.x)


def test_the_right_side_may_vanish_and_iterations_may_not():
    problem = zoo.pick("mlp-gaussian")
    F = problem.build(fisher="type2").implicit_fisher(problem.params, problem.x)
    zero = ff.tree.zeros_like(problem.params)
    close(F.solve(zero, 0.1, iterations=3).x, zero)
    with pytest.raises(ff.errors.HyperparameterError, match="iterations"):
        F.solve(zero, 0.1, iterations=0)


def test_models_solve_together_under_vmap():
    problem = zoo.pick("mlp-categorical")
    ng = problem.build(fisher="type2")
    v = zoo.random_tree(problem.params)
    members = [ff.tree.add(problem.params, zoo.random_tree(problem.params, m), scale=0.1) for m in range(2)]

    def solve(params):
        return ng.implicit_fisher(params, problem.x).solve(v, 0.1, iterations=5).x

    stacked = {name: torch.stack([member[name] for member in members]) for name in problem.params}
    together = torch.vmap(solve)(stacked)
    for m, member in enumerate(members):
        close({name: leaf[m] for name, leaf in together.items()}, solve(member), tol=1e-9)


def net(p, x):
    return torch.nn.functional.linear(torch.tanh(torch.nn.functional.linear(x, p["w"])), p["v"])


def draw(*shape, seed=0):
    return torch.randn(shape, generator=zoo.generator(seed), dtype=torch.float64)


CLASSES = torch.tensor([1.0, 5.0, 0.1, 2.0], dtype=torch.float64)
LABELS = torch.tensor([[0, 1], [3, -100], [2, 2], [-100, -100], [1, 0]])
POSITIONS = draw(5, 2, seed=3).abs()
EXAMPLES = draw(5, seed=4).abs()
INSIDE = (LABELS != -100).double()
SOFT = draw(5, 2, 4, seed=5).softmax(-1)
OWN = CLASSES[LABELS.clamp(min=0)]

# by name: likelihood, targets, and the weight of each position written out
WEIGHTED = {
    "ignored": (ff.Categorical(), LABELS, INSIDE),
    "classes": (ff.Categorical(weight=CLASSES), LABELS, INSIDE * OWN),
    "smoothed": (
        ff.Categorical(weight=CLASSES, label_smoothing=0.2), LABELS, INSIDE * (0.8 * OWN + 0.2 * CLASSES.mean())
    ),
    "positions": (ff.Categorical(), (LABELS, POSITIONS), INSIDE * POSITIONS),
    "examples": (ff.Weighted(ff.Categorical()), (LABELS, EXAMPLES), INSIDE * EXAMPLES[:, None]),
    "soft": (ff.Categorical(weight=CLASSES), SOFT, SOFT @ CLASSES),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTED)
def test_observations_have_the_weights_of_their_targets(name):
    """The Gauss-Newton matrix `1/N Σ m Jᵀ (diag p − p pᵀ) J`, with explicit Jacobians."""
    likelihood, targets, weights = WEIGHTED[name]
    params, x = {"w": draw(3, 2), "v": draw(4, 3, seed=1)}, draw(5, 2, 2, seed=2)
    J = torch.cat([leaf.flatten(3) for leaf in torch.func.jacrev(lambda p: net(p, x))(params).values()], 3)
    p = net(params, x).softmax(-1)
    B = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
    expected = torch.einsum("nt,ntci,ntcd,ntdj->ij", weights, J, B, J) / 5
    ng = ff.natural_gradient(net, params, x, likelihood=likelihood, fisher="type2")
    F, v = ng.implicit_fisher(params, x, targets), zoo.random_tree(params)
    close(vec(F @ v), expected @ vec(v))
    stats = ng.stats(params, (x, targets))
    close(F @ v, ng.fisher(stats) @ v)
    solution = torch.linalg.solve(expected + 0.1 * torch.eye(len(expected), dtype=x.dtype), vec(v))
    close(vec(F.solve(v, 0.1, iterations=60).x), solution, tol=1e-7)


@pytest.mark.parametrize(
    "likelihood", [ff.Weighted(ff.Gaussian()), ff.Categorical(weight=CLASSES)], ids=["own", "class"]
)
def test_weights_cannot_be_left_out(likelihood):
    params, x = {"w": draw(3, 2), "v": draw(4, 3, seed=1)}, draw(5, 2, seed=2)
    ng = ff.natural_gradient(net, params, x, likelihood=likelihood, fisher="type2")
    with zoo.as_installed(), pytest.raises(ff.errors.LikelihoodError, match=r"implicit_fisher\(params, x, targets\)"):
        ng.implicit_fisher(params, x)
