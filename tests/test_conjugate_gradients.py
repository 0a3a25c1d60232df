"""Conjugate gradients of any scale and precision against dense algebra, and what cannot be solved is refused."""

import pytest
import torch
from torch.func import vmap

import fisherfn as ff
from fisherfn import tree
from tests import zoo
from tests.oracles import vec

E = ff.errors
SHAPES = {"w": (2, 3), "b": (2,)}
ROOT = torch.randn(8, 8, generator=zoo.generator(0), dtype=torch.float64)
MATRIX = ROOT @ ROOT.mT / 8 + torch.eye(8, dtype=torch.float64)


def side(dtype, scale=1.0, seed=1):
    """Return a right side whose largest entry is about `scale`."""
    numbers = torch.randn(8, generator=zoo.generator(seed), dtype=torch.float64) * scale
    return {"w": numbers[:6].reshape(2, 3).to(dtype), "b": numbers[6:].to(dtype)}


def product(v):
    """A v in the type of v, as a user's function computes it."""
    given = vec(v)
    found = MATRIX.to(given.dtype) @ given
    return {"w": found[:6].reshape(2, 3), "b": found[6:]}


def errors(solution, b, scale):
    """Return the relative error of x, and the relative residual."""
    x, right = (vec(each).double() / scale for each in (solution.x, b))
    expected = torch.linalg.solve(MATRIX, right)
    return (x - expected).norm() / expected.norm(), (right - MATRIX @ x).norm() / right.norm()


SCALES = [
    (torch.float64, 1e-200), (torch.float64, 1e200), (torch.float32, 1e-24), (torch.float32, 1e-37),
    (torch.float32, 1e24), (torch.bfloat16, 1e-24), (torch.bfloat16, 1e24), (torch.float16, 1e-4),
    (torch.float16, 1e-2), (torch.float16, 1e3),
]  # fmt: skip


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize(("dtype", "scale"), SCALES, ids=str)
def test_a_scale_of_the_right_side_only_scales_the_solution(dtype, scale, started):
    """To the accuracy that products in this type allow; the residual is that of the x that was returned."""
    b = side(dtype, scale)
    start = tree.scale(side(dtype, scale, seed=2), 0.5) if started else None
    for precondition in (None, lambda r: tree.scale(r, 0.5)):
        found = ff.conjugate_gradients(product, b, iterations=16, precondition=precondition, start=start)
        error, residual = errors(found, b, scale)
        rounding = torch.finfo(dtype).eps * (1 if dtype != torch.float16 or scale > 1e-3 else 4)  # subnormal numbers
        assert {name: leaf.dtype for name, leaf in found.x.items()} == dict.fromkeys(SHAPES, dtype)
        assert error < 8 * rounding
        assert found.residuals.dtype == torch.promote_types(dtype, torch.float32) and len(found.residuals) == 17
        assert abs(found.residuals[-1] - residual) < 8 * rounding and residual < 8 * rounding
        assert started or found.residuals[0] == 1


@pytest.mark.parametrize(
    ("dtype", "scale", "of_matrix", "started"),
    [
        (torch.float16, 1e-4, 1e3, 0), (torch.float16, 1e-4, 1e-6, 0), (torch.float16, 1e-4, 1.0, 100.0),
        (torch.float16, 1.0, 1.0, 1.0), (torch.float32, 1e-30, 1e10, 0), (torch.float32, 1e-4, 1e-6, 0),
        (torch.float32, 1e30, 1e-6, 0), (torch.float64, 1e-200, 1e100, 0),
    ],
    ids=str,
)  # fmt: skip
def test_the_last_residual_is_that_of_the_returned_solution_for_matrices_of_any_scale(dtype, scale, of_matrix, started):
    """Where x loses digits, because it is tiny or huge in its type, the residual says so."""
    b, precise = side(dtype, scale), torch.promote_types(dtype, torch.float32)

    def scaled(v):
        found = tree.scale(product(tree.map(lambda leaf: leaf.to(precise), v)), of_matrix)
        return tree.map(lambda leaf: leaf.to(dtype), found)

    start = tree.map(lambda leaf: torch.full_like(leaf, started), b) if started else None
    found = ff.conjugate_gradients(scaled, b, iterations=16, start=start)
    x, right = vec(found.x).double(), vec(b).double() / scale
    true = (right - MATRIX @ x * of_matrix / scale).norm() / right.norm()
    assert torch.isfinite(x).all() and abs(found.residuals[-1] - true) < 8 * torch.finfo(dtype).eps + 0.3 * true


def test_a_solution_beyond_its_type_has_no_residual():
    b = side(torch.float16, 3e4)
    found = ff.conjugate_gradients(lambda v: tree.scale(product(v), 1e-3), b, iterations=16)
    assert not torch.isfinite(vec(found.x)).all() and not torch.isfinite(found.residuals[-1])


def test_right_sides_of_different_scales_are_solved_together():
    sides = [side(torch.float32, scale) for scale in (1e-30, 0.0, 1.0, 1e30)]
    stacked = {name: torch.stack([b[name] for b in sides]) for name in SHAPES}
    x, residuals = vmap(lambda b: ff.conjugate_gradients(product, b, iterations=12))(stacked)
    for m, b in enumerate(sides):
        alone = ff.conjugate_gradients(product, b, iterations=12)
        torch.testing.assert_close({name: leaf[m] for name, leaf in x.items()}, alone.x, rtol=1e-5, atol=0)
        assert residuals[m, -1] < 1e-5
    assert not any(leaf[1].any() for leaf in x.values()) and not residuals[1].any()


def test_a_start_that_is_not_zero_does_not_solve_a_right_side_of_zero_at_once():
    zero, start = tree.zeros_like(side(torch.float32)), side(torch.float32)
    found = ff.conjugate_gradients(product, zero, iterations=1, start=start)
    assert any(leaf.any() for leaf in found.x.values()) and found.residuals.isinf().all()


@pytest.mark.parametrize(("built", "given"), [(torch.float16, torch.float16), (torch.float32, torch.float16)])
def test_the_implicit_fisher_solves_for_small_numbers_in_half_precision(built, given):
    params = {"w": torch.randn(3, 4, generator=zoo.generator(0)).to(built)}
    x = torch.randn(7, 4, generator=zoo.generator(1)).to(built)

    def of(params, x):
        ng = ff.natural_gradient(lambda p, x: x @ p["w"].mT, params, x, likelihood=ff.Categorical(), fisher="type2")
        return ng.implicit_fisher(params, x)

    v = {"w": torch.full((3, 4), 1e-4).to(given) * torch.arange(12).reshape(3, 4).to(given)}
    found = of(params, x).solve(v, 0.1, iterations=12)
    exact = of({"w": params["w"].double()}, x.double())
    expected = exact.solve({"w": v["w"].double()}, 0.1, iterations=40)
    assert expected.residual < 1e-10 and found.x["w"].dtype == given and 0 < found.residual < 0.02
    assert (found.x["w"].double() - expected.x["w"]).norm() < 0.02 * expected.x["w"].norm()


def test_a_compiled_solve_is_the_solve():
    b = side(torch.float32, 1e-24)
    compiled = ff.compile(lambda b: ff.conjugate_gradients(product, b, iterations=3), backend="eager")
    found, expected = compiled(b), ff.conjugate_gradients(product, b, iterations=3)
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-4, atol=0)


B = side(torch.float32)
WRONG = {
    "a number in b": ({"b": {"a": 3.0}}, "'a' of b cannot be float"),
    "b has no tensors": ({"b": {}}, "no tensors"),
    "b is a list": ({"b": [1]}, "b cannot be list"),
    "integers": ({"b": {"a": torch.ones(3).long()}}, "'a' of b has type"),
    "complex numbers": ({"b": {"a": torch.ones(3, dtype=torch.complex64)}}, "'a' of b is complex"),
    "a tree in a tree": ({"b": {"a": {"c": torch.ones(3)}}}, "'a' of b cannot be dict"),
    "start is a number": ({"start": 3}, "start must be a tree"),
    "start lacks a name": ({"start": {"w": B["w"]}}, "start must be a tree"),
    "start has another shape": ({"start": {**B, "b": torch.ones(3)}}, "'b' of start has shape"),
    "nothing returned": ({"product": lambda v: None}, "result of product must be a tree.*not NoneType"),
    "a number returned": ({"product": lambda v: {**v, "b": 1.0}}, "'b' of the result of product cannot be float"),
    "a sum returned": ({"product": lambda v: tree.map(torch.sum, v)}, "'w' of the result of product has shape"),
    "no product": ({"product": B}, "product cannot be dict: pass a function"),
    "no preconditioner": ({"precondition": 5}, "precondition cannot be int: pass a function"),
    "no preconditioned tree": ({"precondition": lambda r: [r]}, "result of precondition must be a tree"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_system_is_refused(name):
    given, says = WRONG[name]
    arguments = {"product": product, "b": B, "iterations": 2} | given
    with zoo.as_installed(), pytest.raises((E.StructureError, E.ShapeError), match=says) as caught:
        ff.conjugate_gradients(arguments.pop("product"), arguments.pop("b"), **arguments)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_last_residual_of_conjugate_gradients_is_that_of_the_solution(dtype):
    """After many steps the recursion's own residual has fallen far below what rounding errors allow."""
    problem = zoo.pick("mlp-categorical")
    params, x = ({n: p.to(dtype) for n, p in problem.params.items()}, problem.x.to(dtype))
    ng = ff.natural_gradient(problem.model, params, x, likelihood=problem.likelihood)
    F, b = ng.implicit_fisher(params, x), ff.tree.map(torch.ones_like, params)

    def damped(v):
        return ff.tree.add(F @ v, v, scale=0.01)

    def true(solution):
        return ff.tree.norm(ff.tree.add(b, damped(solution), scale=-1.0)) / ff.tree.norm(b)

    solved = F.solve(b, 0.01, iterations=150)
    torch.testing.assert_close(solved.residual, true(solved.x))
    found = ff.conjugate_gradients(damped, b, iterations=150)
    torch.testing.assert_close(found.residuals[-1], true(found.x))
    assert found.residuals[-1] > 0.01 * torch.finfo(dtype).eps
