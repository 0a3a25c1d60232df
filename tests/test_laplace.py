"""The Laplace approximation against dense normal distributions, in float64."""

from collections import UserDict

import pytest
import torch
from torch.func import grad, jacrev

import fisherfn as ff
from fisherfn import tree
from tests import zoo
from tests.oracles import close, vec

METHODS = {name: ff.METHODS[name] for name in ("kfac", "ekfac", "kpsvd", "kl_optimal", "lanczos")}


def fitted(id="mlp-categorical", method="kfac", prior=0.7):
    """Return problem, posterior and its state."""
    problem = zoo.pick(id)
    posterior = ff.laplace(problem.build(method=METHODS[method](damping_form="eigen"), fisher="type2"))
    state, info = posterior.fit(problem.params, [problem.batch], prior=prior)
    ff.check(info)
    return problem, posterior, state


def precision(problem, posterior, state, prior):
    """Return the dense precision `N (F̂ + δ/N I)`, the inverse of the matrix of a step at this damping."""
    ng, N = posterior.ng, len(problem.x)
    inverted, _ = ng.invert(state.curvature._replace(damping=torch.tensor(prior / N, dtype=zoo.DTYPE)))
    return N * torch.linalg.inv(ng.inverse(inverted).dense())


@pytest.mark.parametrize("method", METHODS)
def test_evidence_and_predictions_are_those_of_the_dense_posterior(method):
    problem, posterior, state = fitted(method=method)
    H, θ, N = precision(problem, posterior, state, 0.7), vec(problem.params), len(problem.x)
    loss = posterior.ng.stats(problem.params, problem.batch).loss
    log_prior = 0.5 * (len(θ) * torch.tensor(0.7, dtype=zoo.DTYPE).log() - 0.7 * θ @ θ)
    close(posterior.log_marginal_likelihood(state), -N * loss + log_prior - 0.5 * torch.slogdet(H)[1])
    J = jacrev(problem.model)(problem.params, problem.x)
    flat = torch.cat([leaf.flatten(2) for leaf in J.values()], 2)
    outputs, covariances = posterior.predict(state, problem.x)
    close(outputs, problem.model(problem.params, problem.x))
    close(covariances, flat @ torch.linalg.inv(H) @ flat.mT, tol=1e-7)
    close(posterior.predict(state, problem.x, chunk_size=2)[1], covariances)


@pytest.mark.parametrize("method", METHODS)
def test_the_precision_is_the_fisher_plus_the_prior_for_methods_with_one_product(method):
    problem, posterior, state = fitted(method=method)
    F = posterior.ng.approximation(state.curvature).dense()
    exact = len(problem.x) * F + 0.7 * torch.eye(len(F), dtype=F.dtype)
    found = precision(problem, posterior, state, 0.7)
    if method == "lanczos":
        assert 1e-4 < (found - exact).norm() / exact.norm() < 0.1  # as the page on error bars says
    else:
        close(found, exact)


def test_a_prior_per_block_is_a_diagonal_of_blocks():
    problem, posterior, state = fitted()
    keys = [block.key for block in posterior.ng.layout.blocks]
    prior = {key: 0.2 * (n + 1) for n, key in enumerate(keys)}
    N, θ = len(problem.x), posterior.ng.layout.matrices(problem.params)
    state = posterior.init(problem.params, prior=prior)._replace(
        curvature=state.curvature, loss=state.loss, examples=state.examples
    )
    expected = -N * state.loss
    for key, factors in state.curvature.factors.items():
        F = torch.kron(factors.G[0].contiguous(), factors.A[0].contiguous())
        H = N * F + prior[key] * torch.eye(len(F), dtype=F.dtype)
        square = prior[key] * θ[key].square().sum()
        expected = expected - 0.5 * (square + torch.slogdet(H / prior[key])[1])
    close(posterior.log_marginal_likelihood(state), expected)
    close(posterior.log_marginal_likelihood(fitted()[2], prior), expected)


@pytest.mark.parametrize("method", ["kfac", "ekfac", "kl_optimal", "lanczos"])
def test_the_chosen_prior_is_where_the_slope_of_the_evidence_vanishes(method):
    problem, posterior, state = fitted(method=method)

    def evidence(logs):
        return posterior.log_marginal_likelihood(state, {key: value.exp() for key, value in logs.items()})

    logs = {key: value.log() for key, value in state.prior.items()}
    slopes, step = grad(evidence)(logs), 1e-5
    for key in logs:
        up, down = (evidence(logs | {key: logs[key] + s}) for s in (step, -step))
        close(slopes[key], (up - down) / (2 * step), tol=1e-6)
        assert abs(slopes[key]) > 1e-3
    chosen = posterior.choose_prior(state)
    for slope in grad(evidence)({key: value.log() for key, value in chosen.prior.items()}).values():
        assert abs(slope) < 1e-5
    one = posterior.choose_prior(state, per_block=False)
    assert len({float(value) for value in one.prior.values()}) == 1
    values = [float(posterior.log_marginal_likelihood(each)) for each in (state, one, chosen)]
    assert values[0] < values[1] < values[2]


def test_an_evidence_inside_vmap_has_no_value_at_a_precision_that_is_not_positive():
    _, posterior, state = fitted()
    priors = torch.tensor([0.7, -2.0, 0.0], dtype=zoo.DTYPE)
    found = torch.vmap(lambda δ: posterior.log_marginal_likelihood(state, dict.fromkeys(state.prior, δ)))(priors)
    close(found[0], posterior.log_marginal_likelihood(state))
    assert not torch.isfinite(found[1:]).any()


def test_updates_over_batches_are_one_fit():
    problem, posterior, whole = fitted()
    state = posterior.init(problem.params, prior=0.7)
    for part in (slice(0, 2), slice(2, 3), slice(3, None)):
        state, info = posterior.update(state, tree.map(lambda leaf, part=part: leaf[part], problem.batch))
        ff.check(info)
    close(state.examples, whole.examples)
    close(state.loss, whole.loss)
    close(posterior.log_marginal_likelihood(state), posterior.log_marginal_likelihood(whole))


@pytest.mark.parametrize("method", ["ekfac", "kpsvd", "kl_optimal", "lanczos"])
def test_methods_whose_averages_are_not_those_of_all_examples_need_a_fit(method):
    problem, posterior, state = fitted(method=method)
    with pytest.raises(ff.errors.StructureError, match=r"posterior\.fit, or use ff\.kfac"):
        posterior.update(state, problem.batch)


def test_a_bad_batch_leaves_the_posterior_as_it_was():
    problem, posterior, state = fitted()
    after, info = posterior.update(state, (problem.x * torch.nan, problem.y))
    assert not any(bool(ok) for ok in info.ok.values())
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(after), tree.leaves(state), strict=True))


def test_what_is_no_posterior_is_refused():
    problem, posterior, state = fitted()
    with pytest.raises(ff.errors.HyperparameterError, match=r'use ff\.kfac\("eigen"\)'):  # it has no eigen form
        ff.laplace(problem.build(method=ff.kfac_by_term()))
    for method, error in ((ff.exact(), ff.errors.StructureError), (ff.kfac(), ff.errors.HyperparameterError)):
        with pytest.raises(error, match="eigen" if error is ff.errors.HyperparameterError else "Kronecker"):
            ff.laplace(problem.build(method=method))
    for prior in (0.0, -1.0, {"nothing": 1.0}, {}):
        with pytest.raises(ff.errors.FisherfnError, match=r"positive|nothing|no prior"):
            posterior.init(problem.params, prior=prior)
    for call in (posterior.log_marginal_likelihood, posterior.choose_prior):
        with pytest.raises(ff.errors.EmptyBatchError, match="no example"):
            call(posterior.init(problem.params))
    with pytest.raises(ff.errors.EmptyBatchError):
        posterior.fit(problem.params, [])
    with pytest.raises(ff.errors.HyperparameterError):
        posterior.sample(state, zoo.generator(), samples=0)
    with pytest.raises(ff.errors.HyperparameterError):
        posterior.choose_prior(state, iterations=0)


def linear_with_mask(p, x, context):
    return torch.nn.functional.linear(x * context["mask"], p["w"], p["b"]) * context["scale"], context


def dropping():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Dropout(0.5), torch.nn.Linear(4, 2))
    model, params, context = ff.functional(net.double().train())
    return model, params, context | {"dropout": ff.dropout_seeds(5, zoo.generator())}


def masked():
    draw = lambda *shape: torch.randn(shape, generator=zoo.generator(len(shape)), dtype=zoo.DTYPE)  # noqa: E731
    context = {"mask": (draw(5, 3) > 0).to(zoo.DTYPE), "scale": torch.tensor([1.0, 2.0], dtype=zoo.DTYPE)}
    return linear_with_mask, {"w": draw(2, 3), "b": draw(2)}, context


@pytest.mark.parametrize("make", [dropping, masked])
def test_each_prediction_has_its_own_entries_of_the_context(make):
    model, params, context = make()
    x = torch.randn(5, 3, generator=zoo.generator(7), dtype=zoo.DTYPE)
    y = torch.randn(5, 2, generator=zoo.generator(8), dtype=zoo.DTYPE)
    ng = ff.natural_gradient(
        model, params, x, likelihood=ff.Gaussian(), context=context, method=ff.kfac("eigen"), fisher="type2"
    )
    posterior = ff.laplace(ng)
    state, _ = posterior.fit(params, [(x, y)], context=context)
    inverted, _ = ng.invert(state.curvature._replace(damping=state.examples.reciprocal()))
    covariance = ng.inverse(inverted).dense() / 5
    J = jacrev(lambda p: model(p, x, context)[0])(params)
    flat = torch.cat([leaf.flatten(2) for leaf in J.values()], 2)
    for chunk_size in (None, 2):
        outputs, covariances = posterior.predict(state, x, context=context, chunk_size=chunk_size)
        close(outputs, model(params, x, context)[0])
        close(covariances, flat @ covariance @ flat.mT, tol=1e-7)
    with zoo.as_installed():
        with pytest.raises(ff.errors.ShapeError, match="entries for"):
            posterior.predict(state, x[:2], context=context)
        with pytest.raises(ff.errors.StructureError, match="no context"):
            posterior.predict(state, x)


def test_predictions_take_named_inputs_in_any_mapping_and_order():
    """Tokenizers return a `collections.UserDict`, whose order need not be that of the build."""
    draw = lambda *shape: torch.randn(shape, generator=zoo.generator(len(shape)), dtype=zoo.DTYPE)  # noqa: E731
    named, y, params = {"ids": draw(5, 3), "mask": draw(5, 1)}, draw(5, 2), {"w": draw(2, 3)}

    def model(p, x):
        return torch.nn.functional.linear(x["ids"] * x["mask"], p["w"])

    ng = ff.natural_gradient(model, params, named, likelihood=ff.Gaussian(), method=ff.kfac("eigen"), fisher="type2")
    posterior = ff.laplace(ng)
    state, _ = posterior.fit(params, [(named, y)])
    expected = posterior.predict(state, named)
    turned = {name: named[name] for name in ("mask", "ids")}
    for given in (UserDict(named), UserDict(turned), turned):
        for mine, its in zip(posterior.predict(state, given), expected, strict=True):
            close(mine, its)


def test_a_net_that_needs_a_batch_has_no_predictions_of_single_examples():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)).double().train()
    model, params, context = ff.functional(net)
    x = torch.randn(5, 3, generator=zoo.generator(), dtype=zoo.DTYPE)
    ng = ff.natural_gradient(
        model, params, x, likelihood=ff.Gaussian(), context=context, method=ff.kfac("eigen"), fisher="type2"
    )
    posterior = ff.laplace(ng)
    with zoo.as_installed(), pytest.raises(ff.errors.ModelError, match=r"net\.eval"):
        posterior.predict(posterior.init(params), x, context=context)


# --------------------------------------------------------------------- priors without fixed point, noise, wrong inputs


def linear_posterior(x, y, params, model, **options):
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Gaussian(), method=ff.kfac("eigen"), fisher="type2")
    posterior = ff.laplace(ng)
    return posterior, posterior.fit(params, [(x, y)], **options)[0]


@pytest.mark.parametrize("zero", ["bias", "last layer", "both"])
def test_blocks_that_determine_no_prior_keep_theirs(zero):
    """A bias that is zero has ‖θ‖ = 0, and below a last layer of zeros no parameter changes the outputs."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 4, generator=g).double(), torch.randn(30, 2, generator=g).double()
    params = {"a": torch.randn(5, 4, generator=g).double(), "b": torch.randn(2, 5, generator=g).double()}
    params["c"] = torch.randn(2, generator=g).double()
    if zero in ("bias", "both"):
        params["c"] = torch.zeros_like(params["c"])
    if zero in ("last layer", "both"):
        params["b"] = torch.zeros_like(params["b"])

    def model(p, x):
        return torch.nn.functional.linear(torch.nn.functional.linear(x, p["a"]).tanh(), p["b"]) + p["c"]

    posterior, state = linear_posterior(x, y, params, model, prior=3.0)
    chosen = posterior.choose_prior(state)
    kept = {"bias": {"c"}, "last layer": {"a", "b"}, "both": {"a", "b", "c"}}[zero]
    for key, δ in chosen.prior.items():
        assert torch.isfinite(δ) and (float(δ) == 3.0) is (key in kept)
    assert torch.isfinite(posterior.log_marginal_likelihood(chosen))
    assert all(torch.isfinite(each).all() for each in posterior.predict(chosen, x))
    one = posterior.choose_prior(state, per_block=False)
    assert len({float(δ) for δ in one.prior.values()}) == 1 and torch.isfinite(one.prior["c"])


def test_in_float32_rounding_errors_are_no_information():
    """Inputs of rank 3: the other 57 eigenvalues of A are zero in float64, and noise in float32."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 3, generator=g).double() @ torch.randn(3, 60, generator=g).double()
    y = torch.randn(20_000, 2, generator=g).double()
    params = {"w": torch.randn(2, 60, generator=g).double()}

    def model(p, x):
        return torch.nn.functional.linear(x, p["w"])

    found = {}
    for dtype in (torch.float64, torch.float32):
        own = {name: leaf.to(dtype) for name, leaf in params.items()}
        posterior, state = linear_posterior(x.to(dtype), y.to(dtype), own, model, prior=1e-4)
        evidence = posterior.log_marginal_likelihood(state) + state.examples * state.loss
        variance = posterior.predict(state, torch.randn(2, 60, generator=g.manual_seed(5)).to(dtype))[1]
        approximation = posterior.ng.approximation(state.curvature)
        found[dtype] = torch.stack([evidence, variance.diagonal(dim1=1, dim2=2).sum(), approximation.logdet(1e-6)])
    torch.testing.assert_close(found[torch.float32], found[torch.float64], rtol=1e-4, atol=0)


def test_a_sum_of_terms_has_no_posterior():
    params = {"w": torch.randn(1, 2)}

    def model(p, x):
        return torch.nn.functional.linear(x, p["w"])

    terms = {name: ff.Term(model, torch.randn(n, 2), ff.Gaussian()) for name, n in (("a", 3), ("b", 9))}
    with pytest.raises(ff.errors.StructureError, match="no single number N of examples"):
        ff.laplace(ff.sum_of_terms(terms, params, method=ff.kfac("eigen")))


def test_a_posterior_keeps_no_graph():
    problem = zoo.pick("mlp-categorical")
    params = {name: leaf.clone().requires_grad_() for name, leaf in problem.params.items()}
    posterior = ff.laplace(problem.build(method=ff.kfac("eigen"), fisher="type2"))
    state, _ = posterior.update(posterior.init(params), problem.batch)
    assert not state.loss.requires_grad


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda x: x[0], ff.errors.ShapeError),
        (lambda x: x[:, :-1], ff.errors.ShapeError),
        (lambda x: x.unsqueeze(1), ff.errors.ShapeError),
    ],
    ids=["one example", "too short", "a sequence"],
)
def test_predictions_are_of_examples_as_at_the_build(change, error):
    problem, posterior, state = fitted()
    with pytest.raises(error, match="traced with"):
        posterior.predict(state, change(problem.x))
    with pytest.raises(ff.errors.HyperparameterError, match="chunk_size"):
        posterior.predict(state, problem.x, chunk_size=0)


def test_in_float32_small_eigenvalues_above_the_rounding_errors_stay():
    """The inputs have scales 1, 1/2, …, 1/256: the eigenvalues of A go down to 1.5e-5 of the largest."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 256, generator=g).double() / torch.arange(1, 257)
    y, params = torch.randn(1024, 1, generator=g).double(), {"w": torch.randn(1, 256, generator=g).double()}

    def model(p, x):
        return torch.nn.functional.linear(x, p["w"])

    found = []
    for dtype in (torch.float64, torch.float32):
        own = {name: leaf.to(dtype) for name, leaf in params.items()}
        posterior, state = linear_posterior(x.to(dtype), y.to(dtype), own, model, prior=1e-2)
        logdet = posterior.ng.approximation(state.curvature).logdet(1e-6)
        weakest = posterior.predict(state, torch.eye(256, dtype=dtype)[-1:])[1].sum()
        found.append(torch.stack([posterior.log_marginal_likelihood(state), logdet, weakest]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=0)


def test_factors_that_are_not_finite_have_no_logdet_and_raise_nothing():
    x, params = torch.randn(8, 3), {"w": torch.randn(1, 3)}
    posterior, state = linear_posterior(
        x, torch.randn(8, 1), params, lambda p, x: torch.nn.functional.linear(x, p["w"])
    )
    bad = {key: tree.map(lambda leaf: leaf * torch.nan, each) for key, each in state.curvature.factors.items()}
    posterior.ng.approximation(state.curvature._replace(factors=bad)).logdet(0.1)
