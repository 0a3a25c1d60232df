"""Per-example gradients, influence scores and conjugate gradients against dense algebra."""

import pytest
import torch
from torch.func import grad, vmap

import fisherfn as ff
from fisherfn import tree
from tests import zoo
from tests.oracles import close, vec

IDS = ["mlp-categorical", "sequence-pooled", "scale-matrix", "conv-groups", "tokens"]


def singles(problem):
    """The gradient of each example's loss by autograd, a tree with the examples first."""
    trees = []
    for n in range(len(problem.x)):
        one = tree.map(lambda leaf, n=n: leaf[n : n + 1], problem.batch)

        def loss(params, one=one):
            return problem.likelihood.nll(problem.model(params, one[0]), one[1]).sum()

        trees.append(grad(loss)(problem.params))
    return {name: torch.stack([each[name] for each in trees]) for name in problem.params}


@pytest.mark.parametrize("id", IDS)
def test_gradients_and_scores_of_examples_are_those_of_autograd(id):
    problem = zoo.pick(id)
    ng = problem.build(method="kfac", fisher="type2")
    wanted, stats = singles(problem), ng.stats(problem.params, problem.batch, curvature=False)
    close(ff.example_gradients(stats), wanted)
    state, _ = ng.fit(problem.params, [problem.batch], damping=0.1)
    directions = vmap(lambda v: ng.precondition(state, v))(wanted)
    scores = ff.influence_scores(stats, directions)
    flat = torch.cat([leaf.flatten(1) for leaf in wanted.values()], 1)
    P = torch.stack(
        [vec(ng.precondition(state, tree.map(lambda leaf, n=n: leaf[n], wanted))) for n in range(len(flat))]
    )
    close(scores, P @ flat.mT)


def test_the_order_of_the_names_changes_no_score():
    problem = zoo.pick("mlp-categorical")
    stats = problem.build(method="kfac", fisher="type2").stats(problem.params, problem.batch)
    gradients = ff.example_gradients(stats)
    flat = torch.cat([gradients[key].flatten(1) for key in gradients], 1)
    reverse = {key: gradients[key] for key in reversed(gradients)}
    close(ff.influence_scores(stats, reverse), flat @ flat.mT)


def test_conjugate_gradients_solve_many_right_sides_at_once():
    problem = zoo.pick("mlp-categorical")
    ng = problem.build(method="kfac", fisher="type2")
    state, _ = ng.fit(problem.params, [problem.batch], damping=0.1)
    F = ng.fisher(ng.stats(problem.params, problem.batch))
    dense = F.dense() + 0.1 * torch.eye(len(F.dense()), dtype=zoo.DTYPE)
    sides = [zoo.random_tree(problem.params, seed) for seed in range(3)]
    stacked = {name: torch.stack([side[name] for side in sides]) for name in problem.params}

    def solve(b, precondition=None, iterations=60):
        def product(v):
            return tree.add(F @ v, v, scale=0.1)

        return ff.conjugate_gradients(product, b, iterations=iterations, precondition=precondition)

    x, residuals = vmap(solve)(stacked)
    for m, side in enumerate(sides):
        close(vec(tree.map(lambda leaf, m=m: leaf[m], x)), torch.linalg.solve(dense, vec(side)), tol=1e-7)
        assert residuals[m, 0] == 1 and residuals[m, -1] < 1e-9
    close(x, vmap(lambda b: solve(b, lambda r: ng.precondition(state, r)).x)(stacked), tol=1e-7)


def test_the_exact_inverse_as_preconditioner_needs_one_step_and_a_solved_side_stays():
    problem = zoo.pick("mlp-categorical")
    ng = problem.build(method="exactNG", fisher="type2")
    state, _ = ng.fit(problem.params, [problem.batch], damping=0.1)

    def product(v):
        return tree.add(ng.matvec(state, v), v, scale=0.1)

    b = zoo.random_tree(problem.params)
    x, residuals = ff.conjugate_gradients(product, b, iterations=5, precondition=lambda r: ng.precondition(state, r))
    close(x, ng.precondition(state, b))
    assert (residuals[1:] < 1e-9).all()
    again = ff.conjugate_gradients(product, b, iterations=2, start=x)
    close(again.x, x)
    zero = ff.conjugate_gradients(product, tree.scale(b, 0.0), iterations=2)
    assert not any(leaf.any() for leaf in zero.x.values()) and not zero.residuals.any()


def test_what_has_no_scores_is_refused():
    problem = zoo.pick("mlp-categorical")
    ng = problem.build(method="kfac", fisher="type2")
    stats = ng.stats(problem.params, problem.batch)
    with pytest.raises(ff.errors.StructureError, match="like params"):
        ff.influence_scores(stats, {})
    one = zoo.random_tree(problem.params)
    name = next(iter(one))
    several = {key: leaf.expand(2, *leaf.shape) for key, leaf in one.items()}
    for wrong in (one, several | {name: several[name][:1]}):
        with zoo.as_installed(), pytest.raises(ff.errors.ShapeError, match="one number Q of queries"):
            ff.influence_scores(stats, wrong)
    for wrong in (several | {name: [1]}, several | {name: None}):
        with zoo.as_installed(), pytest.raises(ff.errors.StructureError, match=f"directions of '{name}' cannot be"):
            ff.influence_scores(stats, wrong)
    with zoo.as_installed(), pytest.raises(ff.errors.StructureError, match="stats"):
        ff.example_gradients(problem.params)
    with pytest.raises(ff.errors.HyperparameterError, match="iterations"):
        ff.conjugate_gradients(lambda v: v, problem.params, iterations=0)
    plain = zoo.pick("scale-matrix").build(method="kfac", uncovered="gradient")
    if plain.layout.uncovered:
        problem = zoo.pick("scale-matrix")
        with pytest.raises(ff.errors.StructureError, match="uncovered"):
            ff.example_gradients(plain.stats(problem.params, problem.batch, curvature=False))
