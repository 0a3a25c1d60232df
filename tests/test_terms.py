"""A sum of terms: loss, gradient, Fisher and steps from dense per-example Jacobians, with plain autograd."""

import pytest
import torch
from torch.func import jacrev, vmap
from torch.nn.functional import linear

import fisherfn as ff
from fisherfn.errors import (
    EmptyBatchError,
    HyperparameterError,
    NoiseError,
    ShapeError,
    StructureError,
    UnusedParameterError,
)
from fisherfn.types import Shape

NAMES = ("0.weight", "0.bias", "1.weight", "1.bias")


def net(params, x):
    return linear(torch.tanh(linear(x, params["0.weight"], params["0.bias"])), params["1.weight"], params["1.bias"])


def slopes(params, x):
    """The derivative by the first input, carried through the layers: the last bias does not appear."""
    h, along = linear(x, params["0.weight"], params["0.bias"]), x.new_tensor([1.0, 0.0, 0.0]).expand_as(x)
    return linear((1 - torch.tanh(h) ** 2) * linear(along, params["0.weight"]), params["1.weight"])


def by_transform(params, x):
    """The same by torch's own transform, inside which no layer is seen."""
    return vmap(jacrev(lambda point: net(params, point.unsqueeze(0)).squeeze(0)))(x)[..., 0]


def scaled_biases(params, x):
    """A term that reads one parameter only."""
    return params["0.bias"] * x[:, :4]


def points(n, width=3, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem():
    g = torch.Generator().manual_seed(1)
    shapes = ((4, 3), (4,), (2, 4), (2,))
    params = {name: torch.randn(s, generator=g, dtype=torch.float64) for name, s in zip(NAMES, shapes, strict=True)}
    batch = {"inside": (points(7), points(7, 2, 3)), "edge": (points(5, seed=2), points(5, 2, 4))}
    return params, batch


def terms_of(batch, inside=slopes, edge=net, weights=(1.0, 2.5)):
    models = {"inside": (inside, weights[0]), "edge": (edge, weights[1])}
    return {n: ff.Term(m, batch[n][0], ff.Gaussian(), weight=w) for n, (m, w) in models.items()}


def flat(tree):
    return torch.cat([tree[name].reshape(-1) for name in NAMES])


def dense(params, batch, models, weights):
    """The loss, its gradient and the Fisher of the sum, one row of a Jacobian per output of an example."""
    loss, grad, fisher = 0.0, 0.0, 0.0
    for (x, y), model, weight in zip(batch.values(), models, weights, strict=True):
        residual = model(params, x) - y
        J = jacrev(model)(params, x)
        rows = torch.cat([J[name].reshape(residual.numel(), -1) for name in NAMES], -1)
        loss = loss + weight * 0.5 * residual.square().sum() / len(x)
        grad = grad + weight * rows.T @ residual.reshape(-1) / len(x)
        fisher = fisher + weight * rows.T @ rows / len(x)
    return loss, grad, fisher


MODELS = pytest.mark.parametrize("inside", [slopes, by_transform], ids=["layers", "fallbacks"])


@MODELS
def test_loss_gradient_fisher_and_step_are_those_of_stacked_jacobians(inside):
    params, batch = problem()
    ng = ff.sum_of_terms(terms_of(batch, inside), params, method="exact")
    loss, grad, fisher = dense(params, batch, (inside, net), (1.0, 2.5))
    stats = ng.stats(params, batch)
    close(stats.loss, loss)
    close(ng.loss(params, batch), loss)
    close(stats.losses.mean(), loss)
    close(flat(stats.grads), grad)
    close(ng.fisher(stats).dense(), fisher)
    close(ng.fisher(stats).trace(), fisher.trace())
    nat, state, info = ng.step(params, ng.init(params, damping=0.1), batch, inner=True)
    ff.check(info)
    expected = torch.linalg.solve(fisher + 0.1 * torch.eye(len(fisher), dtype=fisher.dtype), grad)
    close(flat(nat), expected)
    close(info.inner, grad @ expected)
    close(ng.trace(state), fisher.trace())


def close(found, expected, tol=1e-9):
    torch.testing.assert_close(found, expected, rtol=tol, atol=tol)


def test_a_weight_without_bias_in_one_term_is_one_layer_and_mixed_kinds_are_fallbacks():
    params, batch = problem()
    blocks = {b.key: b.kind for b in ff.sum_of_terms(terms_of(batch), params, method="exact").layout.blocks}
    assert blocks == {"0": "linear", "1": "linear"}
    mixed = ff.sum_of_terms(terms_of(batch, by_transform), params, method="exact").layout
    assert {b.key: b.kind for b in mixed.blocks} == dict.fromkeys(NAMES, "fallback")
    assert "in different terms" in str(mixed)


def test_one_block_per_layer_is_the_block_diagonal_of_the_sum():
    params, batch = problem()
    ng = ff.sum_of_terms(terms_of(batch), params, method=ff.exact("block"))
    _, grad, fisher = dense(params, batch, (slopes, net), (1.0, 2.5))
    nat, _, _ = ng.step(params, ng.init(params, damping=0.1), batch)
    mask = torch.block_diag(torch.ones(16, 16), torch.ones(10, 10)).double()
    system = fisher * mask + 0.1 * torch.eye(26, dtype=fisher.dtype)
    close(flat(nat), torch.linalg.solve(system, grad))


@pytest.mark.parametrize("method", ["kfac", "ekfac", "kpsvd"])
def test_kronecker_methods_take_the_examples_of_all_terms_as_one_batch(method):
    """Two terms with the model of one, weighted by their examples, are that one model on all examples."""
    params, batch = problem()
    whole = tuple(torch.cat(parts) for parts in zip(*batch.values(), strict=True))
    weights = [len(x) / len(whole[0]) for x, _ in batch.values()]
    ng = ff.sum_of_terms(terms_of(batch, net, net, weights), params, method=method)
    alone = ff.natural_gradient(net, params, whole[0], likelihood=ff.Gaussian(), method=method, fisher="type2")
    steps = [each.step(params, each.init(params, damping=0.1), b)[0] for each, b in ((ng, batch), (alone, whole))]
    close(flat(steps[0]), flat(steps[1]))


def moments(params, model, batch, weight, name="0"):
    """The moments of a layer in one term, with a position per call: inputs and output-gradients by hand."""
    ng = ff.natural_gradient(model, params, batch[0], likelihood=ff.Gaussian(), fisher="type2", unused="ignore")
    tap = ng.stats(params, batch).tap(name)
    a, g = tap.a[0].flatten(0, 1), tap.g[0].flatten(0, 2)
    if a.shape[-1] < 4:  # the layer has no bias in this term
        a = torch.cat([a, torch.zeros(len(a), 1).double()], -1)
    n, positions = len(batch[0]), tap.a.shape[2]
    return a.T @ a / n, weight * g.T @ g / (n * positions)


@pytest.mark.parametrize("names", [["inside"], ["inside", "edge"], ["inside", "edge", "more"]])
def test_one_product_per_term_is_solved_exactly(names):
    """From the third term on, the products share their moments: here those of two terms that are equal."""
    params, batch = problem()
    batch = batch | {"more": batch["edge"]}
    given = {"inside": (slopes, 1.0), "edge": (net, 2.5), "more": (net, 2.5)}
    terms = {n: ff.Term(given[n][0], batch[n][0], ff.Gaussian(), weight=given[n][1]) for n in names}
    ng = ff.sum_of_terms(terms, params, method=ff.kfac_by_term(), unused="ignore")
    batch = {n: batch[n] for n in names}
    nat, _, info = ng.step(params, ng.init(params, damping=1e-4), batch)
    ff.check(info)
    (A, G), *others = [moments(params, given[n][0], batch[n], given[n][1]) for n in names]
    root, pi = 1e-4**0.5, ((A.trace() / len(A)) / (G.trace() / len(G))).sqrt()
    damped = torch.kron(G + root / pi * torch.eye(len(G)).double(), A + pi * root * torch.eye(len(A)).double())
    grads = ng.stats(params, batch).grads
    solved = torch.linalg.solve(damped + sum(torch.kron(D, C) for C, D in others), layer(grads).flatten())
    close(layer(nat).flatten(), solved)


def layer(tree):
    """The first layer's matrix, with the bias as its last column."""
    return torch.cat([tree["0.weight"], tree["0.bias"].unsqueeze(1)], 1)


def test_one_product_per_term_is_kfac_for_one_model():
    params, (x, y) = problem()[0], problem()[1]["edge"]
    found = []
    for method in (ff.kfac(), ff.kfac_by_term()):
        ng = ff.natural_gradient(net, params, x, likelihood=ff.Gaussian(), method=method, fisher="type2")
        state, _ = ng.fit(params, [(x[:2], y[:2]), (x[2:], y[2:])], damping=0.1)
        found.append(torch.cat([flat(ng.precondition(state, params)), flat(ng.matvec(state, params))]))
    close(found[0], found[1])


def sequences(params, x):
    """A layer at every position: `x` is `[N, T, 3]`, or `[N, 3]` for one position."""
    return linear(x, params["0.weight"])


def sequence_terms(method):
    """Terms with seven positions, with one, and with a head of its own that does not contain the layer."""
    x = {"long": points(4, 21).unflatten(1, (7, 3)), "short": points(6, seed=1), "head": points(5, 4, 2)}
    y = {"long": points(4, 14).unflatten(1, (7, 2)), "short": points(6, 2), "head": points(5, 2)}
    params = {"0.weight": points(2, seed=3), "head": points(2, 4, 4)}
    models = {"long": sequences, "short": sequences, "head": lambda params, x: linear(x, params["head"])}
    terms = {name: ff.Term(models[name], x[name], ff.Gaussian(), weight=w) for name, w in WEIGHTS.items()}
    ng = ff.sum_of_terms(terms, params, method=method)
    stats = ng.stats(params, {name: (x[name], y[name]) for name in terms})
    return ng, stats, ng.update(ng.init(params), stats)[0].factors, x


WEIGHTS = {"long": 1.0, "short": 2.5, "head": 0.5}


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_kfac_counts_the_positions_of_each_term(sharing):
    """The output-gradients of a Gaussian are the identity; those of term i count w_i N / N_i, with N in all."""
    _, _, factors, x = sequence_terms(ff.kfac(sharing=sharing))
    n, a = 15, {"long": x["long"].flatten(0, 1), "short": x["short"]}
    rows = {"long": 28, "short": 6}
    share = {name: WEIGHTS[name] * n / len(x[name]) for name in rows}
    if sharing == "reduce":  # seven independent samples of the identity, one per position
        a["long"], rows["long"], share["long"] = x["long"].mean(1), 4, 7 * share["long"]
    A, G = factors["0"]
    close(A[0], sum(each.T @ each for each in a.values()) / n)
    close(G[0], torch.eye(2).double() * sum(share[name] * rows[name] for name in rows) / sum(rows.values()))


@pytest.mark.parametrize("method", [ff.kfac(), ff.ekfac(), ff.kfac_by_term()])
def test_a_head_of_its_own_has_its_whole_curvature(method):
    """The output-gradients are independent of the inputs: K-FAC of the only term with the layer is its Fisher."""
    ng, stats, factors, _ = sequence_terms(method)
    block = ng.layout.block("head")
    trace = ng.method.trace({"head": factors["head"]}, {"head": Shape(*block.shape)})
    close(trace, ng.fisher(stats).block("head").trace())


def test_one_product_per_term_counts_the_positions_of_each_term():
    """Output-gradients are independent of the inputs: the product of each term is its Fisher."""
    ng, stats, factors, _ = sequence_terms(ff.kfac_by_term())
    (A, G), (C, D) = factors["0"]
    close(torch.kron(G[0], A[0]) + torch.kron(D[0], C[0]), ng.fisher(stats).block("0"))


def test_the_correction_of_kfac_completes_a_head_of_its_own():
    """K-FAC is exact there: nothing is left to correct."""
    _, _, factors, _ = sequence_terms(ff.kfac_corrected())
    (A, G), (C, D) = factors["head"]
    assert C.norm() * D.norm() < 1e-6 * A.norm() * G.norm()


def test_a_term_may_read_a_few_parameters_and_no_term_need_have_a_weight():
    params, batch = problem()
    batch["edge"] = (points(5, 4), points(5, 4, 4))
    ng = ff.sum_of_terms(terms_of(batch, net, scaled_biases, (0.0, 1.0)), params, method="exact")
    loss, grad, fisher = dense(params, batch, (net, scaled_biases), (0.0, 1.0))
    stats = ng.stats(params, batch)
    close(stats.loss, loss)
    close(flat(stats.grads), grad)
    close(ng.fisher(stats).dense(), fisher)


def test_chunks_and_windows_are_the_whole():
    params, batch = problem()
    ng = ff.sum_of_terms(terms_of(batch), params, method="exact")
    whole, chunked = ng.stats(params, batch), ng.stats(params, batch, chunk_size=2)
    close(ng.fisher(chunked).dense(), ng.fisher(whole).dense())
    tap = whole.lazy_tap("0")
    parts = [tap.window(slice(start, start + 5)).whole() for start in (0, 5, 10)]
    assert [part.sizes.n for part in parts] == [5, 5, 2]
    close(sum(part.input_moment(99) for part in parts), tap.input_moment(99))
    close(torch.cat([part.g for part in parts[:2]], 2), tap.outputs()[:, :, :10])


def test_sampled_labels_come_from_the_noise_of_each_term():
    params, batch = problem()
    terms = {n: t._replace(fisher="mc", samples=2 + (n == "edge")) for n, t in terms_of(batch).items()}
    ng = ff.sum_of_terms(terms, params, method="exact")
    noise = ng.noise(batch, torch.Generator().manual_seed(5))
    drawn = ng.stats(params, batch, generator=torch.Generator().manual_seed(5))
    close(ng.fisher(ng.stats(params, batch, noise=noise)).dense(), ng.fisher(drawn).dense())
    with pytest.raises(NoiseError, match="term 'inside'"):
        ng.stats(params, batch)


def test_the_quadratic_model_is_that_of_the_dense_fisher():
    params, batch = problem()
    ng = ff.sum_of_terms(terms_of(batch), params, method="kfac")
    loss, grad, fisher = dense(params, batch, (slopes, net), (1.0, 2.5))
    along = {name: torch.ones_like(p) for name, p in params.items()}
    model = ff.quadratic_model(ng, params, batch, [along])
    d = flat(along)
    close(model.value(torch.tensor([0.3], dtype=torch.float64)), 0.045 * d @ fisher @ d + 0.3 * grad @ d)
    close(model.losses.mean(), loss)


def test_many_nets_at_once_are_each_alone():
    params, batch = problem()
    ng = ff.sum_of_terms(terms_of(batch), params, method="exact")
    nets = {name: torch.stack([p, 2 * p]) for name, p in params.items()}

    def step(params):
        return ng.step(params, ng.init(params, damping=0.1), batch)[0]

    together = vmap(step)(nets)
    for i in range(2):
        close(flat({n: p[i] for n, p in together.items()}), flat(step({n: p[i] for n, p in nets.items()})), 1e-8)


def test_statistics_of_a_sum_are_a_tree():
    params, batch = problem()
    ng = ff.sum_of_terms(terms_of(batch), params, method="exact")
    stats = ng.stats(params, batch)
    doubled = ff.tree.map(lambda leaf: leaf, stats)
    close(flat(doubled.grads), flat(stats.grads))


def test_bad_terms_and_batches_raise_errors_that_name_them():
    params, batch = problem()
    terms = terms_of(batch)
    with pytest.raises(StructureError, match="needs a term"):
        ff.sum_of_terms({}, params)
    with pytest.raises(HyperparameterError, match="weight of term 'edge'"):
        ff.sum_of_terms(terms_of(batch, weights=(1.0, -1.0)), params)
    with pytest.raises(HyperparameterError, match="constant"):
        ff.sum_of_terms(terms_of(batch, weights=(0.0, 0.0)), params)
    with pytest.raises(ShapeError, match="term 'edge'"):
        ff.sum_of_terms(terms | {"edge": terms["edge"]._replace(x=torch.zeros(0, 3).double())}, params)
    extra = params | {"2.bias": torch.zeros(3, dtype=torch.float64)}
    with pytest.raises(UnusedParameterError, match=r"2\.bias"):
        ff.sum_of_terms(terms, extra)
    assert ff.sum_of_terms(terms, extra, unused="ignore").layout.unused == ("2.bias",)
    ng = ff.sum_of_terms(terms, params)
    empty = batch | {"edge": (torch.zeros(0, 3).double(), torch.zeros(0, 2).double())}
    with pytest.raises(EmptyBatchError, match="term 'edge'"):
        ng.stats(params, empty)
    with pytest.raises(StructureError, match=r"no entry for terms \['edge'\]"):
        ng.stats(params, {"inside": batch["inside"]})
    with pytest.raises(StructureError, match="keeps the shapes"):
        ng.for_shape(params, points(3))
    with pytest.raises(StructureError, match="one batch per term"):
        ng.fit(params, [batch])
    with pytest.raises(StructureError, match="implicit"):
        ng.implicit_fisher(params, points(3))
    with pytest.raises(StructureError, match="no single model"):
        ng.model(params, points(3))
    with pytest.raises(StructureError, match="line_search"):
        ff.adaptive(ng)


@pytest.mark.parametrize("terms", [{"inside": slopes}, slopes])
def test_what_is_no_term_is_refused(terms):
    with pytest.raises(StructureError, match=r"ff\.Term"):
        ff.sum_of_terms(terms, problem()[0])


def test_the_bias_of_a_call_that_the_outputs_do_not_depend_on_is_unused():
    """The second-order part of a net passes no bias on, though the last layer's call for the value has one."""
    params, batch = problem()

    def value_and_slope(params, x):
        h, along = linear(x, params["0.weight"], params["0.bias"]), x.new_tensor([1.0, 0.0, 0.0]).expand_as(x)
        linear(torch.tanh(h), params["1.weight"], params["1.bias"])
        return linear((1 - torch.tanh(h) ** 2) * linear(along, params["0.weight"]), params["1.weight"])

    alone = ff.natural_gradient(
        value_and_slope, params, batch["inside"][0], likelihood=ff.Gaussian(), method="exact", unused="ignore"
    )
    assert alone.layout.unused == ("1.bias",)
    ng = ff.sum_of_terms(terms_of(batch, value_and_slope), params, method="exact")
    _, grad, fisher = dense(params, batch, (slopes, net), (1.0, 2.5))
    close(flat(ng.stats(params, batch).grads), grad)
    close(ng.fisher(ng.stats(params, batch)).dense(), fisher)


def test_noise_of_no_term_and_a_context_are_refused():
    params = {"w": torch.randn(1, 2)}

    def model(p, x):
        return torch.nn.functional.linear(x, p["w"])

    x, y = torch.randn(3, 2), torch.randn(3, 1)
    ng = ff.sum_of_terms({"a": ff.Term(model, x, ff.Gaussian())}, params)
    with pytest.raises(ff.errors.StructureError, match=r"noise for \['b'\], which are no terms"):
        ng.stats(params, {"a": (x, y)}, noise={"b": torch.randn(3, 1, 1)})
    for call in (ng.stats, ng.loss):
        with pytest.raises(ff.errors.StructureError, match="terms have no context"):
            call(params, {"a": (x, y)}, context={"a": {}})
