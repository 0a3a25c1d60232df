"""Operators against their dense matrices, and scipy's algorithms on them against dense algebra."""

import builtins

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

import fisherfn as ff
from fisherfn.base import LayerMethod, Method
from fisherfn.methods.kfac import KFAC
from tests import oracles, zoo
from tests.methods.protocol import METHODS
from tests.oracles import close, unvec, vec

# plain, groups of several blocks, a parameter that no layer claims, an input factor kept as its diagonal
CASES = pytest.mark.parametrize("id", ["mlp-categorical", "conv-groups", "scale-vector", "tokens"])
DAMPING = 0.3


def fitted(id, method, **hyper):
    """A problem, its natural gradient, and a state of two updates of unlike statistics."""
    problem = zoo.pick(id)
    ng = problem.build(method=method)
    state = ng.init(problem.params, **({"damping": DAMPING} | hyper))
    for seed in (0, 1):
        stats = ng.stats(problem.params, problem.batch, generator=zoo.generator(seed))
        state, _ = ng.update(state, stats)
    return problem, ng, ng.invert(state)[0]


def by_columns(problem, product):
    """The matrix of a linear function of trees, one unit vector at a time."""
    eye = torch.eye(len(vec(problem.params)), dtype=torch.float64)
    return torch.stack([vec(product(unvec(problem.params, column))) for column in eye], 1)


def damped_logdet(dense, damping):
    """`log det(M + λI)` by elimination; NaN where an eigenvalue of a symmetric M + λI is negative."""
    matrix = dense + damping * torch.eye(len(dense), dtype=dense.dtype)
    return torch.slogdet(matrix)[1] if torch.linalg.eigvalsh(matrix).min() > 0 else torch.tensor(torch.nan)


# ------------------------------------------------------------------------------------------------ the sampled Fisher


@CASES
@pytest.mark.parametrize("structure", ["full", "block"])
@pytest.mark.parametrize("fisher", ["mc", "type2"])
def test_spectrum_and_logdet_of_the_fisher_are_those_of_its_definition(id, structure, fisher):
    """Also where the Gram matrix is the smaller one, and where it is not."""
    problem = zoo.pick(id)
    run = zoo.sampled(problem, fisher)
    F = run.ng.fisher(run.stats, structure)
    dense = F.dense() if structure == "block" else oracles.fisher_matrix(problem, fisher, run.draws)
    assert len(F.spectrum()) == len(dense)
    close(F.spectrum(), torch.linalg.eigvalsh(dense))
    close(F.logdet(0.1), damped_logdet(dense, 0.1))
    close(F.logdet(torch.tensor(2.0)), damped_logdet(dense, 2.0))


def test_both_sides_of_the_fishers_spectrum_are_met():
    """More parameters than columns of U, and fewer."""
    problem = zoo.pick("mlp-categorical")
    size, examples = len(vec(problem.params)), len(problem.x)
    for samples in (1, 1 + size // examples):
        run = zoo.sampled(problem, "mc", samples=samples)
        assert (samples * examples < size) == (samples == 1)
        dense = oracles.fisher_matrix(problem, "mc", run.draws)
        close(run.ng.fisher(run.stats).spectrum(), torch.linalg.eigvalsh(dense))


def test_a_singular_fisher_has_no_logdet_without_damping():
    problem = zoo.pick("mlp-categorical")
    run = zoo.sampled(problem, "mc", samples=1)
    assert run.ng.fisher(run.stats).logdet() == -torch.inf


# --------------------------------------------------------------------------------------------------- fitted states


@METHODS
@CASES
def test_trace_spectrum_and_logdet_of_an_approximation_are_those_of_its_matrix(method, id):
    problem, ng, state = fitted(id, method)
    dense = by_columns(problem, lambda v: ng.matvec(state, v))
    approximation = ng.approximation(state)
    v = zoo.random_tree(problem.params)
    close(approximation @ v, ng.matvec(state, v))
    close(approximation.dense(), dense)
    close(approximation.trace(), dense.trace())
    close(approximation.spectrum(), torch.linalg.eigvalsh(dense))
    close(approximation.logdet(DAMPING), damped_logdet(dense, DAMPING))
    close(approximation.logdet(10.0), damped_logdet(dense, 10.0))


@METHODS
@CASES
def test_the_logdet_of_an_inverse_is_that_of_its_matrix(method, id):
    problem, ng, state = fitted(id, method)
    dense = by_columns(problem, lambda v: ng.precondition(state, v))
    inverse = ng.inverse(state)
    close(inverse.dense(), dense)
    close(inverse.logdet(), torch.slogdet(dense)[1])
    assert inverse.symmetric == (method != "twolevel_kfac")


@pytest.mark.parametrize("method", [ff.kfac, ff.ekfac, ff.kpsvd, ff.lanczos, ff.deflation, ff.kfac_corrected])
def test_eigen_damping_has_its_logdet_too(method):
    problem, ng, state = fitted("conv-groups", method(damping_form="eigen"))
    close(ng.inverse(state).logdet(), torch.slogdet(by_columns(problem, lambda v: ng.precondition(state, v)))[1])


@pytest.mark.parametrize("structure", ["full", "block"])
def test_the_exact_inverse_and_the_exact_fisher_agree(structure):
    """-log det of the inverse is log det(F + λI), in example space and in parameter space."""
    for samples in (1, 40):
        problem = zoo.pick("mlp-categorical")
        ng = problem.build(method=ff.exact(structure), samples=samples)
        stats = ng.stats(problem.params, problem.batch, generator=zoo.generator())
        state, _ = ng.update(ng.init(problem.params, damping=DAMPING), stats)
        state, _ = ng.invert(state)
        F = ng.fisher(stats, structure)
        close(-ng.inverse(state).logdet(), F.logdet(DAMPING))
        close(ng.approximation(state).spectrum(), F.spectrum())
        close(ng.approximation(state).trace(), F.trace())


@METHODS
def test_before_the_first_update_the_approximation_is_zero_and_the_inverse_identity_over_damping(method):
    problem = zoo.pick("mlp-categorical")
    ng = problem.build(method=method)
    state = ng.init(problem.params, damping=0.25)
    size = len(vec(problem.params))
    close(ng.approximation(state).trace(), torch.zeros((), dtype=torch.float64))
    close(ng.approximation(state).spectrum(), torch.zeros(size, dtype=torch.float64))
    close(ng.inverse(state).logdet(), torch.tensor(size * np.log(4.0)))


class ByLayers(KFAC):
    """K-FAC without its own quantities: each layer's dense block gives them."""

    trace_block, eigenvalues_block = LayerMethod.trace_block, LayerMethod.eigenvalues_block
    logdet_block = LayerMethod.logdet_block


class ByProducts(KFAC):
    """K-FAC as a method that couples layers and gives products alone."""

    trace, eigenvalues, logdet = Method.trace, Method.eigenvalues, Method.logdet


@pytest.mark.parametrize("method", [ByLayers(), ByProducts()], ids=["layers", "products"])
def test_a_method_that_gives_products_alone_is_made_dense(method):
    problem, ng, state = fitted("conv-groups", method)
    dense = by_columns(problem, lambda v: ng.matvec(state, v))
    close(ng.approximation(state).trace(), dense.trace())
    close(ng.approximation(state).spectrum(), torch.linalg.eigvalsh(dense))
    inverse = by_columns(problem, lambda v: ng.precondition(state, v))
    close(ng.inverse(state).logdet(), torch.slogdet(inverse)[1])


def test_operators_too_large_to_be_dense_raise_with_a_remedy(monkeypatch):
    problem, ng, state = fitted("mlp-categorical", "lanczos")
    monkeypatch.setattr("fisherfn.operators.LARGEST", 3)
    for call in (ng.approximation(state).spectrum, ng.approximation(state).dense):
        with pytest.raises(ff.errors.TooLargeError, match="to_scipy"):
            call()
    monkeypatch.setattr("fisherfn.lowrank.EIGENVALUES", 3)
    stats = ng.stats(problem.params, problem.batch, generator=zoo.generator())
    with pytest.raises(ff.errors.TooLargeError, match="Gram"):
        ng.fisher(stats).spectrum()
    ng.approximation(state).trace()  # two products of traces, whatever the size


def test_a_space_of_the_residual_is_no_linear_operator():
    _, ng, state = fitted("mlp-categorical", ff.two_level(coarse="residual"))
    with pytest.raises(ff.errors.StructureError, match="nicolaides"):
        ng.inverse(state)


@pytest.mark.parametrize("form", ["balanced", "additive"])
def test_the_symmetric_forms_of_two_levels_are_symmetric(form):
    problem, ng, state = fitted("mlp-categorical", ff.two_level(form=form))
    dense = by_columns(problem, lambda v: ng.precondition(state, v))
    assert ng.inverse(state).symmetric
    close(dense, dense.T)


# ----------------------------------------------------------------------------------------------------------- scipy


def operators(id="mlp-categorical"):
    problem, ng, state = fitted(id, "ekfac")
    stats = ng.stats(problem.params, problem.batch, generator=zoo.generator())
    yield problem, ng.fisher(stats)
    yield problem, ng.fisher(stats, "block")
    yield problem, ng.approximation(state)
    yield problem, ng.inverse(state)
    two, three, four = fitted(id, "twolevel_kfac")
    yield two, three.inverse(four)
    yield problem, ng.implicit_fisher(problem.params, problem.x)


@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_a_scipy_operator_has_every_product_of_the_damped_matrix(damping):
    rng = np.random.default_rng(0)
    for problem, operator in operators():
        dense = by_columns(problem, operator.__matmul__).numpy() + damping * np.eye(len(vec(problem.params)))
        seen = operator.to_scipy(damping)
        assert seen.shape == dense.shape and seen.dtype == np.float64
        x, X = rng.normal(size=len(dense)), rng.normal(size=(len(dense), 35))  # more columns than go at a time
        for got, expected in (
            (seen.matvec(x), dense @ x),
            (seen @ X, dense @ X),
            (seen.rmatvec(x), dense.T @ x),
            (seen.rmatmat(X), dense.T @ X),
            (seen.T @ x, dense.T @ x),
            (seen.matvec(x[:, None]), (dense @ x)[:, None]),
        ):
            assert got.shape == expected.shape
            np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-10)


def test_scipys_algorithms_on_the_operator_agree_with_dense_algebra():
    for problem, operator in operators():
        dense = by_columns(problem, operator.__matmul__).numpy()
        b = np.linspace(-1, 1, len(dense))
        if np.allclose(dense, dense.T):
            largest = scipy.sparse.linalg.eigsh(operator.to_scipy(), k=3, return_eigenvectors=False)
            np.testing.assert_allclose(np.sort(largest), np.linalg.eigvalsh(dense)[-3:], rtol=1e-8)
            x, failed = scipy.sparse.linalg.cg(operator.to_scipy(damping=0.5), b, rtol=1e-12)
            assert not failed
            np.testing.assert_allclose(x, np.linalg.solve(dense + 0.5 * np.eye(len(dense)), b), rtol=1e-8)
        else:  # a step that is no symmetric operator, by its transpose
            x = scipy.sparse.linalg.lsqr(operator.to_scipy(0.5), b, atol=1e-14, btol=1e-14, iter_lim=10_000)[0]
            np.testing.assert_allclose(x, np.linalg.solve(dense + 0.5 * np.eye(len(dense)), b), rtol=1e-6)


def test_the_fishers_operator_preconditioned_by_a_fitted_inverse():
    """Use both together: conjugate gradients on F, preconditioned by K-FAC."""
    problem, ng, state = fitted("mlp-categorical", "kfac")
    F = ng.fisher(ng.stats(problem.params, problem.batch, generator=zoo.generator()))
    b = vec(zoo.random_tree(problem.params)).numpy()
    x, failed = scipy.sparse.linalg.cg(F.to_scipy(DAMPING), b, M=ng.inverse(state).to_scipy(), rtol=1e-12)
    assert not failed
    np.testing.assert_allclose(x, vec(F.solve(unvec(problem.params, torch.tensor(b)), DAMPING)).numpy(), rtol=1e-8)


def test_single_precision_stays_single_and_the_numbers_are_double():
    problem = zoo.pick("mlp-categorical")
    params = {name: leaf.float() for name, leaf in problem.params.items()}
    net = problem.net.float()

    def model(params, x):
        return torch.func.functional_call(net, params, (x,))

    ng = ff.natural_gradient(model, params, problem.x.float(), likelihood=ff.Categorical())
    stats = ng.stats(params, (problem.x.float(), problem.y), generator=zoo.generator())
    state, _ = ng.update(ng.init(params), stats)
    assert ng.fisher(stats).to_scipy().dtype == ng.approximation(state).to_scipy().dtype == np.float32
    assert ng.fisher(stats).spectrum().dtype == ng.approximation(state).logdet(1.0).dtype == torch.float64


def test_scipy_that_is_missing_is_a_typed_error(monkeypatch):
    problem, ng, state = fitted("mlp-categorical", "kfac")
    whole = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("scipy"):
            raise ImportError(name)
        return whole(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ff.errors.MissingPackageError, match="pip install scipy"):
        ng.approximation(state).to_scipy()


@pytest.mark.parametrize("damping", [-1.0, "much"])
def test_an_invalid_damping_raises(damping):
    problem, ng, state = fitted("mlp-categorical", "kfac")
    for call in (ng.approximation(state).logdet, ng.approximation(state).to_scipy):
        with zoo.as_installed(), pytest.raises(ff.errors.HyperparameterError):
            call(damping)


def test_a_tree_of_other_names_is_refused():
    problem, ng, state = fitted("mlp-categorical", "kfac")
    for operator in (ng.approximation(state), ng.inverse(state)):
        with zoo.as_installed(), pytest.raises(ff.errors.StructureError, match="like params"):
            operator @ {"elsewhere": torch.ones(1)}


# ------------------------------------------------------------------------------------------------ half precision


@METHODS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrices_of_half_precision_parameters_are_float32(method, dtype):
    """The factors are float32: rounding the products of unit vectors would leave 8 or 11 bits of them."""
    problem = zoo.to(zoo.pick("mlp-categorical"), dtype)
    ng = problem.build(method=method, fisher="type2")
    state, _ = ng.update(ng.init(problem.params, damping=DAMPING), ng.stats(problem.params, problem.batch))
    state, _ = ng.invert(state)
    shapes = ng.layout.block_shapes
    v = zoo.random_tree(problem.params)
    assert {leaf.dtype for leaf in v.values()} == {dtype}
    flat = torch.cat([leaf.flatten() for leaf in v.values()]).float()

    for operator, exact in (
        (ng.approximation(state), lambda W: ng.method.matvec(state.factors, W)),
        (ng.inverse(state), lambda W: ng.method.precondition(state.inverses, W, False).matrices),
    ):
        dense = operator.dense()
        unit = ng.layout.matrices({name: torch.ones_like(leaf, dtype=torch.float32) for name, leaf in v.items()})
        expected = torch.cat([leaf.flatten() for leaf in ng.layout.tree(exact(unit)).values()])
        assert dense.dtype == torch.float32 and unit.keys() == shapes.keys()
        close(dense.sum(1), expected, tol=1e-4)
        numpy = operator.to_scipy() @ np.ones(len(dense), dtype=np.float32)
        assert numpy.dtype == np.float32
        close(torch.as_tensor(numpy), expected, tol=1e-4)
        product = operator @ v
        assert {leaf.dtype for leaf in product.values()} == {dtype}
        close(torch.cat([leaf.flatten() for leaf in product.values()]).float(), dense @ flat, tol=0.02)


TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@METHODS
@pytest.mark.parametrize("built", [torch.float32, torch.float64, torch.bfloat16])
def test_trees_of_another_type_are_multiplied_like_those_of_the_factors(method, built):
    """Operators have the types of v; `precondition` and `matvec` those of the parameters."""
    problem = zoo.to(zoo.pick("scale-vector"), built)
    ng = problem.build(method=method, fisher="type2")
    state, _ = ng.update(ng.init(problem.params, damping=DAMPING), ng.stats(problem.params, problem.batch))
    state, _ = ng.invert(state)
    precision = torch.promote_types(built, torch.float32)
    for dtype in TYPES:
        v = {name: leaf.to(dtype) for name, leaf in zoo.random_tree(problem.params).items()}
        same = {name: leaf.to(precision) for name, leaf in v.items()}
        for operator in (ng.approximation(state), ng.inverse(state)):
            product, expected = operator @ v, operator @ same
            assert {leaf.dtype for leaf in product.values()} == {dtype}
            torch.testing.assert_close(product, {name: leaf.to(dtype) for name, leaf in expected.items()})
        for function in (ng.matvec, ng.precondition):
            product = function(state, v)
            assert {leaf.dtype for leaf in product.values()} == {built}
            torch.testing.assert_close(product, function(state, same))


@pytest.mark.parametrize("dtype", TYPES)
def test_gradients_of_another_type_give_the_step_and_its_length(dtype):
    """Also parameters in no block, whose plain gradient is the step."""
    problem = zoo.to(zoo.pick("scale-vector"), torch.float32)
    ng = problem.build(method="kfac", fisher="type2", uncovered="gradient")
    state = ng.init(problem.params, damping=DAMPING)
    grads = {name: leaf.to(dtype) for name, leaf in zoo.random_tree(problem.params).items()}
    nat, _, info = ng.step_from(state, grads, inner=True)
    expected, _, known = ng.step_from(state, {name: leaf.float() for name, leaf in grads.items()}, inner=True)
    torch.testing.assert_close(nat, expected)
    torch.testing.assert_close(info.inner, known.inner)


def test_a_scipy_operator_takes_any_array():
    problem = zoo.pick("mlp-categorical")
    params = {name: leaf.clone().requires_grad_() for name, leaf in problem.params.items()}
    ng = problem.build(fisher="type2")
    operator = ng.fisher(ng.stats(params, problem.batch)).to_scipy()
    rng = np.random.default_rng(0)
    b, c = rng.normal(size=(2, operator.shape[0]))
    np.testing.assert_allclose(operator @ b[::-1], operator @ b[::-1].copy())
    np.testing.assert_allclose(operator @ (b + 1j * c), operator @ b + 1j * (operator @ c))


def test_the_exact_solve_without_damping_is_not_a_number():
    problem = zoo.pick("mlp-categorical")
    ng = problem.build(fisher="mc")
    stats = ng.stats(problem.params, problem.batch, generator=torch.Generator().manual_seed(0))
    assert all(leaf.isnan().all() for leaf in ng.fisher(stats).solve(stats.grads, 0.0).values())
