"""Shapes, types, names and structure are refused at once, typed, with the thing and a remedy in the message."""

import pytest
import torch

import fisherfn as ff
from fisherfn.types import Info
from tests import zoo

errors = ff.errors


@pytest.fixture(autouse=True)
def as_installed():
    with zoo.as_installed():
        yield


@pytest.fixture
def problem():
    return zoo.pick("mlp-categorical")


@pytest.fixture
def ng(problem):
    return problem.build(fisher="empirical")


def test_every_error_is_of_the_family():
    names = [
        *(
            "ShapeError",
            "EmptyBatchError",
            "HyperparameterError",
            "UnusedParameterError",
            "UnknownNameError",
            "NoiseError",
        ),
        *(
            "CoverageError",
            "LikelihoodError",
            "StructureError",
            "NonFiniteError",
            "TargetError",
            "NotPositiveDefiniteError",
        ),
    ]
    for name in names:
        assert issubclass(getattr(errors, name), errors.FisherfnError)


# ------------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(("wrong", "near"), [("kfaq", "kfac"), ("KFAC", "kfac")])
def test_an_unknown_method_names_the_most_similar_one(problem, wrong, near):
    with pytest.raises(errors.UnknownNameError, match=near):
        problem.build(method=wrong)


def test_an_unknown_fisher_names_the_most_similar_one(problem, ng):
    with pytest.raises(errors.UnknownNameError, match="type2"):
        problem.build(fisher="type-2")
    with pytest.raises(errors.UnknownNameError, match="empirical"):
        ng.stats(problem.params, problem.batch, fisher="emprical")


def test_an_unknown_structure_is_refused(problem, ng):
    with pytest.raises(errors.FisherfnError, match="block"):
        ng.fisher(ng.stats(problem.params, problem.batch), structure="blok")


def test_an_unknown_layer_is_named_with_the_known_ones(problem, ng):
    with pytest.raises((errors.FisherfnError, KeyError), match="nope"):
        ng.fisher(ng.stats(problem.params, problem.batch)).block("nope")


# --------------------------------------------------------------------------------------------------- hyperparameters


@pytest.mark.parametrize("hyper", [{"damping": -1e-3}, {"ema": 1.0}, {"ema": -0.1}, {"damping": float("nan")}], ids=str)
def test_init_refuses_what_is_out_of_range(problem, ng, hyper):
    with pytest.raises(errors.HyperparameterError, match=next(iter(hyper))):
        ng.init(problem.params, **hyper)


def test_the_one_shot_call_refuses_negative_damping(problem, ng):
    with pytest.raises(errors.HyperparameterError, match="damping"):
        ng(problem.params, ng.stats(problem.params, problem.batch), damping=-1.0)


@pytest.mark.parametrize("samples", [0, -1])
def test_samples_is_positive(problem, ng, samples):
    with pytest.raises(errors.HyperparameterError, match="samples"):
        problem.build(samples=samples)
    with pytest.raises(errors.HyperparameterError, match="samples"):
        ng.stats(problem.params, problem.batch, fisher="mc", samples=samples, generator=zoo.generator())


@pytest.mark.parametrize("chunk_size", [0, -2])
def test_chunk_size_is_positive(problem, ng, chunk_size):
    with pytest.raises(errors.HyperparameterError, match="chunk_size"):
        ng.stats(problem.params, problem.batch, chunk_size=chunk_size)


# ------------------------------------------------------------------------------------------------------------ shapes


def test_inputs_of_another_shape_show_both_shapes(problem, ng):
    x = torch.zeros(5, 7, dtype=torch.float64)
    with pytest.raises(errors.ShapeError, match=r"7[\s\S]*3|3[\s\S]*7"):
        ng.stats(problem.params, (x, problem.y))


def test_inputs_of_another_rank(problem, ng):
    with pytest.raises(errors.ShapeError):
        ng.stats(problem.params, (problem.x[:, None], problem.y))


def test_inputs_and_targets_of_different_length(problem, ng):
    with pytest.raises((errors.ShapeError, errors.TargetError)):
        ng.stats(problem.params, (problem.x, problem.y[:-1]))


def test_an_empty_batch_is_refused(problem, ng):
    with pytest.raises(errors.EmptyBatchError):
        ng.stats(problem.params, (problem.x[:0], problem.y[:0]))
    with pytest.raises(errors.EmptyBatchError):
        ff.natural_gradient(problem.model, problem.params, problem.x[:0], likelihood=ff.Categorical())


def test_params_of_another_structure(problem, ng):
    fewer = {name: leaf for name, leaf in problem.params.items() if name != "2.bias"}
    more = {**problem.params, "extra": torch.zeros(1)}
    for wrong in (fewer, more):
        name = "2.bias" if wrong is fewer else "extra"
        with pytest.raises(errors.StructureError, match=name):
            ng.stats(wrong, problem.batch)
        with pytest.raises(errors.StructureError, match=name):
            ng.init(wrong)
        with pytest.raises(errors.StructureError, match=name):
            ng.precondition(ng.init(problem.params), wrong)
        with pytest.raises(errors.StructureError, match=name):
            ng.matvec(ng.init(problem.params), wrong)


def test_params_of_another_shape(problem, ng):
    wrong = {**problem.params, "2.bias": torch.zeros(7, dtype=torch.float64)}
    with pytest.raises((errors.ShapeError, errors.StructureError), match="2.bias"):
        ng.stats(wrong, problem.batch)
    with pytest.raises((errors.ShapeError, errors.StructureError), match="2.bias"):
        ng.precondition(ng.init(problem.params), wrong)
    with pytest.raises((errors.ShapeError, errors.StructureError), match="2.bias"):
        ng.fisher(ng.stats(problem.params, problem.batch)) @ wrong


def test_a_tree_in_another_order_is_the_same_tree(problem, ng):
    """Names say what is what, not the order of a dict."""
    stats = ng.stats(problem.params, problem.batch)
    v = zoo.random_tree(problem.params)
    reverse = dict(reversed(v.items()))
    for apply in (lambda t: ng.fisher(stats) @ t, lambda t: ng.fisher(stats).solve(t, 0.1)):
        left, right = apply(v), apply(reverse)
        assert all(torch.equal(left[name], right[name]) for name in v)
    state = ng.invert(ng.update(ng.init(problem.params), stats)[0])[0]
    left, right = ng.precondition(state, v), ng.precondition(state, reverse)
    assert all(torch.equal(left[name], right[name]) for name in v)


@pytest.mark.parametrize(
    "spoil",
    [lambda u: u[:3], lambda u: u.transpose(0, 1), lambda u: u[..., None], lambda u: u[:, 0]],
    ids=["too few examples", "samples first", "an axis too many", "no samples"],
)
def test_noise_of_the_wrong_shape(problem, spoil):
    ng = problem.build(samples=2)
    noise = ng.noise(problem.batch, zoo.generator())
    stats = ng.stats(problem.params, problem.batch, noise=noise[:, :1])  # the noise says how many draws
    assert all(tap.g.shape[1] == 1 for tap in stats.taps.values())
    with pytest.raises((errors.ShapeError, errors.NoiseError)):
        ng.stats(problem.params, problem.batch, noise=spoil(noise))


@pytest.mark.parametrize("id", ["mlp-gaussian", "mlp-bernoulli", "sequence-out"])
def test_one_number_of_noise_does_not_serve_several_outputs(id):
    problem = zoo.pick(id)
    ng = problem.build(samples=2)
    noise = ng.noise(problem.batch, zoo.generator())
    assert noise.shape[2:].numel() > 1
    with pytest.raises(errors.ShapeError, match=r"noise has shape .* 1\], expected \["):
        ng.stats(problem.params, problem.batch, noise=noise[..., :1])


# ---------------------------------------------------------------------------------------------- noise, likelihoods


def plain(outputs, targets):
    return torch.nn.functional.cross_entropy(outputs, targets, reduction="none")


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize(
    ("likelihood", "lesson"),
    [
        (ff.Categorical, r"a class, Categorical: pass an instance, Categorical\(\)"),
        ("categorical", r"cannot be 'categorical': pass ff\.Categorical\(\)"),
        (None, r"cannot be None: pass ff\.Categorical\(\)"),
        (3, "cannot be int"),
    ],
    ids=str,
)
def test_what_is_no_likelihood_is_refused_with_what_to_pass(problem, likelihood, lesson, fisher):
    with pytest.raises(errors.LikelihoodError, match=lesson):
        ff.natural_gradient(problem.model, problem.params, problem.x, likelihood=likelihood, fisher=fisher)
    with pytest.raises(errors.LikelihoodError, match=lesson):
        ff.Weighted(likelihood)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_plain_function_is_told_what_has_samples(problem, weighted):
    likelihood = ff.Weighted(plain) if weighted else plain
    for fisher, method in (("mc", "sample"), ("type2", "fisher_sqrt")):
        with pytest.raises(errors.LikelihoodError, match=f"{method}, which a plain function does not have") as caught:
            ff.natural_gradient(problem.model, problem.params, problem.x, likelihood=likelihood, fisher=fisher)
        assert "Callback" not in str(caught.value)


def test_a_plain_function_can_be_weighted(problem):
    ng = ff.natural_gradient(
        problem.model, problem.params, problem.x, likelihood=ff.Weighted(plain), fisher="empirical"
    )  # fmt: skip
    weights = torch.arange(len(problem.x), dtype=problem.x.dtype)
    loss = ng.stats(problem.params, (problem.x, (problem.y, weights))).loss
    expected = (weights * plain(problem.model(problem.params, problem.x), problem.y)).sum() / len(problem.x)
    torch.testing.assert_close(loss, expected)


def with_context(p, x, context):
    return torch.nn.functional.linear(x, p["w"]), context


@pytest.mark.parametrize(
    ("model", "context", "lesson"),
    [
        (torch.nn.Linear(3, 2), None, r"a module, Linear: .*ff\.functional\(net\)"),
        (torch.nn.Linear(3, 2), {}, r"a module, Linear: .*ff\.functional\(net\)"),
        (lambda p, x: torch.nn.functional.linear(x, p["w"]), {}, "a context was given, and the model takes none"),
        (with_context, None, "the model takes a context, and none was given"),
        (
            lambda p, x, c: torch.nn.functional.linear(x, p["w"]),
            {},
            r"must return \(outputs, new context\), got Tensor",
        ),
        (lambda p, x, c: (x @ p["w"].T, c, 1), {}, r"must return \(outputs, new context\), got tuple"),
    ],
    ids=["module", "module and context", "takes no context", "takes a context", "returns none", "returns more"],
)
@pytest.mark.parametrize("examples", [2, 5])
def test_what_is_no_model_is_refused_with_what_to_pass(model, context, lesson, examples):
    """Two examples: outputs `[2, …]` could be taken for a pair."""
    params, x = {"w": torch.ones(2, 3)}, torch.ones(examples, 3)
    with pytest.raises(errors.StructureError, match=lesson):
        ff.natural_gradient(model, params, x, likelihood=ff.Gaussian(), context=context)


# by name: likelihood, targets, parameters' and context's factor, and what the message must say
NOT_FINITE = {
    "weights of zero": (
        ff.Weighted(ff.Gaussian()),
        (torch.zeros(4, 2), torch.zeros(4)),
        1.0,
        1.0,
        "weights are not all 0",
    ),
    "parameters": (ff.Gaussian(), torch.zeros(4, 2), float("nan"), 1.0, "the context or the parameters contain NaN"),
    "context": (ff.Gaussian(), torch.zeros(4, 2), 1.0, float("inf"), "the context or the parameters contain NaN"),
}


@pytest.mark.parametrize("name", NOT_FINITE)
def test_the_message_names_the_cause_among_others(name):
    likelihood, targets, factor, entry, cause = NOT_FINITE[name]
    params, x, context = {"w": factor * torch.ones(2, 3)}, torch.ones(4, 3), {"c": torch.ones(2)}

    def model(p, x, context):
        return torch.nn.functional.linear(x, p["w"]) * context["c"], context

    ng = ff.natural_gradient(
        model, {"w": torch.ones(2, 3)}, x, likelihood=likelihood, context=context, fisher="empirical"
    )
    context = {"c": entry * context["c"]}
    info = ng.step(params, ng.init(params), (x, targets), context=context)[2]
    with pytest.raises(errors.FisherfnError, match=cause):
        ff.check(info)


@pytest.mark.parametrize("weight", [[1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")], [[1.0, 2.0]]], ids=str)
def test_class_weights_are_finite_and_not_negative(weight):
    with pytest.raises(errors.HyperparameterError, match="Categorical weight"):
        ff.Categorical(weight=torch.tensor(weight))


def test_monte_carlo_without_randomness(problem):
    ng = problem.build(fisher="mc")
    with pytest.raises(errors.NoiseError, match="generator"):
        ng.stats(problem.params, problem.batch)
    with pytest.raises(errors.NoiseError, match="noise"):
        ng.step(problem.params, ng.init(problem.params), problem.batch)


@pytest.mark.parametrize(("fisher", "lacks"), [("mc", "sample"), ("type2", "fisher_sqrt")])
def test_a_plain_callable_serves_the_empirical_fisher_only(problem, fisher, lacks):
    def loss(outputs, targets):
        return torch.nn.functional.cross_entropy(outputs, targets, reduction="none")

    ng = ff.natural_gradient(problem.model, problem.params, problem.x, likelihood=loss, fisher="empirical")
    same = problem.build(fisher="empirical")
    v = zoo.random_tree(problem.params)
    ours, theirs = (n.fisher(n.stats(problem.params, problem.batch)) @ v for n in (ng, same))
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-10) for name in v)
    with pytest.raises(errors.LikelihoodError, match=lacks):
        ff.natural_gradient(problem.model, problem.params, problem.x, likelihood=loss, fisher=fisher)
    with pytest.raises(errors.LikelihoodError, match=lacks):
        ng.stats(problem.params, problem.batch, fisher=fisher, generator=zoo.generator())


@pytest.mark.parametrize("call", ["stats", "loss"])
@pytest.mark.parametrize(
    "loss",
    [
        lambda out, y: torch.nn.functional.cross_entropy(out, y),
        lambda out, y: torch.nn.functional.cross_entropy(out, y, reduction="none")[:, None],
        lambda out, y: -torch.log_softmax(out, -1),
        lambda out, y: 1.0,
    ],
    ids=["mean", "column", "per output", "number"],
)
def test_a_loss_that_is_not_one_number_an_example(problem, loss, call):
    ng = ff.natural_gradient(problem.model, problem.params, problem.x, likelihood=loss, fisher="empirical")
    with pytest.raises(errors.ShapeError, match=r"nll must return \[N\]"):
        getattr(ng, call)(problem.params, problem.batch)


# --------------------------------------------------------------------------------------------------------- coverage


def test_unused_parameters_are_named(problem):
    def model(params, x):
        return problem.model({name: leaf for name, leaf in params.items() if "ghost" not in name}, x)

    params = {**problem.params, "ghost.weight": torch.zeros(2, 2, dtype=torch.float64)}
    with pytest.raises(errors.UnusedParameterError, match="ghost.weight"):
        ff.natural_gradient(model, params, problem.x, likelihood=ff.Categorical())


@pytest.mark.parametrize("params", [{}, {"w": torch.zeros(2, dtype=torch.long)}], ids=["none", "integers"])
def test_no_parameter_to_differentiate(problem, params):
    with pytest.raises(errors.FisherfnError):
        ff.natural_gradient(lambda p, x: x, params, problem.x, likelihood=ff.Gaussian())


# ------------------------------------------------------------------------------------------------------------ masks

MEMBERS = torch.tensor([True, False, True])


@pytest.mark.parametrize("name", errors.BATCH_CHECKS)
def test_one_bad_member_of_a_batch_check_is_raised_and_named(name):
    error, text = errors.BATCH_CHECKS[name]
    with pytest.raises(error, match=r"members 1 of 3") as caught:
        ff.check(Info(checks={name: MEMBERS}))
    assert str(caught.value).startswith(text)
    with pytest.raises(error):
        ff.check(Info(checks={name: torch.tensor(False)}))
    ff.check(Info(checks={name: torch.ones(3).bool()}))


@pytest.mark.parametrize("name", errors.BLOCK_CHECKS)
def test_one_bad_member_of_a_block_is_raised_with_its_block(name):
    error, text = errors.BLOCK_CHECKS[name]
    with pytest.raises(error, match=r"block 'b' \(members 1 of 3\)") as caught:
        ff.check(Info(checks={name: {"a": torch.ones(3).bool(), "b": MEMBERS}}))
    assert text in str(caught.value) and "'a'" not in str(caught.value)
    ff.check(Info(checks={name: {"a": torch.ones(3).bool()}}))


@pytest.mark.parametrize("number", [True, False, torch.nn.Identity(), "1", None, 0.5])
def test_what_is_no_whole_number_is_refused(number):
    with pytest.raises(errors.HyperparameterError, match="steps must be >= 0"):
        errors.expect_number("steps", number, lambda v: v >= 0, "must be >= 0", whole=True)
    errors.expect_number("steps", 3, lambda v: v >= 0, "must be >= 0", whole=True)
