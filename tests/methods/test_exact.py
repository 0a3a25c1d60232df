"""The exact natural gradient: the dense solve of the damped sampled Fisher, full or block by block."""

from dataclasses import replace

import pytest
import torch
from torch.func import jacrev
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import fisherfn as ff
from fisherfn.types import Shape
from tests import oracles, strategies, zoo
from tests.drawn import tap as tap_of
from tests.methods.kronecker import (
    as_installed,  # noqa: F401
    drawn,
    given,
    taps_of,
)
from tests.oracles import close, differs, unvec, vec
from tests.zoo import FISHERS, sampled

KINDS = pytest.mark.parametrize("fisher", FISHERS)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")
STRUCTURES = pytest.mark.parametrize("structure", ["full", "block"])


def definition(problem, structure, fisher, draws=None):
    dense = oracles.fisher_matrix(problem, fisher, draws)
    return dense if structure == "full" else oracles.block_diagonal(problem.params, problem.blocks, dense)


def dense_solve(dense, tree, damping):
    eye = torch.eye(len(dense), dtype=dense.dtype)
    return unvec(tree, torch.linalg.solve(dense + damping * eye, vec(tree)))


def inverted(run, params, damping=0.1):
    state, first = run.ng.update(run.ng.init(params, damping=damping), run.stats)
    state, second = run.ng.invert(state)
    assert all(first.ok.values()) and all(second.ok.values())
    return state


def check_step(problem, fisher, structures=("full", "block"), damping=0.1, samples=2):
    run, v = sampled(problem, fisher, samples=samples), zoo.random_tree(problem.params)
    full = oracles.fisher_matrix(problem, fisher, run.draws)
    for structure in structures:
        dense = full if structure == "full" else oracles.block_diagonal(problem.params, problem.blocks, full)
        exact = replace(run, ng=replace(run.ng, method=ff.exact(structure=structure)))
        state = inverted(exact, problem.params, damping)
        close(exact.ng.precondition(state, v), dense_solve(dense, v, damping), tol=1e-7)
        close(exact.ng.precondition(state, run.stats), dense_solve(dense, dict(run.stats.grads), damping), tol=1e-7)
        close(exact.ng.matvec(state, v), unvec(v, dense @ vec(v)))


# ------------------------------------------------------------------------------------------------ the dense solve


@pytest.mark.parametrize("make", zoo.cases("blocks"))
@KINDS
def test_full_and_block_are_the_dense_solves(make, fisher):
    """Over layers, fallback and likelihoods; an uncovered parameter has cross terms in the full one only."""
    check_step(make(), fisher)


@pytest.mark.parametrize("make", [pytest.param(c.make, id=c.id) for c in zoo.CASES if "blocks" not in c.tags])
@KINDS
def test_full_needs_no_partition(make, fisher):
    check_step(make(), fisher, ("full",))


@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("damping", [1e-3, 10.0])
def test_any_number_of_draws_and_damping(samples, damping):
    check_step(zoo.pick("sequence-pooled"), "mc", damping=damping, samples=samples)


@drawn(0.4, strategies.problems() | strategies.read_out(strategies.convolutions(1)), strategies.fishers())
def test_drawn_nets(problem, fisher):
    check_step(problem, fisher)


def test_full_is_the_default_structure_and_not_the_block_one():
    problem = zoo.pick("mlp-categorical")
    v, steps = zoo.random_tree(problem.params), []
    for method in ("exactNG", ff.exact(), ff.exact(structure="block")):
        run = sampled(problem, method=method)
        steps.append(vec(run.ng.precondition(inverted(run, problem.params), v)))
    close(steps[1], steps[0])
    assert differs(steps[2], steps[0], 1e-3)


@STRUCTURES
@pytest.mark.parametrize("id", ["mlp-categorical", "conv", "conv-groups", "tokens", "scale-vector"])
def test_both_routes_agree(structure, id):
    """A batch repeated has the same Fisher: few examples are solved in their own space, many in the parameters'."""
    problem = zoo.pick(id)
    v, steps = zoo.random_tree(problem.params), []
    total = sum(leaf.numel() for leaf in problem.params.values())
    for repeats in (1, 2 + total // len(problem.x)):
        x, y = torch.cat([problem.x] * repeats), torch.cat([problem.y] * repeats)
        run = sampled(zoo.replace(problem, x=x, y=y), "empirical", method=ff.exact(structure=structure))
        steps.append(run.ng.precondition(inverted(run, problem.params, 0.01), v))
    assert len(problem.x) < total < len(x)
    close(steps[1], steps[0], tol=1e-7)


# --------------------------------------------------------------------------------- one sample, all its positions


def test_all_layers_see_the_same_examples_and_draws():
    """Layers share one order of samples: different orders would change the cross terms of the Fisher."""
    problem = zoo.pick("mlp-categorical")
    run = sampled(problem, method=ff.exact())
    v, damping = zoo.random_tree(problem.params), 0.01
    U = oracles.columns(problem, "mc", run.draws)
    shuffled = U.clone()
    last = oracles.positions(problem.params, problem.blocks["2"])
    shuffled[last] = U[last].roll(1, dims=1)
    right, wrong = (vec(dense_solve(columns @ columns.T, v, damping)) for columns in (U, shuffled))
    close(vec(run.ng.precondition(inverted(run, problem.params, damping), v)), right, tol=1e-7)
    assert differs(wrong, right, 1e-2), "the order does not matter here: choose another case"


def woodbury(a, g, v, damping, order):
    """One layer by Sherman, Morrison and Woodbury; coefficients laid out over (example, position) in some order."""
    examples, length = a.shape[:2]
    W = torch.einsum("nto,nti->noi", g, a)
    gram = torch.einsum("noi,moi->nm", W, W) + damping * examples * torch.eye(examples, dtype=a.dtype)
    c = order(torch.linalg.solve(gram, torch.einsum("noi,oi->n", W, v)), length)
    return (v - torch.einsum("r,ro,ri->oi", c, g.flatten(0, 1), a.flatten(0, 1))) / damping


def test_every_position_gets_its_examples_coefficient():
    """Coefficients repeated example by example, not the whole list position by position."""
    a, g = taps_of((1, 1, 5, 3, 2, 4))
    problem = given(a, g, method=ff.exact())
    v = zoo.random_tree(problem.params)
    step = problem.run.ng.precondition(inverted(problem.run, problem.params, 0.1), v)["weight"]
    right, wrong = (
        woodbury(a[0], g[0, 0], v["weight"], 0.1, order)
        for order in (lambda c, length: c.repeat_interleave(length), lambda c, length: c.repeat(length))
    )
    close(step, right)
    assert differs(wrong, right, 1e-2)


# ------------------------------------------------------------------------------------------------- reparametrisation


def affine(seed):
    """An invertible map of two numbers and a shift, far from the identity."""
    rng = zoo.generator(seed)
    M, c = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((2, 2), (2,)))
    return M + 2 * torch.eye(2, dtype=torch.float64), c


IDENTITY = (torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))


def chart(first, second):
    """A net of two layers whose inputs pass through affine maps first."""

    def model(params, x):
        (M, c), (L, d) = first, second
        h = torch.tanh(F.linear(x @ M.T + c, params["W"], params["b"]))
        return F.linear(h @ L.T + d, params["V"], params["e"])

    return model


def charted(params, maps):
    """The parameters that make the same function behind these maps: W M⁻¹, b − W M⁻¹ c."""
    new = {}
    for (weight, bias), (M, c) in zip((("W", "b"), ("V", "e")), maps, strict=True):
        new[weight] = params[weight] @ torch.linalg.inv(M)
        new[bias] = params[bias] - new[weight] @ c
    return new


def tangent(maps, params, x, y, method, damping):
    """Return the first-order change of the outputs along the step in a parametrisation."""
    model, p = chart(*maps), charted(params, maps)
    ng = ff.natural_gradient(model, p, x, likelihood=ff.Gaussian(), method=method, fisher="type2")
    nat = ng(p, ng.stats(p, (x, y)), damping=damping)
    jacobian = jacrev(model)(p, x)
    return sum((jacobian[name] * nat[name]).flatten(2).sum(-1) for name in nat)


@pytest.mark.parametrize("method", [ff.exact(structure="full"), ff.exact(structure="block")], ids=["full", "block"])
def test_the_step_does_not_depend_on_affine_charts_of_layer_inputs(method):
    """λ → 0 and a nonsingular Fisher (80 columns, 12 parameters): outputs move alike in every chart."""
    rng = zoo.generator(3)
    x, y = (torch.randn(40, 2, generator=rng, dtype=torch.float64) for _ in range(2))
    params = zoo.random_tree({"W": x[:2], "b": x[0], "V": x[:2], "e": x[0]}, seed=2)
    plain, maps = (IDENTITY, IDENTITY), (affine(1), affine(2))
    close(chart(*maps)(charted(params, maps), x), chart(*plain)(params, x))
    moved, original = (tangent(chosen, params, x, y, method, 1e-10) for chosen in (maps, plain))
    close(moved, original, tol=1e-6)
    damped = [tangent(chosen, params, x, y, method, 1e3) for chosen in (maps, plain)]
    assert differs(damped[0], damped[1], 1e-1), "the plain gradient is alike too: the maps do nothing"


# ------------------------------------------------------------------------------------------------------ the state


@STRUCTURES
@KINDS
def test_a_gradient_in_rows_is_stepped_like_its_matrix(structure, fisher):
    """Layers wider than the batch get it as rows, here of another batch than the system's, of another size."""
    generator = torch.Generator().manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(12, 14), torch.nn.Tanh(), torch.nn.Linear(14, 10)).double()
    model, params, context = ff.functional(net)
    params = zoo.random_tree(params)
    x, y = torch.randn(7, 12, generator=generator).double(), torch.randint(10, (7,), generator=generator)
    ng = ff.natural_gradient(
        model, params, x, likelihood=ff.Categorical(), method=ff.exact(structure), fisher=fisher, context=context
    )
    given = {"context": context, "samples": 2, "generator": generator}
    mine, other = ng.stats(params, (x[:3], y[:3]), **given), ng.stats(params, (x[3:], y[3:]), **given)
    state = ng.invert(ng.update(ng.init(params, damping=0.1), mine)[0])[0]
    nat, _, info = ng.step_from(state, other, invert=False, inner=True)
    expected = ng.fisher(mine, structure).dense() + 0.1 * torch.eye(len(vec(params)), dtype=torch.float64)
    close(nat, unvec(params, torch.linalg.solve(expected, vec(other.grads))), tol=1e-7)
    close(info.inner, vec(other.grads) @ vec(nat))


@STRUCTURES
def test_only_the_newest_statistics_count_whatever_their_size(structure):
    """Batches of 5, 2 and 40 examples: an average of the first kind has no place for others."""
    problem = zoo.pick("mlp-categorical")
    ng = problem.build(method=ff.exact(structure=structure), fisher="empirical")
    state, v = ng.init(problem.params, damping=0.1, ema=0.95), zoo.random_tree(problem.params)
    for turn, size in enumerate((5, 2, 40)):
        x = torch.randn(size, 3, generator=zoo.generator(turn), dtype=torch.float64)
        batch = zoo.replace(problem, x=x, y=torch.arange(size) % 3)
        state, _ = ng.invert(ng.update(state, ng.stats(problem.params, batch.batch))[0])
        dense = definition(batch, structure, "empirical")
        close(ng.precondition(state, v), dense_solve(dense, v, 0.1), tol=1e-7)
        close(ng.matvec(state, v), unvec(v, dense @ vec(v)))


@STRUCTURES
def test_steps_change_at_invert_only(structure):
    """Before the first, grad/λ; an update alone changes matvec, not the step."""
    problem = zoo.pick("conv")
    run = sampled(problem, "empirical", method=ff.exact(structure=structure))
    v = zoo.random_tree(problem.params)
    empty = run.ng.init(problem.params, damping=0.25)
    for state in (empty, run.ng.update(empty, run.stats)[0]):
        close(run.ng.precondition(state, v), ff.tree.scale(v, 4.0))
    state = inverted(run, problem.params, 0.25)
    moved, _ = run.ng.update(state, run.ng.stats(problem.params, (2 * problem.x, problem.y)))
    close(run.ng.precondition(moved, v), run.ng.precondition(state, v))
    assert differs(vec(run.ng.matvec(moved, v)), vec(run.ng.matvec(state, v)))


@STRUCTURES
def test_its_own_fisher_is_at_no_distance(structure):
    """And that of another draw at the distance of the two, block by block."""
    problem = zoo.pick("conv")
    run = sampled(problem, method=ff.exact(structure=structure))
    state, other = inverted(run, problem.params), sampled(problem, seed=1)
    assert max(run.ng.fisher_error(state, run.stats).values()) < 1e-6
    mine, theirs = (oracles.fisher_matrix(problem, "mc", one.draws) for one in (run, other))
    for key, error in run.ng.fisher_error(state, other.stats).items():
        at = oracles.positions(problem.params, problem.blocks[key])
        F, F_hat = (dense[at[:, None], at] for dense in (theirs, mine))
        close(error, (F - F_hat).norm() / F.norm())


def test_a_structure_of_another_name_is_refused():
    with zoo.as_installed(), pytest.raises(ff.errors.FisherfnError, match="block"):
        ff.exact(structure="diagonal")


@pytest.mark.parametrize("positions", [1, 4])
def test_overlap_with_statistics_of_another_size_is_that_of_the_dense_blocks(positions):
    """Rows or per-example gradients in the state, whichever is smaller."""
    (tap, W), (other, V) = (tap_of("dense", (1, 1, n, positions, 2, 3), n) for n in (4, 6))
    F_state, F_other = (rows.T @ rows / len(rows) for rows in (W.flatten(0, 1).flatten(1), V.flatten(0, 1).flatten(1)))
    one, method = torch.ones((), dtype=torch.float64), ff.exact()
    empty, _ = method.init({"w": Shape(1, 2, 3)}, one.dtype, one.device, one)
    cross, square = method.overlap(method.update(empty, {"w": tap}, one).factors, {"w": other})["w"]
    close(cross, (F_state * F_other).sum())
    close(square, F_state.square().sum())


# ------------------------------------------------------------------------------ a gradient in the rows of the Fisher


IDS = ["mlp-categorical", "conv", "conv-groups", "tokens", "scale-vector"]


def both_ways(ng, params, batch, damping=0.1, **given):
    """Return (nat, ⟨∇, nat⟩) of a step whose gradient is in the Fisher's rows, and with another one's coefficients."""
    state = ng.init(params, damping=damping)
    nat, _, info = ng.step(params, state, batch, inner=True, **given)
    ff.check(info)
    stats = ng.stats(params, batch, **given)
    assert stats.coefficients is not None
    other, _, its_info = ng.step_from(state, stats.grads, stats, inner=True)
    return (nat, info.inner), (other, its_info.inner)


@STRUCTURES
@pytest.mark.parametrize("id", IDS)
@pytest.mark.parametrize("damping", [1e-3, 10.0])
def test_a_gradient_in_the_rows_of_the_fisher_is_stepped_like_any_other(id, structure, damping):
    problem = zoo.pick(id)
    ng = problem.build(method=ff.exact(structure=structure), fisher="empirical")
    (nat, inner), (expected, product) = both_ways(ng, problem.params, problem.batch, damping)
    close(nat, expected, tol=1e-7)
    close(inner, product)
    dense = definition(problem, structure, "empirical")
    grads = dict(ng.stats(problem.params, problem.batch).grads)
    close(nat, dense_solve(dense, grads, damping), tol=1e-7)
    close(inner, vec(grads) @ vec(nat))


@STRUCTURES
def test_so_are_gradients_of_weighted_examples_chunks_and_terms(structure):
    problem = zoo.pick("mlp-categorical")
    x, y, params, method = problem.x, problem.y, problem.params, ff.exact(structure=structure)
    weights = torch.rand(len(x), generator=zoo.generator(1), dtype=torch.float64)
    weighted = zoo.replace(problem, likelihood=ff.Weighted(problem.likelihood)).build(method=method, fisher="empirical")
    plain = problem.build(method=method, fisher="empirical")
    term = ff.Term(problem.model, x, problem.likelihood, fisher="empirical")
    terms = ff.sum_of_terms({"few": term, "many": term._replace(weight=2.5)}, params, method=method)
    batches = {"few": (x[:2], y[:2]), "many": (x, y)}
    for ng, batch, options in (
        (weighted, (x, (y, weights)), {}),
        (plain, (x, y), {"chunk_size": 2}),
        (terms, batches, {}),
    ):
        (nat, inner), (expected, product) = both_ways(ng, params, batch, 0.01, **options)
        close(nat, expected, tol=1e-7)
        close(inner, product)


@STRUCTURES
@pytest.mark.parametrize("outputs", [(), (3,), (2, 2)], ids=str)
def test_so_are_gradients_of_squared_losses_with_type2(structure, outputs):
    """Their Fisher's columns are the Jacobian over σ, and its weights the residuals over σ."""
    g = zoo.generator(3)
    params = {"w": torch.randn((*outputs, 30), generator=g).double(), "b": torch.randn(outputs, generator=g).double()}
    x, y = torch.randn(5, 30, generator=g).double(), torch.randn((5, *outputs), generator=g).double()

    def model(p, x):
        return torch.tanh(torch.tensordot(x, p["w"], ([1], [-1])) + p["b"])

    method, likelihood = ff.exact(structure=structure), ff.Gaussian(variance=0.3)
    ng = ff.natural_gradient(model, params, x, likelihood=likelihood, method=method, fisher="type2")
    term = ff.Term(model, x, likelihood)
    terms = ff.sum_of_terms({"few": term, "many": term._replace(weight=2.5)}, params, method=method)
    for built, batch, options in (
        (ng, (x, y), {}),
        (ng, (x, y), {"chunk_size": 2}),
        (terms, {"few": (x[:2], y[:2]), "many": (x, y)}, {}),
    ):
        (nat, inner), (expected, product) = both_ways(built, params, batch, 0.01, **options)
        close(nat, expected, tol=1e-7)
        close(inner, product)


def test_the_weights_of_weighted_squared_losses_are_not_known():
    problem = zoo.replace(zoo.pick("mlp-categorical"), likelihood=ff.Weighted(ff.Gaussian()))
    targets = torch.zeros_like(problem.model(problem.params, problem.x)), torch.ones(len(problem.x)).double()
    ng = ff.natural_gradient(
        problem.model, problem.params, problem.x, likelihood=problem.likelihood, method="exactNG", fisher="type2"
    )
    assert ng.stats(problem.params, (problem.x, targets)).coefficients is None


def test_so_is_a_gradient_if_the_system_is_that_of_the_parameters():
    problem = zoo.pick("scale-vector")
    total = sum(leaf.numel() for leaf in problem.params.values())
    x, y = (torch.cat([part] * (2 + total // len(problem.x))) for part in problem.batch)
    ng = problem.build(method=ff.exact(), fisher="empirical")
    (nat, inner), (expected, product) = both_ways(ng, problem.params, (x, y))
    close(nat, expected, tol=1e-7)
    close(inner, product)


def test_so_are_compiled_and_vmapped_gradients():
    problem = zoo.pick("mlp-categorical")
    ng = problem.build(method=ff.exact(), fisher="empirical")
    expected = {damping: both_ways(ng, problem.params, problem.batch, damping)[1][0] for damping in (0.1, 0.7)}
    state = ng.init(problem.params, damping=0.1)
    nat, _, _ = ff.compile(ng.step, backend="eager")(problem.params, state, problem.batch)
    close(nat, expected[0.1], tol=1e-7)
    dampings = torch.tensor(list(expected), dtype=torch.float64)
    many = torch.vmap(lambda damping: ng.step(problem.params, state._replace(damping=damping), problem.batch)[0])
    for index, each in enumerate(expected.values()):
        close({name: leaf[index] for name, leaf in many(dampings).items()}, each, tol=1e-7)


def test_other_gradients_have_no_coefficients():
    """Sampled labels, old inverses, another batch: these take the way of any gradient."""
    problem = zoo.pick("mlp-categorical")
    assert sampled(problem).stats.coefficients is None
    ng = problem.build(method=ff.exact(), fisher="empirical")
    stats, empty = ng.stats(problem.params, problem.batch), ng.init(problem.params, damping=0.1)
    assert ng.stats(problem.params, problem.batch, curvature=False).coefficients is None
    other = ng.stats(problem.params, (2 * problem.x, problem.y))
    state = ng.invert(ng.update(empty, other)[0])[0]
    dense = oracles.fisher_matrix(zoo.replace(problem, x=2 * problem.x), "empirical")
    nat, _, _ = ng.step_from(state, stats, stats, invert=False)
    close(nat, dense_solve(dense, dict(stats.grads), 0.1), tol=1e-7)
    nat, _, _ = ng.step_from(empty, stats, other)
    close(nat, dense_solve(dense, dict(stats.grads), 0.1), tol=1e-7)


def test_a_step_multiplies_the_rows_once():
    """Forward, backward to the activations, two Gram matrices and one product of rows per layer, and little else."""
    widths, n = (64, 96, 64), 16
    net = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 64))
    model, params, context = ff.functional(net)
    x = torch.rand(n, 64, generator=zoo.generator(0))
    ng = ff.natural_gradient(
        model, params, x, likelihood=ff.Gaussian(), method="exact", fisher="empirical", context=context
    )
    state = ng.init(params, damping=1.0)
    with FlopCounterMode(display=False) as counter:
        ng.step(params, state, (x, x), context=context)
    pairs = list(zip(widths, widths[1:], strict=False))
    products = 2 * n * sum(i * o + (i + 1) * o for i, o in pairs) + 2 * n * pairs[1][0] * pairs[1][1]
    grams = 2 * n * n * sum(i + 1 + o for i, o in pairs)
    assert counter.get_total_flops() <= 1.1 * (products + grams)
