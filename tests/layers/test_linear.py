"""Linear layers in other clothes: `x @ W`, examples on another axis, examples and positions merged, addmm."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fisherfn as ff
from tests import oracles, zoo
from tests.layers.checks import check_fisher, check_gradients, kinds, normal
from tests.nets import Readout
from tests.oracles import close, vec
from tests.zoo import sampled

READ = Readout(2)


def usual(p, x):
    return READ(torch.tanh(F.linear(x, p["w"], p["b"])))


def positions_first(p, x):
    """`[T, N, d]`."""
    return READ(torch.tanh(F.linear(x.transpose(0, 1), p["w"], p["b"])).transpose(0, 1))


def merged(p, x):
    """`[N·T, d]`, examples outermost."""
    return READ(torch.tanh(F.linear(x.reshape(-1, x.shape[-1]), p["w"], p["b"])).reshape(*x.shape[:2], -1))


FORMS = {"positions-first": positions_first, "merged": merged}


def problem_of(model, shape, d_out=2, likelihood="categorical"):
    params = {"w": normal(d_out, shape[-1]), "b": normal(d_out, seed=1)}
    return zoo.from_model(model, params, normal(*shape, seed=2), likelihood, zoo.generator(), {})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(4, 3, 2), (3, 3, 2), (2, 4, 2), (4, 2, 3), (1, 3, 2), (5, 1, 2)], ids=str)
def test_the_layer_is_found_wherever_the_examples_are(form, shape):
    """The same taps as in the usual form, positions in their order; shapes that could be mistaken included."""
    problem, plain = problem_of(FORMS[form], shape), problem_of(usual, shape)
    run, other = sampled(problem), sampled(plain)
    assert kinds(run.ng) == {"w": "linear"}
    check_gradients(problem, run.ng, run.stats)
    check_fisher(problem, run, "mc")
    for mine, its in zip(run.stats.tap("w"), other.stats.tap("w"), strict=True):
        close(mine, its)


@pytest.mark.parametrize("form", FORMS)
@given(traced=st.integers(1, 6), size=st.integers(1, 6))
def test_the_batch_may_differ_from_the_trace(form, traced, size):
    """Three positions; the axis of the examples is found at the trace and kept."""
    problem = problem_of(FORMS[form], (size, 3, 2))
    ng = ff.natural_gradient(
        problem.model, problem.params, normal(traced, 3, 2), likelihood=ff.Categorical(), fisher="empirical"
    )
    assert kinds(ng) == {"w": "linear"}
    stats = ng.stats(problem.params, problem.batch)
    close(ng.fisher(stats).dense(), oracles.fisher_matrix(problem, "empirical"))
    check_gradients(problem, ng, stats)


@pytest.mark.parametrize("form", FORMS)
def test_chunks_take_the_examples_wherever_they_are(form):
    problem = problem_of(FORMS[form], (5, 3, 2))
    run = sampled(problem)
    parts = run.ng.stats(problem.params, problem.batch, noise=run.noise, chunk_size=2)
    close(run.ng.fisher(parts).dense(), run.ng.fisher(run.stats).dense())
    close(dict(parts.grads), dict(run.stats.grads))


def test_positions_outermost_in_a_merged_axis_are_exact():
    """`[T·N, d]`: whatever block it gets."""

    def model(p, x):
        flat = x.transpose(0, 1).reshape(-1, x.shape[-1])
        return READ(torch.tanh(F.linear(flat, p["w"], p["b"])).reshape(x.shape[1], len(x), -1).transpose(0, 1))

    for shape in ((4, 3, 2), (3, 3, 2)):
        problem = problem_of(model, shape)
        run = sampled(problem)
        check_fisher(problem, run, "mc")
        close(dict(run.stats.grads), oracles.mean_gradient(problem))


# ------------------------------------------------------------------------------------------------------ x @ W

MATMULS = {
    "@": lambda x, W, b: x @ W,
    "torch.matmul": lambda x, W, b: torch.matmul(x, W),
    "Tensor.matmul": lambda x, W, b: x.matmul(W),
    "keywords": lambda x, W, b: torch.matmul(other=W, input=x),
    "torch.addmm": lambda x, W, b: torch.addmm(b, x, W),
    "Conv1D": lambda x, W, b: torch.addmm(b, x.view(-1, x.size(-1)), W).view(*x.shape[:-1], W.shape[1]),
    "torch.mm": lambda x, W, b: torch.mm(x, W),
}
BIASED = {"torch.addmm", "Conv1D"}
FLAT = {"torch.addmm", "torch.mm"}


def matmul_problem(function, shape, biased, likelihood="categorical"):
    """Weight `[d_in, d_out]`, as it stands to the right of its input."""

    def model(p, x):
        return READ(torch.tanh(function(x, p["w"], p.get("b"))))

    params = {"w": normal(shape[-1], 2)} | ({"b": normal(2, seed=1)} if biased else {})
    return zoo.from_model(model, params, normal(*shape, seed=2), likelihood, zoo.generator(), {})


@pytest.mark.parametrize("call", MATMULS)
@pytest.mark.parametrize("fisher", zoo.FISHERS)
def test_a_weight_on_the_right_is_a_linear_layer(call, fisher):
    """Same K-FAC step as F.linear with the transposed weight."""
    shape, biased = (4, 3) if call in FLAT else (4, 2, 3), call in BIASED
    problem = matmul_problem(MATMULS[call], shape, biased)
    run = sampled(problem, fisher)
    assert kinds(run.ng) == {"w": "matmul"}
    check_gradients(problem, run.ng, run.stats)
    check_fisher(problem, run, fisher)
    assert run.ng.layout.block("w").shape == (1, 2, 3 + biased)

    def linear(p, x):
        return READ(torch.tanh(F.linear(x, p["w"], p.get("b"))))

    params = {**problem.params, "w": problem.params["w"].T.contiguous()}
    plain = zoo.replace(problem, model=linear, params=params)
    ng = plain.build(fisher=fisher, samples=zoo.SAMPLES if fisher == "mc" else 1)
    assert kinds(ng) == {"w": "linear"}
    nat, same = (
        n.step(p.params, n.init(p.params, damping=0.1), p.batch, noise=run.noise)[0]
        for n, p in ((run.ng, problem), (ng, plain))
    )
    close({**nat, "w": nat["w"].T}, same, tol=1e-9)


EXACT_ANYWAY = {
    "addmm-alpha": lambda x, W, b: torch.addmm(b, x, W, alpha=0.5),
    "addmm-beta": lambda x, W, b: torch.addmm(b, x, W, beta=2.0),
    "addmm-matrix-bias": lambda x, W, b: torch.addmm(b.expand(x.shape[0], -1), x, W),
    "transposed": lambda x, W, b: torch.tanh(x @ W) @ W.T @ W + b,
    "left": lambda x, W, b: (W.T @ x.T).T + b,
    "vector": lambda x, W, b: torch.stack([x @ W[:, 0], x @ W[:, 1]], dim=-1) + b,
    "einsum": lambda x, W, b: torch.einsum("ni,io->no", x, W) + b,
    "both-sides": lambda x, W, b: F.linear(x @ W, W) @ W + b,
    "batched": lambda x, W, b: torch.bmm(x.unsqueeze(1), W.expand(len(x), -1, -1)).squeeze(1) + b,
    "matrix-bias": lambda x, W, b: x @ W + b,
}


@pytest.mark.parametrize("call", EXACT_ANYWAY)
def test_other_products_are_exact_in_whatever_block(call):
    problem = matmul_problem(EXACT_ANYWAY[call], (4, 3), True)
    run = sampled(problem, "type2")
    close(run.ng.fisher(run.stats).dense(), oracles.fisher_matrix(problem, "type2"))
    close(dict(run.stats.grads), oracles.mean_gradient(problem))


def test_activations_are_no_weights():
    """q kᵀ between activations is no layer."""

    def model(p, x):
        h = F.linear(x, p["w"], p["b"])
        return READ(torch.softmax(h @ h.mT, -1) @ h)

    problem = problem_of(model, (3, 2, 3))
    run = sampled(problem)
    assert kinds(run.ng) == {"w": "linear"}
    check_fisher(problem, run, "mc")


# ------------------------------------------------------------------------------------------------- wide factors


@pytest.mark.parametrize("limit", [2, 3, 4])
@pytest.mark.parametrize("form", ["factored", "eigen"])
def test_factors_wider_than_the_limit_keep_their_diagonal(limit, form):
    """A is 4 wide (bias included), G 3: each on its own, at the limit still full."""
    problem = zoo.from_net(nn.Sequential(nn.Linear(3, 3), Readout(2)), (5, 3), "categorical")
    run = sampled(problem, "type2", method=ff.kfac(damping_form=form, diagonal_above=limit))
    ((A, G),) = oracles.kfac_of(problem, "type2").values()
    A, G = (M if len(M) <= limit else M.diagonal().diag() for M in (A, G))
    state, _ = run.ng.update(run.ng.init(problem.params, damping=0.1), run.stats)
    v = zoo.random_tree(problem.params)
    dense = oracles.kfac_dense(problem, {"0": (A, G)}, oracles.kfac_block)
    close(run.ng.matvec(state, v), oracles.unvec(v, dense @ vec(v)))
    damped = oracles.kfac_dense(problem, {"0": (A, G)}, lambda A, G: oracles.kfac_damped(A, G, 0.1, form))
    nat = run.ng.precondition(run.ng.invert(state)[0], v)
    close(nat, oracles.unvec(v, torch.linalg.solve(damped, vec(v))), tol=1e-7)


def test_an_unknown_sharing_names_the_known_ones():
    with zoo.as_installed(), pytest.raises(ff.errors.UnknownNameError, match="expand"):
        ff.kfac(sharing="expanded")


TRANSPOSED = {
    "x @ w.T": (lambda p, x: x @ p["w"].T, "linear"),
    "x @ w.T + b": (lambda p, x: x @ p["w"].T + p["b"], "linear"),
    "x @ w.t()": (lambda p, x: x @ p["w"].t(), "linear"),
    "x @ w.mT": (lambda p, x: torch.matmul(x, p["w"].mT), "linear"),
    "x @ w.transpose": (lambda p, x: x.matmul(p["w"].transpose(0, 1)), "linear"),
    "x @ w.permute": (lambda p, x: x @ p["w"].permute(1, 0), "linear"),
    "addmm": (lambda p, x: torch.addmm(p["b"], x.flatten(0, 1), p["w"].t()).unflatten(0, x.shape[:2]), "linear"),
    "mm": (lambda p, x: torch.mm(x.flatten(0, 1), p["w"].t()).unflatten(0, x.shape[:2]), "linear"),
    "twice": (lambda p, x: (x @ p["w"].T) * torch.tanh(F.linear(x, p["w"], p["b"])), "linear"),
    "the one transpose used twice": (lambda p, x: twice(p["w"].T, x), "linear"),
    "read elsewhere": (lambda p, x: x @ p["w"].T + p["w"].T.sum(0), "fallback"),
    "the other side": (lambda p, x: (p["w"] @ x.mT).mT, "einsum"),
    "scaled": (lambda p, x: x @ (0.5 * p["w"].T), "copied"),
}


def twice(transpose, x):
    return (x @ transpose) * torch.tanh(x.flip(1) @ transpose)


@pytest.mark.parametrize("way", TRANSPOSED)
@pytest.mark.parametrize("d_out", [2, 3])
def test_a_transposed_weight_is_a_layer_where_it_is_only_multiplied_with(way, d_out):
    how, kind = TRANSPOSED[way]

    def model(p, x):
        return READ(torch.tanh(how(p, x) + p["b"]))

    problem = problem_of(model, (3, 2, 3), d_out)
    run = sampled(problem)
    assert kinds(run.ng)["w"] == kind
    check_gradients(problem, run.ng, run.stats)
    check_fisher(problem, run, "mc")


@pytest.mark.parametrize("d_out", [2, 3])
def test_a_linear_layer_of_a_transposed_weight_is_a_product(d_out):
    params = {"w": normal(3, d_out), "b": normal(d_out, seed=1)}
    model = lambda p, x: READ(torch.tanh(F.linear(x, p["w"].T, p["b"])))  # noqa: E731
    problem = zoo.from_model(model, params, normal(3, 2, 3, seed=2), "categorical", zoo.generator(), {})
    run = sampled(problem)
    assert kinds(run.ng) == {"w": "matmul", "b": "elementwise"}
    check_gradients(problem, run.ng, run.stats)
    check_fisher(problem, run, "mc")


@pytest.mark.parametrize("positions", [(), (2,)])
def test_a_bias_that_is_broadcast_over_the_outputs_is_no_layers_own(positions):
    """One number for all outputs: the weight is a linear layer, the number a shift."""
    params = {"w": normal(3, 4), "b": normal(1)}

    def model(p, x):
        out = F.linear(x, p["w"], p["b"])
        return out if out.ndim == 2 else out.mean(1)

    problem = zoo.from_model(model, params, normal(3, *positions, 4, seed=2), "categorical", zoo.generator(), {})
    run = sampled(problem, "type2")
    assert run.ng.layout.block("w").bias is None
    check_gradients(problem, run.ng, run.stats)
