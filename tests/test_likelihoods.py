"""Likelihoods against torch.distributions: densities, samples by counting, output Fisher by autograd's Hessian."""

import math

import pytest
import torch

import fisherfn as ff
from fisherfn.likelihoods import output_fisher
from fisherfn.stats.passes import loss_cotangent
from tests import oracles, zoo
from tests.oracles import close
from tests.zoo import LIKELIHOODS

SHAPES = {"plain": (4, 3), "sequence": (3, 2, 3), "two-axes": (2, 2, 2, 3)}
PAIRS = [pytest.param(name, shape, id=f"{name}-{id}") for name in LIKELIHOODS for id, shape in SHAPES.items()]


def outputs_of(name, shape, seed=0):
    logits = torch.randn(shape, generator=zoo.generator(seed), dtype=torch.float64)
    return logits.sigmoid() if name == "bernoulli-probs" else logits


def targets_of(name, outputs, seed=1):
    return zoo.draw(LIKELIHOODS[name][1](outputs), zoo.generator(seed))


def summed_nll(name, outputs, targets):
    return -LIKELIHOODS[name][1](outputs).log_prob(targets).reshape(len(outputs), -1).sum(1)


@pytest.mark.parametrize(("name", "shape"), PAIRS)
def test_nll_is_minus_the_log_density_up_to_a_constant_of_the_outputs(name, shape):
    likelihood, outputs = LIKELIHOODS[name][0](), outputs_of(name, shape)
    targets = targets_of(name, outputs)
    other = outputs_of(name, shape, seed=2)
    ours = likelihood.nll(outputs, targets) - likelihood.nll(other, targets)
    assert ours.shape == (shape[0],)
    close(ours, summed_nll(name, outputs, targets) - summed_nll(name, other, targets))


@pytest.mark.parametrize(("name", "shape"), PAIRS)
def test_the_gradient_of_nll(name, shape):
    likelihood, outputs = LIKELIHOODS[name][0](), outputs_of(name, shape).requires_grad_()
    targets = targets_of(name, outputs.detach())
    (ours,) = torch.autograd.grad(likelihood.nll(outputs, targets).sum(), outputs)
    (theirs,) = torch.autograd.grad(summed_nll(name, outputs, targets).sum(), outputs)
    close(ours, theirs)


SCORED = [pair for pair in PAIRS if hasattr(LIKELIHOODS[pair.values[0]][0](), "score")]


@pytest.mark.parametrize(("name", "shape"), SCORED)
def test_the_score_is_the_gradient_of_nll(name, shape):
    likelihood, outputs = LIKELIHOODS[name][0](), outputs_of(name, shape)
    targets = targets_of(name, outputs)
    close(likelihood.score(outputs, targets), torch.func.grad(lambda f: likelihood.nll(f, targets).sum())(outputs))


def test_minus_infinity_masks_a_class_only_if_no_other_logit_overflows():
    """A model that has diverged gives both infinities: the labels are in range, and the loss says what is wrong."""
    masked, diverged = torch.tensor([[0.0, -torch.inf, 1.0]]), torch.tensor([[torch.inf, -torch.inf, 1.0]])
    of_masked, soft = torch.tensor([1]), torch.tensor([[0.5, 0.5, 0.0]])
    for targets in (of_masked, soft):
        assert not ff.Categorical().valid(masked, targets)
        assert ff.Categorical().valid(diverged, targets)
        assert ff.Categorical(label_smoothing=0.1).valid(diverged, targets)
    assert not ff.Categorical(label_smoothing=0.1).valid(masked, torch.tensor([0]))
    assert not torch.isfinite(ff.Categorical().nll(diverged, of_masked)).any()


def test_the_score_of_a_clamped_probability_is_zero():
    outputs, targets = torch.tensor([[0.0, 1.0, 0.5]]), torch.tensor([[1.0, 0.0, 0.5]])
    assert ff.Bernoulli(logits=False).score(outputs, targets).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("wrong", [-0.5, 1.5, torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("logits", [True, False])
def test_a_target_that_is_no_probability_makes_the_loss_of_its_example_nan(wrong, logits):
    likelihood, targets = ff.Bernoulli(logits=logits), torch.rand(3, 2, 2)
    assert likelihood.valid(targets, targets)
    targets[1, 0, 1] = wrong
    assert torch.isnan(likelihood.nll(torch.full((3, 2, 2), 0.5), targets)).tolist() == [False, True, False]
    assert not likelihood.valid(targets, targets)


@pytest.mark.parametrize("wrong", [-1e-6, 1.5, torch.inf, -torch.inf])
def test_an_output_that_is_no_probability_makes_the_loss_of_its_example_nan(wrong):
    """Torch's own loss raises there. Probabilities of exactly 0 and 1 are valid."""
    targets, p = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), torch.tensor([[0.5, 0.1], [0.2, 0.9], [0.0, 1.0]])
    likelihood = ff.Bernoulli(logits=False)
    assert likelihood.valid(p, targets) and likelihood.nll(p, targets).isfinite().all()
    p[1, 0] = wrong
    assert torch.isnan(likelihood.nll(p, targets)).tolist() == [False, True, False]
    assert not likelihood.valid(p, targets) and ff.Bernoulli().valid(p, targets)
    with pytest.raises(RuntimeError, match="between 0 and 1"):
        torch.nn.functional.binary_cross_entropy(p, targets)


def test_a_model_without_its_sigmoid_is_told_so():
    params, x, y = {"w": torch.eye(2)}, torch.tensor([[0.5, 0.1], [0.2, 1.5]]), torch.ones(2, 2)
    ng = ff.natural_gradient(lambda p, x: x @ p["w"], params, x, likelihood=ff.Bernoulli(logits=False), fisher="type2")
    _, state, info = ng.step(params, ng.init(params, damping=0.1), (x, y))
    assert state.count == 0
    with pytest.raises(ff.errors.TargetError, match="sigmoid, or pass logits=True"):
        ff.check(info)


def test_an_output_that_is_nan_is_no_fault_of_the_targets():
    likelihood, targets = ff.Bernoulli(logits=False), torch.ones(2, 1)
    assert likelihood.valid(torch.tensor([[0.5], [torch.nan]]), targets)


@pytest.mark.parametrize(("name", "shape"), PAIRS)
def test_fisher_sqrt_squares_to_the_output_fisher(name, shape):
    """Σ_c s_c s_cᵀ = E_y[∂² NLL / ∂f²], example by example."""
    problem = zoo.from_net(zoo.mlp(2, 2), (2, 2), name)  # for its density only
    outputs = outputs_of(name, shape)
    roots = problem.likelihood.fisher_sqrt(outputs)
    assert roots.shape[1:] == outputs.shape
    for n in range(shape[0]):
        S_co = roots[:, n].reshape(len(roots), -1)
        close(S_co.T @ S_co, oracles.output_fisher(problem, outputs[n : n + 1]))


# ----------------------------------------------------------------------------------------------- sampling


def test_categorical_sample_is_the_inverse_cdf():
    """Class c for u in [cdf(c-1), cdf(c))."""
    logits = torch.tensor([[0.0, 1.0, -1.0, 0.5]], dtype=torch.float64)
    cdf = logits.softmax(-1).cumsum(-1)[0]
    for c in range(4):
        low, high = (cdf[c - 1] if c else torch.tensor(0.0, dtype=torch.float64)), cdf[c]
        for u in (low + 1e-9, (low + high) / 2, high - 1e-9):
            assert ff.Categorical().sample(logits, u.reshape(1)).tolist() == [c]


def test_categorical_sample_stays_in_range_at_the_ends_of_the_unit_interval():
    logits = torch.tensor([[0.3, -0.2, 0.1]], dtype=torch.float64)
    for u in (0.0, 1.0 - 2.0**-53, 1.0):
        assert 0 <= ff.Categorical().sample(logits, torch.tensor([u], dtype=torch.float64)).item() <= 2


def test_categorical_sample_never_draws_an_impossible_class():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]], dtype=torch.float64)
    u = torch.linspace(0, 1 - 1e-12, 401, dtype=torch.float64)
    drawn = ff.Categorical().sample(logits.expand(401, 5), u)
    assert set(drawn.tolist()) == {1, 3}


@pytest.mark.parametrize("name", ["categorical", "bernoulli", "bernoulli-probs"])
def test_sample_counts(name):
    """With uniform numbers on a fine grid the frequencies are the probabilities, to the grid's step."""
    likelihood, density = LIKELIHOODS[name][0](), LIKELIHOODS[name][1]
    outputs = outputs_of(name, (1, 4))
    grid = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    many = outputs.expand(10_000, 4)
    if name == "categorical":
        counts = torch.bincount(likelihood.sample(many, grid), minlength=4) / 10_000
        close(counts.double(), density(outputs).probs[0], tol=1e-3)
    else:
        drawn = likelihood.sample(many, grid[:, None].expand(10_000, 4))
        assert set(drawn.unique().tolist()) == {0.0, 1.0}
        close(drawn.double().mean(0), density(outputs).mean[0], tol=1e-3)


@pytest.mark.parametrize("variance", [1.0, 0.25])
def test_gaussian_sample_is_mean_plus_deviation_times_noise(variance):
    outputs, noise = torch.randn(2, 4, 3, generator=zoo.generator(), dtype=torch.float64)
    close(ff.Gaussian(variance=variance).sample(outputs, noise), outputs + variance**0.5 * noise)


@pytest.mark.parametrize("name", ["mlp-categorical", "sequence-out", "two-axes", "mlp-gaussian", "mlp-bernoulli"])
def test_noise_is_indexed_by_example_then_draw(name):
    problem = zoo.pick(name)
    noise = problem.build(samples=3).noise(problem.batch, zoo.generator())
    shape = problem.model(problem.params, problem.x).shape
    one_number_a_variable = shape[:-1] if isinstance(problem.likelihood, ff.Categorical) else shape
    assert noise.shape == (shape[0], 3, *one_number_a_variable[1:])


def test_noise_has_the_distribution_that_sample_expects():
    for likelihood, is_normal in ((ff.Categorical(), False), (ff.Bernoulli(), False), (ff.Gaussian(), True)):
        x = torch.zeros(2000, 2)
        params = {"0.weight": torch.zeros(2, 2)}
        ng = ff.natural_gradient(
            lambda p, x: torch.nn.functional.linear(x, p["0.weight"]), params, x, likelihood=likelihood, samples=2
        )
        y = torch.zeros(2000, dtype=torch.long) if isinstance(likelihood, ff.Categorical) else x
        noise = ng.noise((x, y), zoo.generator(3)).double()
        mean, std = (0.0, 1.0) if is_normal else (0.5, 12**-0.5)
        assert abs(noise.mean() - mean) < 0.05 and abs(noise.std() - std) < 0.05
        assert is_normal or bool(((noise >= 0) & (noise < 1)).all())


def test_samples_have_the_type_that_nll_takes():
    for name in LIKELIHOODS:
        likelihood, outputs = LIKELIHOODS[name][0](), outputs_of(name, (4, 3)).float()
        noise = torch.full((4,) if name == "categorical" else (4, 3), 0.4)
        assert torch.isfinite(likelihood.nll(outputs, likelihood.sample(outputs, noise))).all()


# --------------------------------------------------------------------------------------- hard values and errors


@pytest.mark.parametrize("name", ["categorical", "bernoulli", "gaussian"])
def test_large_logits_stay_finite(name):
    likelihood = LIKELIHOODS[name][0]()
    outputs = torch.tensor([[300.0, -300.0], [-300.0, 300.0]], dtype=torch.float64)
    targets = torch.tensor([1, 1]) if name == "categorical" else torch.ones(2, 2, dtype=torch.float64)
    assert torch.isfinite(likelihood.nll(outputs, targets)).all()
    assert torch.isfinite(likelihood.fisher_sqrt(outputs)).all()


@pytest.mark.parametrize(
    ("likelihood", "targets"),
    [
        (ff.Categorical(), torch.zeros(4)),
        (ff.Categorical(), torch.zeros(4, 3, dtype=torch.long)),
        (ff.Categorical(), torch.zeros(3, dtype=torch.long)),
        (ff.Bernoulli(), torch.zeros(4)),
        (ff.Bernoulli(), torch.zeros(4, 1)),
        (ff.Gaussian(), torch.zeros(4)),
        (ff.Gaussian(), torch.zeros(4, 1)),
    ],
    ids=["float-class", "one-hot", "short", "flat-bits", "broadcast-bits", "flat-mean", "broadcast-mean"],
)
def test_wrong_targets_are_refused_at_once(likelihood, targets):
    problem = zoo.from_net(zoo.mlp(3, 3), (4, 3), "gaussian")
    ng = ff.natural_gradient(problem.model, problem.params, problem.x, likelihood=likelihood, fisher="empirical")
    with zoo.as_installed(), pytest.raises((ff.errors.TargetError, ff.errors.ShapeError)):
        ng.stats(problem.params, (problem.x, targets))


@pytest.mark.parametrize("variance", [0.0, -1.0])
def test_a_variance_is_positive(variance):
    with pytest.raises(ff.errors.HyperparameterError, match="variance"):
        ff.Gaussian(variance=variance)


# ------------------------------------------------------------------------------------------ a likelihood of one's own


class Poisson:
    """Counts with rate e^f; the noise is the default, one uniform number per output."""

    def nll(self, outputs, targets):
        return (outputs.exp() - targets * outputs).sum(-1)

    def sample(self, outputs, noise):
        counts = torch.arange(60, dtype=outputs.dtype)
        log_p = counts * outputs[..., None] - outputs.exp()[..., None] - torch.lgamma(counts + 1)
        return (log_p.exp().cumsum(-1) < noise[..., None]).sum(-1).to(outputs.dtype)

    def fisher_sqrt(self, outputs):
        return torch.eye(outputs.shape[-1], dtype=outputs.dtype)[:, None] * (outputs / 2).exp()


@pytest.mark.parametrize("fisher", zoo.FISHERS)
def test_a_likelihood_of_ones_own(fisher):
    """Three methods by duck typing, no base class."""
    problem = zoo.from_net(zoo.mlp(3, 4, 2), (5, 3), "gaussian")
    y = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 1.0], [3.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    problem = zoo.replace(
        problem,
        y=y,
        likelihood=Poisson(),
        density=lambda out: torch.distributions.Poisson(out.exp(), validate_args=False),
    )
    run = zoo.sampled(problem, fisher)
    close(run.ng.fisher(run.stats).dense(), oracles.fisher_matrix(problem, fisher, run.draws))


@pytest.mark.parametrize(("fisher", "lacks"), [("mc", "sample"), ("type2", "fisher_sqrt")])
def test_a_likelihood_needs_only_what_its_fisher_needs(fisher, lacks):
    class Bare:
        nll = Poisson.nll

    problem = zoo.from_net(zoo.mlp(3, 2), (5, 3), "gaussian")
    problem = zoo.replace(problem, likelihood=Bare(), y=problem.y.abs().round())
    zoo.sampled(problem, "empirical")
    with pytest.raises(ff.errors.LikelihoodError, match=lacks):
        problem.build(fisher=fisher)


@pytest.mark.parametrize("variance", [0.5, 2.0])
def test_a_gaussian_variance_may_be_a_tensor_of_a_vmapped_call(variance):
    outputs, targets = torch.randn(3, 2), torch.randn(3, 2)

    def of(v):
        gaussian = ff.Gaussian(v)
        product, root = gaussian.fisher_product(outputs, targets), gaussian.fisher_sqrt(outputs)
        return gaussian.nll(outputs, targets), gaussian.score(outputs, targets), product, root

    variances = torch.tensor([variance, 1.0])
    for found, expected in zip(torch.vmap(of)(variances), of(variance), strict=True):
        torch.testing.assert_close(found[0], expected)


def test_targets_take_the_type_of_the_outputs():
    outputs, targets = torch.randn(3, 2), torch.randn(3, 2).double()
    assert ff.Gaussian().nll(outputs, targets).dtype == ff.Gaussian().score(outputs, targets).dtype == torch.float32


def test_categorical_likelihoods_are_equal_if_their_options_are():
    weight = torch.tensor([1.0, 2.0])
    assert ff.Categorical() == ff.Categorical() != ff.Categorical(label_smoothing=0.1)
    assert ff.Categorical(weight=weight) == ff.Categorical(weight=weight.clone()) != ff.Categorical(weight=2 * weight)
    assert ff.Categorical(weight=weight) != ff.Categorical() and ff.Categorical() != "categorical"
    assert len({ff.Categorical(), ff.Categorical(), ff.Categorical(weight=weight)}) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_targets_are_not_rounded_to_half_precision(dtype):
    outputs, targets = torch.full((1, 1), 100.0, dtype=dtype), torch.full((1, 1), 100.3)
    assert float(ff.Gaussian().nll(outputs, targets)) == pytest.approx(0.045, rel=1e-3)
    assert float(ff.Gaussian().score(outputs, targets)) == pytest.approx(-0.3, rel=1e-2)
    assert torch.isfinite(ff.Gaussian().nll(outputs, torch.full((1, 1), 800.0)))


# ------------------------------------------------------------------------------------------------- half precision

WEIGHT = torch.tensor([0.3, 1.7, 1.0001])
INDICES, EACH = torch.tensor([[0, 2], [1, -100], [2, 2], [0, 1]]), torch.tensor([0.3, 1.003, 2.01, 0.7])
FRACTIONS = torch.rand(4, 2, 3, generator=zoo.generator(7))
SOFT = FRACTIONS / FRACTIONS.sum(-1, keepdim=True)

# by name: likelihood and targets of outputs [4, 2, 3]
PRECISE = {
    "categorical": (ff.Categorical(), INDICES),
    "class weights": (ff.Categorical(weight=WEIGHT, label_smoothing=0.1), INDICES),
    "soft labels": (ff.Categorical(weight=WEIGHT), SOFT),
    "weights of examples": (ff.Categorical(), (INDICES, EACH)),
    "bernoulli": (ff.Bernoulli(), FRACTIONS),
    "probabilities": (ff.Bernoulli(logits=False), FRACTIONS),
    "gaussian": (ff.Gaussian(0.3), FRACTIONS),
    "weighted categorical": (ff.Weighted(ff.Categorical()), (INDICES, EACH)),
    "weighted bernoulli": (ff.Weighted(ff.Bernoulli()), (FRACTIONS, EACH)),
    "weighted gaussian": (ff.Weighted(ff.Gaussian()), (FRACTIONS, EACH)),
}


@pytest.mark.parametrize("name", PRECISE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_outputs_in_half_precision_round_nothing_but_the_results_in_their_type(name, dtype):
    """The oracle computes with the same outputs in float64. Losses are float32; cotangents have the outputs' type."""
    likelihood, targets = PRECISE[name]
    outputs = 3 * torch.randn(4, 2, 3, generator=zoo.generator(0))
    outputs = (outputs.sigmoid() if name == "probabilities" else outputs).to(dtype)
    v, precise = torch.randn(4, 2, 3, generator=zoo.generator(1)).to(dtype), outputs.double()
    rounding = torch.finfo(dtype).eps

    def rounded(found, expected, error=rounding):
        assert found.dtype == dtype
        expected = expected.to(dtype).float()
        torch.testing.assert_close(found.float(), expected, rtol=error, atol=error * float(expected.abs().max()))

    cotangent, losses = loss_cotangent(likelihood, outputs, targets)
    expected_cotangent, expected = loss_cotangent(likelihood, precise, targets)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    rounded(cotangent, expected_cotangent)
    rounded(likelihood.fisher_sqrt(outputs), likelihood.fisher_sqrt(precise))
    rounded(
        output_fisher(likelihood, outputs, targets, v),
        output_fisher(likelihood, precise, targets, v.double()),
        4 * rounding,
    )
    if hasattr(likelihood, "observed"):
        _, weights = likelihood.observed(outputs, targets)
        torch.testing.assert_close(weights.double(), likelihood.observed(precise, targets)[1], rtol=1e-6, atol=0)
    assert bool(likelihood.valid(outputs, targets))


@pytest.mark.parametrize("shift", [0.0, 16.0, 64.0])
def test_a_shift_of_the_logits_changes_nothing_in_half_precision(shift):
    """These logits are exact in bfloat16, with each of the shifts."""
    logits, labels = torch.randint(-8, 8, (64, 10), generator=zoo.generator(0)) / 2, torch.arange(64) % 10
    cotangent, losses = loss_cotangent(ff.Categorical(), (logits + shift).bfloat16(), labels)
    expected_cotangent, expected = loss_cotangent(ff.Categorical(), logits, labels)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cotangent, expected_cotangent.bfloat16(), rtol=2**-7, atol=1e-6)


def test_many_positions_add_up_in_half_precision():
    """N equal numbers add up to N times one of them; in bfloat16 a sum of ones ends at 256."""
    for likelihood, targets in (
        (ff.Categorical(), torch.zeros(1, 3000).long()),
        (ff.Bernoulli(), torch.ones(1, 3000, 2)),
    ):
        outputs = torch.zeros(1, 3000, 2, dtype=torch.bfloat16)
        each = math.log(2) * (1 if isinstance(likelihood, ff.Categorical) else 2)
        assert float(likelihood.nll(outputs, targets)) == pytest.approx(3000 * each, rel=1e-5)


def test_a_target_barely_outside_its_range_is_found_in_half_precision():
    """Rounded to bfloat16 it would be 1."""
    outputs, targets = torch.zeros(1, 1, dtype=torch.bfloat16), torch.full((1, 1), 1.001)
    assert not ff.Bernoulli().valid(outputs, targets) and ff.Bernoulli().nll(outputs, targets).isnan()


def test_probabilities_of_zero_and_one_have_finite_curvature_in_float16():
    """The clamp of float32 allows 1/(p(1-p)) up to 8e6, beyond the largest number of float16."""
    p, y = torch.tensor([[0.0, 1.0]]).half(), torch.tensor([[1.0, 0.0]]).half()
    likelihood, largest = ff.Bernoulli(logits=False), torch.finfo(torch.float16).max
    assert (likelihood.fisher_product(p, torch.ones_like(p)) == largest).all()
    assert torch.isfinite(likelihood.fisher_sqrt(p)).all() and torch.isfinite(likelihood.nll(p, y)).all()
    almost = torch.tensor([[2e-7, 0.5]]).half()  # a probability above the clamp, whose 1/p is beyond float16
    assert likelihood.score(almost, torch.ones_like(almost)).tolist() == [[-largest, -2.0]]
