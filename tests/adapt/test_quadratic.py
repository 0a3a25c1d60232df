"""The quadratic model against dense algebra, and its minimiser where systems are singular."""

import pytest
import torch

import fisherfn as ff
from fisherfn.adapt.quadratic import tangents
from tests import test_terms as terms
from tests.adapt.problems import built, dense_fisher, flat, loss, mlp, quadratic, unflat
from tests.nets import Straight
from tests.zoo import as_installed

LIKELIHOODS = {"bernoulli": ff.Bernoulli(), "gaussian": ff.Gaussian(0.5), "categorical": ff.Categorical()}


def directions(problem, count=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    size = flat(problem.params).numel()
    return [unflat(problem, torch.randn(size, generator=g, dtype=torch.float64)) for _ in range(count)]


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_model_is_that_of_the_dense_fisher(name, count):
    problem = mlp(LIKELIHOODS[name])
    chosen = directions(problem, count)
    model = ff.quadratic_model(built(problem), problem.params, (problem.x, problem.y), chosen)
    D = torch.stack([flat(d) for d in chosen])
    gradient = flat(torch.func.grad(lambda p: loss(problem, p))(problem.params))
    torch.testing.assert_close(model.slope, D @ gradient, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.curvature, D @ dense_fisher(problem) @ D.T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.gram, D @ D.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.losses.mean(), loss(problem, problem.params), rtol=1e-12, atol=1e-12)


def test_a_plain_callable_has_the_second_derivative_of_its_nll():
    problem = mlp(ff.Bernoulli())
    plain = problem._replace(likelihood=lambda f, y: ff.Bernoulli().nll(f, y))
    found = ff.quadratic_model(built(plain, fisher="empirical"), plain.params, (plain.x, plain.y), directions(problem))
    known = ff.quadratic_model(built(problem), problem.params, (problem.x, problem.y), directions(problem))
    torch.testing.assert_close(found.curvature, known.curvature, rtol=1e-10, atol=1e-10)


def test_a_likelihood_with_a_root_alone_has_the_same_curvature():
    class Rooted:
        nll = staticmethod(ff.Bernoulli().nll)
        fisher_sqrt = staticmethod(ff.Bernoulli().fisher_sqrt)

    problem = mlp(ff.Bernoulli())
    rooted = problem._replace(likelihood=Rooted())
    found = ff.quadratic_model(built(rooted, fisher="type2"), rooted.params, (rooted.x, rooted.y), directions(problem))
    known = ff.quadratic_model(built(problem), problem.params, (problem.x, problem.y), directions(problem))
    torch.testing.assert_close(found.curvature, known.curvature, rtol=1e-10, atol=1e-10)


def test_two_reverse_passes_serve_where_forward_mode_does_not():
    class Square(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x * x

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(inputs[0])

        @staticmethod
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0] * grad

    plain = mlp()._replace(model=lambda p, x: ((x @ p["a"].T) ** 2) @ p["b"].T)
    own = plain._replace(model=lambda p, x: Square.apply(x @ p["a"].T) @ p["b"].T)
    batch = (plain.x, plain.y)
    known = ff.quadratic_model(built(plain), plain.params, batch, directions(plain))
    found = ff.quadratic_model(built(own), own.params, batch, directions(own))
    torch.testing.assert_close(found.curvature, known.curvature, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.slope, known.slope, rtol=1e-10, atol=1e-10)


def model_of(curvature, slope):
    curvature, slope = torch.tensor(curvature).double(), torch.tensor(slope).double()
    return ff.QuadraticModel(slope, curvature, torch.eye(len(slope)).double(), torch.zeros(1).double())


def test_the_minimiser_solves_the_system_and_half_the_slope_is_the_value_there():
    model = model_of([[2.0, 0.5], [0.5, 3.0]], [1.0, -2.0])
    weights = model.minimiser(0.25)
    A = model.curvature + 0.25 * torch.eye(2)
    torch.testing.assert_close(A @ weights, -model.slope)
    torch.testing.assert_close(model.value(weights, 0.25), 0.5 * model.slope @ weights)


def test_a_fixed_coefficient_stays_and_the_other_minimises_around_it():
    model = model_of([[2.0, 0.5], [0.5, 3.0]], [1.0, -2.0])
    weights = model.minimiser(0.0, (None, 0.9))
    assert weights[1] == 0.9
    torch.testing.assert_close(weights[0], -(1.0 + 0.5 * 0.9) / torch.tensor(2.0).double())
    torch.testing.assert_close(model.minimiser(0.0, (0.1, 0.2)), torch.tensor([0.1, 0.2]).double())


@pytest.mark.parametrize(
    ("curvature", "slope", "expected"),
    [
        ([[2.0, 0.0], [0.0, 0.0]], [1.0, 0.0], [-0.5, 0.0]),  # no previous update
        ([[2.0, 4.0], [4.0, 8.0]], [1.0, 2.0], [-0.5, 0.0]),  # a previous update parallel to the gradient
        ([[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0], [0.0, 0.0]),  # no gradient
        ([[0.0, 0.0], [0.0, 4.0]], [0.0, 2.0], [0.0, -0.5]),
    ],
)
def test_singular_systems_take_what_is_left(curvature, slope, expected):
    torch.testing.assert_close(model_of(curvature, slope).minimiser(), torch.tensor(expected).double())


def test_members_of_a_vmapped_call_have_decisions_of_their_own():
    curvatures = torch.tensor([[[2.0, 4.0], [4.0, 8.0]], [[2.0, 0.5], [0.5, 3.0]]]).double()
    slopes = torch.tensor([[1.0, 2.0], [1.0, -2.0]]).double()

    def solved(curvature, slope):
        return ff.QuadraticModel(slope, curvature, torch.eye(2).double(), slope).minimiser()

    together = torch.vmap(solved)(curvatures, slopes)
    alone = torch.stack([solved(c, s) for c, s in zip(curvatures, slopes, strict=True)])
    torch.testing.assert_close(together, alone)


def test_scales_far_apart_are_no_singular_system():
    model = model_of([[1e-12, 0.0], [0.0, 1e12]], [1e-12, 1e12])
    torch.testing.assert_close(model.minimiser(), torch.tensor([-1.0, -1.0]).double())


def test_errors():
    problem = quadratic()
    ng = built(problem)
    with pytest.raises(ff.errors.StructureError, match="needs a direction"):
        ff.quadratic_model(ng, problem.params, (problem.x, problem.y), [])
    batch, w = (problem.x, problem.y), problem.params["w"]
    for direction, words in ((torch.zeros(3), "'Tensor'"), ({}, "missing"), ({"w": w, "zz": w}, "unexpected")):
        with pytest.raises(ff.errors.StructureError, match=words), as_installed():
            ff.quadratic_model(ng, problem.params, batch, [direction])
    with pytest.raises(ff.errors.ShapeError, match="'w' has shape"):
        ff.quadratic_model(ng, problem.params, batch, [{"w": w[:1]}])
    with pytest.raises(ff.errors.EmptyBatchError):
        ff.quadratic_model(ng, problem.params, (problem.x[:0], problem.y[:0]), [problem.params])


def test_a_batch_of_a_sum_of_terms_has_exactly_its_terms():
    params, batch = terms.problem()
    ng = ff.sum_of_terms(terms.terms_of(batch), params)
    ff.quadratic_model(ng, params, batch, [params])
    for wrong in ({name: part for name, part in batch.items() if name != "edge"}, batch | {"other": batch["edge"]}):
        with pytest.raises(ff.errors.StructureError, match="entr"):
            ff.quadratic_model(ng, params, wrong, [params])


def test_a_function_without_vmap_and_forward_rule_has_its_tangents_from_reverse_mode():
    g = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(3, 4, generator=g).double(), "v": torch.randn(2, 3, generator=g).double()}
    x = torch.randn(5, 4, generator=g).double()
    d = [{name: torch.randn(leaf.shape, generator=g).double() for name, leaf in params.items()} for _ in range(2)]

    def outputs(p, estimator=Straight.apply):
        return estimator(x @ p["w"].T) @ p["v"].T

    def derivative(p):  # of the estimator, as a function with this derivative at params
        h, h0 = x @ p["w"].T, (x @ params["w"].T).detach()
        return (h0.sign() + h - h0) @ p["v"].T

    found, moves = tangents(outputs, params, d)
    torch.testing.assert_close(found, outputs(params))
    for move, direction in zip(moves, d, strict=True):
        torch.testing.assert_close(move, torch.func.jvp(derivative, (params,), (direction,))[1])


def test_a_function_without_second_derivatives_names_the_way_out():
    net = torch.nn.Sequential(torch.nn.EmbeddingBag(6, 4), torch.nn.Linear(4, 3))
    x, y = torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.tensor([0, 1, 2])
    with pytest.raises(ff.errors.ModelError, match="pass lr and damping"):
        ff.optim.NaturalGradient(net, likelihood=ff.Categorical()).step((x, y))
    opt = ff.optim.NaturalGradient(net, likelihood=ff.Categorical(), lr=0.1, damping=0.1)
    assert torch.isfinite(opt.step((x, y)))
