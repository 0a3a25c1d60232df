"""Errors of a method's Fisher relative to the sampled one: every number by brute force."""

import dataclasses
import math

import pytest
import torch

import fisherfn as ff
from approximation_error import METHODS
from common import spectra
from tests import zoo

QUANTITIES = {"error", "eigenvalues", "divergence", "angle"}
DAMPING = 0.1


def nets_of(problem, methods=METHODS):
    ng = problem.build()
    return {name: dataclasses.replace(ng, method=ff.METHODS[name]()) for name in methods}


def compared(problem, nets, count=3, params=None):
    return spectra.compare(nets, params or problem.params, problem.batch, DAMPING, count, zoo.generator(3))


def dense(ng, state, key):
    """The matrix of a method's block, from its action on trees."""
    zeros = {block.key: torch.zeros(block.shape, dtype=zoo.DTYPE) for block in ng.layout.blocks}
    units = torch.eye(zeros[key].numel(), dtype=zoo.DTYPE).reshape(-1, *zeros[key].shape)
    act = torch.vmap(lambda unit: ng.layout.matrices(ng.matvec(state, ng.layout.tree(zeros | {key: unit})))[key])
    return act(units).flatten(1)


def vec(W):
    return W.flatten()


def cosine(x, y):
    return float(x @ y / x.norm() / y.norm())


def cosine_of(values, key, name):
    return math.cos(math.radians(values["angle"][key][name]))


# --------------------------------------------------------------------------------------------------------- one step


@pytest.mark.parametrize(
    ("id", "count"), [("mlp-categorical", 3), ("conv", 50), ("conv-groups", 3), ("scale-vector", 50)]
)
def test_errors_eigenvalues_and_angles_are_those_of_the_dense_matrices(id, count):
    problem = zoo.pick(id)
    nets = nets_of(problem, ("kfac", "deflation", "ekfac"))
    loss, values = compared(problem, nets, count)
    ng = nets["kfac"]
    stats = ng.stats(problem.params, problem.batch, generator=zoo.generator(3))
    assert math.isclose(loss, float(stats.loss))
    gradient, fisher = ng.layout.matrices(stats.grads), ng.fisher(stats, "block")
    blocks = {key: fisher.block(key) for key in gradient}
    exact = {key: torch.linalg.solve(F + DAMPING * torch.eye(len(F)), vec(gradient[key])) for key, F in blocks.items()}
    for key, nat in exact.items():
        assert cosine_of(values, key, spectra.GRADIENT) == pytest.approx(cosine(vec(gradient[key]), nat), abs=1e-8)
    for name, ng in nets.items():
        state, _ = ng.invert(ng.update(ng.init(problem.params, damping=DAMPING), stats)[0])
        step = ng.layout.matrices(ng.precondition(state, stats))
        for key, F in blocks.items():
            approximate = dense(ng, state, key)
            true, found = (torch.linalg.eigvalsh(M).flip(0)[:count] for M in (F, approximate))
            distances = [(F - approximate).norm() / F.norm(), (found - true).norm() / true.norm()]
            measured = [values["error"][key][name], values["eigenvalues"][key][name]]
            assert measured == pytest.approx([float(d) for d in distances], rel=1e-6, abs=1e-7)
            kl = float(ng.fisher_divergence(state, stats)[key])
            assert values["divergence"][key][name] == pytest.approx(kl, rel=1e-6)
            assert cosine_of(values, key, name) == pytest.approx(cosine(vec(step[key]), exact[key]), abs=1e-8)


def test_two_terms_are_more_accurate_than_one_and_the_best_product_than_kfac():
    problem = zoo.pick("mlp-categorical")
    _, values = compared(problem, nets_of(problem), count=0)
    assert values.keys() == {"error"}
    for errors in values["error"].values():
        assert errors["deflation"] == pytest.approx(errors["lanczos"], abs=1e-6)
        assert errors["lanczos"] < errors["kfac_cor"] < errors["kfac"]
        assert errors["lanczos"] < errors["kpsvd"] < errors["kfac"]
        assert errors["ekfac"] < errors["kfac"]


def test_a_block_without_curvature_has_no_numbers_and_the_others_do(monkeypatch):
    leading = spectra.leading

    def checked(act, like, count, scale):
        assert scale > 0, "an operator is divided by its scale"
        return leading(act, like, count, scale)

    monkeypatch.setattr(spectra, "leading", checked)
    problem = zoo.pick("mlp-categorical")
    first, *_, last = (block.key for block in nets_of(problem)["kfac"].layout.blocks)
    params = {name: leaf * (name != f"{last}.weight") for name, leaf in problem.params.items()}
    _, values = compared(problem, nets_of(problem), params=params)
    for quantity in QUANTITIES:
        missing = math.isfinite if quantity == "divergence" else math.isnan
        assert all(map(missing, values[quantity][first].values()))
        assert all(math.isfinite(number) for number in values[quantity][last].values())


def failing(method, part):
    """Return the same method, with a `part` that reports every block as invalid."""

    def act(self, *args):
        result = getattr(super(Failing, self), part)(*args)
        return result._replace(ok=dict.fromkeys(result.ok, torch.tensor(False)))

    Failing = type("Failing", (type(method),), {part: act})
    return Failing(**dataclasses.asdict(method))


def test_a_method_that_was_not_ok_has_no_numbers_and_the_others_do():
    problem = zoo.pick("mlp-categorical")
    nets = nets_of(problem, ("kfac", "ekfac"))
    for part, lost in (("update", QUANTITIES), ("invert", {"divergence", "angle"})):
        method = failing(nets["kfac"].method, part)
        _, values = compared(problem, nets | {"kfac": dataclasses.replace(nets["kfac"], method=method)})
        for quantity, layers in values.items():
            for numbers in layers.values():
                assert math.isnan(numbers["kfac"]) == (quantity in lost)
                assert math.isfinite(numbers["ekfac"])


# ------------------------------------------------------------------------------------------- eigenvalues and angles


def symmetric(d, seed, dtype=torch.float64):
    M = torch.randn(d, d, generator=zoo.generator(seed), dtype=dtype)
    return (M + M.mT) / 2


def kronecker_sum(dtype, ranks, weight):
    """A PSD term and an indefinite one on matrices `[1 20 36]`: their action and their matrix."""
    parts = [[symmetric(d, seed + d, dtype) for d in (20, 36)] for seed in (0, 1)]
    first = [M[:, :rank] @ M[:, :rank].mT for M, rank in zip(parts[0], ranks, strict=True)]
    second = [M[:, :rank] @ M[:rank, :rank] @ M[:rank] for M, rank in zip(parts[1], ranks, strict=True)]
    second[0] = second[0] * weight
    matrix = sum(torch.kron(S.double(), R.double()) for S, R in (first, second))
    return (lambda W: first[0] @ W @ first[1] + second[0] @ W @ second[1]), (matrix + matrix.mT) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("ranks", "weight"), [((20, 36), 0.01), ((20, 9), 1.0), ((3, 2), 10.0)])
@pytest.mark.parametrize("wrong", [1.0, 3.0])
def test_eigenvalues_of_a_large_operator_are_those_of_its_matrix(dtype, ranks, weight, wrong):
    act, matrix = kronecker_sum(dtype, ranks, weight)
    true = torch.linalg.eigvalsh(matrix).flip(0)
    assert len(true) > spectra.FORMED and true[-1] < 0 < true[0]
    found = spectra.leading(act, torch.zeros(1, 20, 36, dtype=dtype), 50, float(true[0]) * wrong)
    assert len(found) == 50
    assert (found - true[:50]).abs().max() < 1e-4 * true[0] * wrong


def test_the_largest_eigenvalues_are_not_those_of_largest_magnitude():
    ramp = torch.linspace(-9, 1, 720, dtype=torch.float64)
    found = spectra.leading(lambda W: ramp.reshape(W.shape) * W, torch.zeros(1, 20, 36, dtype=torch.float64), 5, 1.0)
    assert torch.allclose(found, ramp.flip(0)[:5], atol=1e-4)


def test_an_iteration_without_end_is_given_up_as_not_a_number(monkeypatch):
    monkeypatch.setattr(spectra, "CYCLES", 1)
    ramp = torch.linspace(0, 1, 720, dtype=torch.float64).reshape(1, 20, 36)
    found = spectra.leading(lambda W: ramp * W, ramp, 5, 1.0)
    assert found.shape == (5,) and found.isnan().all()


@pytest.mark.parametrize("columns", [3, 6, 9])
@pytest.mark.parametrize("count", [2, 6, 50])
def test_eigenvalues_from_the_gram_matrix_are_those_of_the_fisher(columns, count):
    U = torch.randn(6, columns, generator=zoo.generator(), dtype=torch.float64)
    found = spectra.leading_of_gram(U.mT @ U, 6, count)
    assert torch.allclose(found, torch.linalg.eigvalsh(U @ U.mT).flip(0)[:count], atol=1e-12)


def test_angles_are_exact_also_where_a_cosine_is_not():
    x, y = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.1]])
    assert spectra.angle(x, 2 * x) == 0
    assert spectra.angle(x, -x) == pytest.approx(180)
    assert spectra.angle(x, y) == pytest.approx(90)
    assert spectra.angle(x, x + 1e-5 * y) == pytest.approx(math.degrees(1e-6 / 3), rel=1e-4)
    assert math.isnan(spectra.angle(x, 0 * x))
