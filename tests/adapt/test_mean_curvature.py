"""The mean curvature, the unit of automatic damping, and what it does for the exact natural gradient."""

import pytest
import torch

import fisherfn as ff
from tests.adapt.problems import Problem, built, dense_fisher, loss, mlp, steps

ALL = [name for name in ff.METHODS]


@pytest.mark.parametrize(("examples", "structure"), [(5, "full"), (5, "block"), (60, "full")])
def test_the_mean_curvature_of_few_examples_is_that_of_the_directions_they_see(examples, structure):
    problem = mlp(ff.Gaussian(), examples=examples)
    ng = built(problem, ff.exact(structure), fisher="type2")
    stats = ng.stats(problem.params, (problem.x, problem.y))
    state, _ = ng.update(ng.init(problem.params), stats)
    spectrum = torch.linalg.eigvalsh(dense_fisher(problem))
    if structure == "block":
        F, k = dense_fisher(problem), problem.params["a"].numel()
        spectrum = torch.cat([torch.linalg.eigvalsh(part) for part in (F[:k, :k], F[k:, k:])])
    seen = spectrum[spectrum > 1e-10 * spectrum.max()]
    assert float(ng.mean_curvature(state)) == pytest.approx(float(seen.mean()))
    above = built(problem, ff.two_level(fine=ff.exact(structure)), fisher="type2")
    state, _ = above.update(above.init(problem.params), stats)
    assert float(above.mean_curvature(state)) == pytest.approx(float(seen.mean()))


@pytest.mark.parametrize("method", [name for name in ALL if name != "exactNG"])
def test_the_mean_curvature_of_an_average_is_that_of_all_directions(method):
    problem = mlp(examples=5)
    ng = built(problem, method)
    _, state, _ = steps(problem, ff.adaptive(ng), 2)
    n = sum(leaf.numel() for leaf in problem.params.values())
    assert float(ng.mean_curvature(state.curvature)) == pytest.approx(float(ng.trace(state.curvature)) / n)


@pytest.mark.parametrize("seed", range(3))
def test_the_exact_natural_gradient_of_small_batches_of_classes_does_not_blow_up(seed):
    """Each batch sees a tenth of the directions; in the others the step is the gradient divided by λ."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(512, 32, generator=rng, dtype=torch.float64)
    y = (x[:, :4] + torch.randn(512, 4, generator=rng, dtype=torch.float64)).argmax(1)
    params = {"a": torch.randn(64, 32, generator=rng, dtype=torch.float64) / 6}
    params["b"] = torch.randn(4, 64, generator=rng, dtype=torch.float64) / 8
    problem = Problem(lambda p, x: torch.tanh(x @ p["a"].T) @ p["b"].T, params, x, y, ff.Categorical())
    opt = ff.adaptive(built(problem, "exactNG"))
    state, start, losses = opt.init(params), float(loss(problem, params)), []
    for step in range(64):
        part = slice(16 * (step % 32), 16 * (step % 32 + 1))
        params, state, _ = opt.step(params, state, (x[part], y[part]), generator=rng)
        losses.append(float(loss(problem, params)))
    assert max(losses) < 1.1 * start and losses[-1] < 0.7 * start, (start, max(losses), losses[-1])
