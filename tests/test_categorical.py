"""Categorical takes what torch's cross entropy takes: ignored positions, soft labels, weights, smoothing.

Losses are compared with torch's own, Fisher matrices with the Hessian of the loss by autograd and with brute force.
"""

import pytest
import torch
from torch.func import grad, jacrev
from torch.nn import functional as F

import fisherfn as ff
from tests.oracles import close
from tests.zoo import as_installed, generator

N, T, C = 6, 4, 3
E = ff.errors
WEIGHT = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)


def logits(*shape, seed=0):
    return torch.randn(*shape, C, generator=generator(seed), dtype=torch.float64)


def labels(*shape, seed=1):
    return torch.randint(C, shape, generator=generator(seed))


def ignored(*shape):
    y = labels(*shape)
    y.view(-1)[::3] = -100
    return y


def soft(*shape):
    return logits(*shape, seed=2).softmax(-1)


def weights(*shape):
    return torch.rand(shape, generator=generator(3), dtype=torch.float64)


OPTIONS = {
    "plain": {},
    "class weights": {"weight": WEIGHT},
    "smoothing": {"label_smoothing": 0.2},
    "both": {"weight": WEIGHT, "label_smoothing": 0.3},
    "another index": {"ignore_index": 1},
}
TARGETS = {"indices": labels, "ignored": ignored, "soft": soft}
SHAPES = {"plain": (N,), "sequence": (N, T)}
CASES = [
    pytest.param(options, targets, shape, id=f"{o}-{t}-{s}")
    for o, options in OPTIONS.items()
    for t, targets in TARGETS.items()
    for s, shape in SHAPES.items()
    if not (o == "another index" and t != "indices")
]


def torchs(f, y, options):
    """Torch's cross entropy of every position, summed over an example's."""
    axis_last = f.movedim(-1, 1), (y.movedim(-1, 1) if y.is_floating_point() else y)
    return F.cross_entropy(*axis_last, reduction="none", **options).reshape(len(f), -1).sum(1)


@pytest.mark.parametrize(("options", "targets", "shape"), CASES)
def test_loss_and_gradient_are_those_of_torch(options, targets, shape):
    f, y, likelihood = logits(*shape), targets(*shape), ff.Categorical(**options)
    close(likelihood.nll(f, y), torchs(f, y, options))
    ours, theirs = (grad(lambda f, nll=nll: nll(f).sum())(f) for nll in (
        lambda f: likelihood.nll(f, y), lambda f: torchs(f, y, options)))  # fmt: skip
    close(ours, theirs)
    assert likelihood.valid(f, y)


def test_the_mean_over_counted_positions_is_the_loss_times_examples_by_positions():
    """The sentence of the docstring about torch's mean."""
    f, y = logits(N, T), ignored(N, T)
    counted = (y != -100).sum()
    ours = ff.Categorical().nll(f, y).mean()
    close(F.cross_entropy(f.mT, y), ours * N / counted)
    weighted = ff.Categorical(weight=WEIGHT).nll(f, y).mean()
    close(F.cross_entropy(f.mT, y, WEIGHT), weighted * N / WEIGHT[y[y != -100]].sum())


@pytest.mark.parametrize("shape", [(N,), (N, 1), (N, T)], ids=str)
def test_weights_of_examples_and_positions(shape):
    f, y = logits(N, T), ignored(N, T)
    w = weights(*shape)
    if shape == (N, 1):
        with as_installed(), pytest.raises(E.ShapeError, match="weight for each example or position"):
            ff.Categorical().nll(f, (y, w))
        return
    each = F.cross_entropy(f.mT, y, reduction="none") * w.reshape(N, -1)
    close(ff.Categorical().nll(f, (y, w)), each.sum(1))


# ---------------------------------------------------------------------------------------------------------- the Fisher

BATCHES = {
    "ignored": ({}, lambda: ignored(N, T)),
    "soft": ({}, lambda: soft(N, T)),
    "class weights": ({"weight": WEIGHT}, lambda: ignored(N, T)),
    "soft, class weights": ({"weight": WEIGHT, "label_smoothing": 0.3}, lambda: soft(N, T)),
    "smoothing": ({"weight": WEIGHT, "label_smoothing": 0.3}, lambda: ignored(N, T)),
    "example weights": ({}, lambda: (labels(N, T), weights(N))),
    "position weights": ({"weight": WEIGHT}, lambda: (ignored(N, T), weights(N, T))),
    "all but one ignored": ({}, lambda: torch.full((N, T), -100).index_put((torch.tensor(2), torch.tensor(1)),
                                                                          torch.tensor(0))),
}  # fmt: skip


def net():
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, C)).double()


def problem(options, fisher):
    model, params, context = ff.functional(net())
    x = torch.randn(N, T, 2, generator=generator(5), dtype=torch.float64)
    likelihood = ff.Categorical(**options)
    ng = ff.natural_gradient(model, params, x, likelihood=likelihood, fisher=fisher, context=context, method="exactNG")
    return ng, params, x, lambda p: model(p, x, context)[0]


def jacobian(outputs, params):
    return torch.cat([j.reshape(N * T * C, -1) for j in jacrev(outputs)(params).values()], 1)


@pytest.mark.parametrize("chunk", [None, 4], ids=["whole", "chunks"])
@pytest.mark.parametrize("name", BATCHES)
def test_the_exact_fisher_is_the_gauss_newton_matrix_of_the_loss(name, chunk):
    options, make = BATCHES[name]
    y = make()
    ng, params, x, outputs = problem(options, "type2")
    B = jacrev(grad(lambda f: ng.likelihood.nll(f, y).mean()))(outputs(params)).reshape(N * T * C, -1)
    J = jacobian(outputs, params)
    stats = ng.stats(params, (x, y), context={}, chunk_size=chunk)
    close(ng.fisher(stats).dense(), J.T @ B @ J)
    close(torch.cat([g.flatten() for g in stats.grads.values()]), torch.cat(
        [g.flatten() for g in grad(lambda p: ng.likelihood.nll(outputs(p), y).mean())(params).values()]))  # fmt: skip


@pytest.mark.parametrize("chunk", [None, 4], ids=["whole", "chunks"])
@pytest.mark.parametrize("name", BATCHES)
def test_the_sampled_fisher_scores_plain_labels_and_weighs_them(name, chunk):
    """Each draw's gradient is that of the plain cross entropy, times the root of the position's mass."""
    options, make = BATCHES[name]
    y = make()
    ng, params, x, outputs = problem(options, "mc")
    noise = ng.noise((x, y), generator(7), samples=2)
    f, J = outputs(params), jacobian(outputs, params).reshape(N, T * C, -1)
    B = jacrev(grad(lambda f: ng.likelihood.nll(f, y).sum()))(f)
    p = f.softmax(-1)
    # the mass of a position is what its Hessian has of diag(p) - p pᵀ
    mass = torch.stack([torch.stack([B[n, t, 0, n, t, 0] / (p[n, t, 0] - p[n, t, 0] ** 2) for t in range(T)])
                        for n in range(N)])  # fmt: skip
    rows = []
    for s in range(2):
        drawn = ff.Categorical().sample(f, noise[:, s])
        g = (p - F.one_hot(drawn, C)) * mass.sqrt().unsqueeze(-1)
        rows.append(torch.einsum("no,noi->ni", g.reshape(N, -1), J) / 2**0.5)
    U = torch.cat(rows)
    close(ng.fisher(ng.stats(params, (x, y), context={}, noise=noise, chunk_size=chunk)).dense(), U.T @ U / N)


@pytest.mark.parametrize("chunk", [None, 4], ids=["whole", "chunks"])
@pytest.mark.parametrize("name", BATCHES)
def test_the_empirical_fisher_is_made_of_the_gradients_of_the_terms(name, chunk):
    options, make = BATCHES[name]
    y = make()
    ng, params, x, outputs = problem(options, "empirical")
    each = jacrev(lambda p: ng.likelihood.nll(outputs(p), y))(params)
    U = torch.cat([g.flatten(1) for g in each.values()], 1)
    close(ng.fisher(ng.stats(params, (x, y), context={}, chunk_size=chunk)).dense(), U.T @ U / N)


def test_an_ignored_example_leaves_no_trace():
    """Not even in the Fisher: as if it were not in the batch, but for the division by N."""
    ng, params, x, _ = problem({}, "type2")
    y = labels(N, T)
    y[3:] = -100
    found = ng.fisher(ng.stats(params, (x, y), context={})).dense()
    close(found, ng.fisher(ng.stats(params, (x[:3], y[:3]), context={})).dense() * 3 / N)


@pytest.mark.parametrize("fisher", ["mc", "type2"])
def test_a_preconditioner_without_labels_ignores_class_weights(fisher):
    """There is no label to weigh; sampled ones are scored by the plain cross entropy."""
    grads = []
    for options in ({}, {"weight": WEIGHT, "label_smoothing": 0.5}):
        torch.manual_seed(0)
        layer, x = torch.nn.Linear(2, C).double(), torch.ones(5, 2).double()
        pre = ff.optim.Preconditioner(layer, likelihood=ff.Categorical(**options), fisher=fisher)
        F.cross_entropy(layer(x), labels(5)).backward()
        pre.step(x)
        grads.append(layer.weight.grad)
    close(*grads)


def test_the_drop_in_trains_on_soft_labels_and_pairs():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(2, C).double(), torch.randn(8, 2).double()
    opt = ff.optim.NaturalGradient(layer, likelihood=ff.Categorical(), lr=0.1)
    losses = [opt.step((x, [soft(8), torch.ones(8)])) for _ in range(5)]  # a list, as a loader makes it
    assert losses[-1] < losses[0]


# ------------------------------------------------------------------------------------------------- what is refused

WRONG = {
    "floats that are no probabilities": (lambda: labels(N).double(), E.TargetError, "class probabilities"),
    "one-hot integers": (lambda: F.one_hot(labels(N), C), E.ShapeError, "floating-point"),
    "bits": (lambda: labels(N) > 0, E.TargetError, "probabilities"),
    "too few weights": (lambda: (labels(N), torch.ones(2)), E.ShapeError, "weight for each"),
    "weights that are a list": (lambda: (labels(N), [1.0] * N), E.StructureError, "weight"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_targets_are_refused_with_what_is_right(name):
    make, error, said = WRONG[name]
    with as_installed(), pytest.raises(error, match=said) as caught:
        ff.Categorical().nll(logits(N), make())
    assert len(str(caught.value)) < 400 and "long()" not in str(caught.value)


@pytest.mark.parametrize(
    "targets",
    [
        lambda: labels(N) - 1,
        lambda: labels(N) + 1,
        lambda: -soft(N),
        lambda: soft(N) / 0,
        lambda: (labels(N), -weights(N)),
    ],
    ids=["negative", "too large", "negative probabilities", "infinite", "negative weights"],
)
def test_values_out_of_range_are_a_false_mask(targets):
    assert not ff.Categorical().valid(logits(N), targets())


@pytest.mark.parametrize(
    "options", [{"weight": [1.0, 2.0, 3.0]}, {"label_smoothing": 1.5}, {"ignore_index": 0.5}], ids=str
)
def test_options_out_of_range(options):
    with as_installed(), pytest.raises(E.HyperparameterError, match=next(iter(options))):
        ff.Categorical(**options)


def test_a_class_weight_for_another_number_of_classes():
    with as_installed(), pytest.raises(E.ShapeError, match="one weight for each class"):
        ff.Categorical(weight=torch.ones(C + 1)).nll(logits(N), labels(N))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16])
@pytest.mark.parametrize("classes", [100, 300])
def test_class_indices_may_have_any_type_of_whole_numbers(dtype, classes):
    """Eight bits have no 300, and without a sign their -100 is 156."""
    outputs = torch.randn(3, classes, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 7, 156 if classes > 156 and dtype != torch.int8 else 99])
    likelihood, narrow = ff.Categorical(), labels.to(dtype)
    expected = torch.nn.functional.cross_entropy(outputs, labels, reduction="none")
    torch.testing.assert_close(likelihood.nll(outputs, narrow), expected)
    assert likelihood.valid(outputs, narrow)
    assert torch.equal(likelihood.observed(outputs, narrow)[1], torch.ones(3))


def test_a_class_without_probability_is_never_sampled():
    """Rounding errors of 3,000 probabilities in float32 may leave their sum at or below the noise."""
    outputs = torch.randn(1, 3000, generator=torch.Generator().manual_seed(1))
    outputs[:, -1] = -torch.inf
    total = outputs.softmax(-1).cumsum(-1)[0, -1:]
    assert ff.Categorical().sample(outputs, total) == 2998
