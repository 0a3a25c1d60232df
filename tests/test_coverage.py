"""Every parameter is covered, the report says by what and why, and the fallback is exact, cross terms included."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherfn as ff
from fisherfn.stats import Block
from tests import oracles, zoo
from tests.nets import outside
from tests.oracles import close, unvec, vec
from tests.zoo import FISHERS, sampled


def keys(problem):
    return set(sampled(problem, "empirical").stats.taps)


@pytest.mark.parametrize("make", zoo.cases())
def test_the_report_names_every_parameter(make):
    problem = make()
    report = str(problem.build().layout)
    assert all(name in report for name in problem.params)


@pytest.mark.parametrize(
    "id", ["mlp-categorical", "tied-layer", "sequence-pooled", "callable", "frozen-bias", "no-bias"]
)
def test_layers_are_found_without_fallback(id):
    problem = zoo.pick(id)
    assert keys(problem) == set(problem.blocks)
    assert "fallback" not in str(problem.build().layout).splitlines()[2:-1].__str__()


@pytest.mark.parametrize(("id", "name"), [("scale-matrix", "scale"), ("weight-elsewhere", "first.weight")])
def test_parameters_of_no_layer_are_reported_with_a_reason(id, name):
    lines = [line for line in str(zoo.pick(id).build().layout).splitlines() if name in line and "fallback" in line]
    assert lines, "the fallback is not in the report"
    assert len(lines[0].split(name)[-1].strip()) > 10, f"no reason given: {lines[0]!r}"


@pytest.mark.parametrize(
    "id", ["scale-vector", "scale-matrix", "matmul", "weight-elsewhere", "tied-weights", "frozen-weight", "layer-norm"]
)
@pytest.mark.parametrize("fisher", FISHERS)
def test_the_full_fisher_has_the_cross_terms_of_the_fallback(id, fisher):
    problem = zoo.pick(id)
    run = sampled(problem, fisher)
    dense = oracles.fisher_matrix(problem, fisher, run.draws)
    off = dense - torch.block_diag(*[torch.ones(p.numel(), p.numel()) for p in problem.params.values()]) * dense
    assert off.abs().max() > 1e-3 * dense.abs().max()  # there are cross terms to get wrong
    close(run.ng.fisher(run.stats).dense(), dense)


@pytest.mark.parametrize("id", ["scale-vector", "scale-matrix"])
@pytest.mark.parametrize("fisher", FISHERS)
def test_a_small_fallback_is_one_dense_block_for_kfac(id, fisher):
    """a = 1 and g the gradient: A = 1, G the exact block; damping π-split of an exact block is (F + λI)⁻¹-like."""
    problem = zoo.pick(id)
    run = sampled(problem, fisher)
    dense = oracles.fisher_matrix(problem, fisher, run.draws)
    at = oracles.positions(problem.params, ("scale",))
    state, _ = run.ng.update(run.ng.init(problem.params), run.stats)
    v = zoo.random_tree(problem.params)
    close(run.ng.matvec(state, v)["scale"], dense[at[:, None], at] @ v["scale"])


@pytest.mark.parametrize("id", ["scale-vector", "scale-matrix"])
def test_a_fallback_is_a_tap_with_a_equal_to_one(id):
    run = sampled(zoo.pick(id), samples=3)
    tap = run.stats.taps["scale"]
    assert tap.a.shape == (1, 5, 1, 1) and tap.g.shape == (1, 3, 5, 1, 4)
    assert bool((tap.a == 1).all())


def big_scale(kind, width=3000):
    generator = zoo.generator()
    params = {
        "scale": torch.randn(width, generator=generator, dtype=torch.float64),
        "last.weight": torch.randn(2, width, generator=generator, dtype=torch.float64) / width**0.5,
    }
    x = torch.randn(4, width, generator=generator, dtype=torch.float64)

    def model(params, x):
        scaled = x * params["scale"] if kind == "elementwise" else torch.einsum("ni,i->ni", x, outside(params["scale"]))
        return F.linear(torch.tanh(scaled), params["last.weight"])

    blocks = {"scale": ("scale",), "last": ("last.weight",)}
    return zoo.from_model(model, params, x, "categorical", generator, blocks)


@pytest.mark.parametrize("kind", ["elementwise", "fallback"])
def test_a_big_parameter_without_a_matrix_is_one_block_per_entry(kind):
    """K = entries: the K-FAC blocks are scalars, the full Fisher keeps every cross term."""
    problem = big_scale(kind)
    run = sampled(problem, "empirical")
    assert run.ng.layout.block("scale").kind == kind
    assert run.stats.taps["scale"].g.shape == (3000, 1, 4, 1, 1)
    U = oracles.columns(problem, "empirical")
    v = zoo.random_tree(problem.params)
    close(run.ng.fisher(run.stats) @ v, unvec(problem.params, U @ (U.T @ vec(v))))
    damped = U.T @ U + 0.1 * torch.eye(4, dtype=torch.float64)
    solved = (vec(v) - U @ torch.linalg.solve(damped, U.T @ vec(v))) / 0.1
    close(run.ng.fisher(run.stats).solve(v, 0.1), unvec(problem.params, solved))
    state, _ = run.ng.update(run.ng.init(problem.params), run.stats)
    at = oracles.positions(problem.params, ("scale",))
    close(run.ng.matvec(state, v)["scale"], U[at].square().sum(1) * v["scale"])


# --------------------------------------------------------------------------------------------- unusual ways to use


def exact_under(model, params, x, likelihood="categorical", fisher="type2"):
    problem = zoo.from_model(model, params, x, likelihood, zoo.generator(3), {})
    run = sampled(problem, fisher)
    close(run.ng.fisher(run.stats).dense(), oracles.fisher_matrix(problem, fisher, run.draws))
    close(dict(run.stats.grads), oracles.mean_gradient(problem))
    return run.ng


def normal(*shape, seed=0):
    return torch.randn(shape, generator=zoo.generator(seed), dtype=torch.float64)


def weird_models():
    w, b, v, u = normal(3, 3, seed=1), normal(3, seed=2), normal(2, 3, seed=3), normal(3, 3, seed=4)

    def transposed(p, x):
        return F.linear(torch.tanh(F.linear(x, p["w"].t(), p["b"])), p["v"])

    def both_ways(p, x):
        return F.linear(F.linear(torch.tanh(F.linear(x, p["w"], p["b"])), p["w"].t()), p["v"])

    def keyword(p, x):
        return F.linear(input=torch.tanh(F.linear(x, bias=p["b"], weight=p["w"])), weight=p["v"])

    def bias_shared(p, x):
        return F.linear(torch.tanh(F.linear(torch.tanh(F.linear(x, p["w"], p["b"])), p["w"], p["b"])), p["v"])

    def bias_of_two(p, x):
        return F.linear(torch.tanh(F.linear(x, p["w"], p["b"])) + F.linear(x, p["u"], p["b"]), p["v"])

    def sometimes_biased(p, x):
        return F.linear(torch.tanh(F.linear(torch.tanh(F.linear(x, p["w"], p["b"])), p["w"])), p["v"])

    def penalised(p, x):
        return F.linear(torch.tanh(F.linear(x, p["w"], p["b"])), p["v"]) + p["w"].square().sum()

    def in_place(p, x):
        return F.linear(F.linear(x, p["w"], p["b"]).mul_(2.0).tanh_(), p["v"])

    def mixed_positions(p, x):
        pair = torch.stack([x, 2 * x, x.square()], dim=1)
        return F.linear(torch.tanh(F.linear(pair, p["w"], p["b"]).sum(1)) + F.linear(x, p["w"], p["b"]), p["v"])

    models = [transposed, both_ways, keyword, bias_shared, sometimes_biased, penalised, in_place, mixed_positions]
    cases = [pytest.param(m, {"w": w, "b": b, "v": v}, id=m.__name__) for m in models]
    return [*cases, pytest.param(bias_of_two, {"w": w, "b": b, "v": v, "u": u}, id="bias_of_two")]


@pytest.mark.parametrize(("model", "params"), weird_models())
@pytest.mark.parametrize("fisher", FISHERS)
def test_the_fisher_is_exact_however_the_weights_are_used(model, params, fisher):
    exact_under(model, params, normal(4, 3), fisher=fisher)


def test_a_bias_left_out_of_one_use_is_a_zero_in_its_column():
    """W = [weight | bias] at every position: a ends in 1 where the bias was added, in 0 where it was not."""

    def model(p, x):
        hidden = torch.tanh(F.linear(x, p["lay.weight"], p["lay.bias"]))
        return F.linear(hidden, p["lay.weight"])

    ng = exact_under(model, {"lay.weight": normal(3, 3), "lay.bias": normal(3)}, normal(4, 3))
    stats = ng.stats({"lay.weight": normal(3, 3), "lay.bias": normal(3)}, (normal(4, 3), torch.tensor([0, 1, 2, 0])))
    assert stats.taps["lay"].a[0, :, :, -1].tolist() == [[1.0, 0.0]] * 4


def folded(p, x):
    """Examples and positions in one axis, as many models do before a head."""
    hidden = torch.tanh(F.linear(x.reshape(-1, 3), p["w"], p["b"]))
    return F.linear(hidden, p["v"]).reshape(*x.shape[:2], 2)


def time_first(p, x):
    """Positions lead: with as many examples as positions the shapes cannot tell."""
    hidden = torch.tanh(F.linear(x.transpose(0, 1), p["w"], p["b"]))
    return F.linear(hidden, p["v"]).transpose(0, 1)


FOLDS = pytest.mark.parametrize("model", [folded, time_first], ids=["folded", "time_first"])


@FOLDS
@pytest.mark.parametrize("shape", [(4, 4, 3), (4, 2, 3), (2, 4, 3), (1, 4, 3)], ids=str)
@pytest.mark.parametrize("fisher", FISHERS)
def test_the_first_axis_of_a_layer_need_not_be_the_examples(model, shape, fisher):
    exact_under(model, {"w": normal(3, 3), "b": normal(3), "v": normal(2, 3)}, normal(*shape), fisher=fisher)


@FOLDS
@pytest.mark.parametrize("traced", [1, 3, 4, 8])
def test_the_first_axis_after_a_trace_of_another_size(model, traced):
    """Built with `traced` examples, used with four, of three positions; also when a context comes along."""
    params = {"w": normal(3, 3), "b": normal(3), "v": normal(2, 3)}
    example, x, y = normal(traced, 3, 3), normal(4, 3, 3, seed=5), torch.tensor([[0, 1, 1]] * 4)
    problem = zoo.Problem(model, params, x, y, ff.Categorical(), zoo.LIKELIHOODS["categorical"][1], {})
    exact = oracles.fisher_matrix(problem, "empirical")
    ng = ff.natural_gradient(model, params, example, likelihood=ff.Categorical(), fisher="empirical")
    close(ng.fisher(ng.stats(params, (x, y))).dense(), exact)

    def with_context(p, x, context):
        return model(p, x) + 0 * context["unused"], context

    context = {"unused": torch.zeros(1, dtype=torch.float64)}
    ng = ff.natural_gradient(
        with_context, params, example, likelihood=ff.Categorical(), fisher="empirical", context=context
    )
    close(ng.fisher(ng.stats(params, (x, y), context=context)).dense(), exact)


def test_a_second_use_of_a_weight_is_noticed():
    def model(p, x):
        return F.linear(torch.tanh(F.linear(x, p["w"])), p["v"]) + (x @ p["w"])[:, :2]

    ng = exact_under(model, {"w": normal(3, 3), "v": normal(2, 3)}, normal(4, 3, seed=5))
    assert "fallback" in str(ng.layout)


def test_a_second_use_is_noticed_whatever_the_example_inputs():
    """People trace with zeros: then the second use has no gradient at the trace."""

    def model(p, x):
        return F.linear(torch.tanh(F.linear(x, p["w"], p["b"])), p["v"]) + (x @ p["w"])[:, :2]

    params = {"w": normal(3, 3), "b": normal(3, seed=2), "v": normal(2, 3)}
    x, y = normal(4, 3, seed=5), torch.tensor([0, 1, 1, 0])
    ng = ff.natural_gradient(model, params, torch.zeros_like(x), likelihood=ff.Categorical(), fisher="empirical")
    problem = zoo.Problem(model, params, x, y, ff.Categorical(), zoo.LIKELIHOODS["categorical"][1], {})
    close(ng.fisher(ng.stats(params, (x, y))).dense(), oracles.fisher_matrix(problem, "empirical"))


def test_a_dead_layer_is_used_all_the_same():
    """No gradient at the trace is not the same as no use."""
    net = zoo.mlp(3, 4, 2, act=nn.ReLU)
    problem = zoo.from_net(net, (4, 3), "categorical")
    params = {**problem.params, "0.bias": torch.full((4,), -100.0, dtype=torch.float64)}
    ng = ff.natural_gradient(problem.model, params, problem.x, likelihood=ff.Categorical(), fisher="empirical")
    close(ng.fisher(ng.stats(problem.params, problem.batch)).dense(), oracles.fisher_matrix(problem, "empirical"))


def test_a_zero_scale_is_used_all_the_same():
    problem = zoo.pick("scale-vector")
    params = {**problem.params, "last.weight": torch.zeros(2, 4, dtype=torch.float64)}
    ng = ff.natural_gradient(problem.model, params, problem.x, likelihood=ff.Categorical(), fisher="empirical")
    close(ng.fisher(ng.stats(problem.params, problem.batch)).dense(), oracles.fisher_matrix(problem, "empirical"))


def test_inputs_may_be_a_tree():
    def model(p, x):
        left, right = x["left"], x["right"]
        return F.linear(left, p["a.weight"], p["a.bias"]) + F.linear(right, p["b.weight"])

    params = {"a.weight": normal(2, 3), "a.bias": normal(2), "b.weight": normal(2, 4)}
    x = {"left": normal(5, 3), "right": normal(5, 4)}
    y = torch.tensor([0, 1, 0, 1, 1])
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), fisher="empirical")
    stats = ng.stats(params, (x, y), chunk_size=2)
    joined = torch.cat([x["left"], x["right"]], dim=1)

    def flat_model(p, x):
        return model(p, {"left": x[:, :3], "right": x[:, 3:]})

    problem = zoo.Problem(flat_model, params, joined, y, ff.Categorical(), zoo.LIKELIHOODS["categorical"][1], {})
    close(stats.grads, oracles.mean_gradient(problem))
    whole = ng.fisher(ng.stats(params, (x, y)))
    close(whole.dense(), oracles.fisher_matrix(problem, "empirical"))


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, on its first jvp
@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap"])
def test_layers_inside_a_transform_of_the_models_own_fall_back_and_are_exact(transform):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    params = {"w": draw(3, 2), "b": draw(3), "v": draw(1, 3)}

    def value(p, x):
        return F.linear(torch.tanh(F.linear(x, p["w"], p["b"])), p["v"])

    def model(p, x):
        if transform == "jvp":
            return torch.func.jvp(lambda x: value(p, x), (x,), (torch.ones_like(x),))[1]
        if transform == "grad":
            return torch.func.grad(lambda x: value(p, x).sum())(x)
        return torch.func.vmap(lambda x: value(p, x))(x)

    x = draw(5, 2)
    y = torch.ones_like(model(params, x))
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Gaussian(), fisher="empirical", method="exactNG")
    assert {block.kind for block in ng.layout.blocks} == {"fallback"}
    likelihood = ff.Gaussian()
    one = lambda p, n: likelihood.nll(model(p, x[n : n + 1]), y[n : n + 1]).sum()  # noqa: E731
    U = torch.stack([vec(torch.func.grad(one)(params, n)) for n in range(5)])
    close(ng.fisher(ng.stats(params, (x, y))).dense(), U.mT @ U / 5)


# ------------------------------------------------------------------------------------------------------- the report


def test_a_notebook_shows_the_report_as_a_table():
    layout = zoo.pick("scale-matrix").build().layout
    html = layout._repr_html_()
    assert html.count("<tr>") == 1 + len(layout.blocks) and html.startswith("<table>")
    for line in str(layout).splitlines()[2 + len(layout.blocks) :]:
        assert f"<p>{line}</p>" in html


def test_the_table_escapes_names():
    params = {"a<b": torch.eye(3)}
    ng = ff.natural_gradient(lambda p, x: F.linear(x, p["a<b"]), params, torch.eye(3), likelihood=ff.Gaussian())
    assert "<td>a&lt;b</td>" in ng.layout._repr_html_()


def test_shares_add_up_and_the_fallback_says_what_it_costs():
    layout = zoo.pick("scale-matrix").build().layout
    lines = str(layout).splitlines()
    rows = [line.split() for line in lines[2 : 2 + len(layout.blocks)]]
    at = {row[0]: row for row in rows}
    shares = [float(cell) for row in rows for cell in row if cell.count(".") == 1 and cell.replace(".", "").isdigit()]
    assert abs(sum(shares) - 100) < 0.1 * len(rows)
    scale = layout.block("scale")
    assert f"{scale.cause}:" in at["scale"] and scale.cause in scale.why
    assert "numbers per example and sample" in " ".join(at["scale"])
    assert "one more forward pass" in lines[-1]


@pytest.mark.parametrize(
    ("why", "cause"),
    [
        ("no layer family claims it, read by einsum; one dense block", "einsum"),
        ("linear layer that no example enters, its output read by matmul; a block for each entry", "matmul"),
        ("linear layer of 'w' is used in other ways too; one dense block", "reused"),
        ("bias of 'w' that is used in other ways too; one dense block", "reused"),
        ("'w' is the weight of different layers, linear and conv2d; one dense block", "ambiguous"),
        ("conv2d layer whose first axis is not the example's; one dense block", "axis"),
        ("linear layer whose rows mix examples; one dense block", "mixed"),
        ("linear layer whose rows are chosen by values (a mask), not by their place; one dense block", "selected"),
        ("no layer family claims it; one dense block", "unclaimed"),
    ],
)
def test_a_cause_is_one_word(why, cause):
    block = Block("w", "fallback", "w", torch.Size([2]), None, torch.Size(), (), why)
    assert block.cause == cause
    assert replace(block, kind="linear").cause == ""
