"""The examples of the gallery run in a small setting, and what their pages say of them is true there."""

import pytest
import torch
from torch.func import jacrev, vmap

import fisherfn as ff
from tests.examples import DOCS, load

gallery = load("all")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return the result of every example, each run once."""
    folder, found = tmp_path_factory.mktemp("gallery"), {}

    def result(name):
        if name not in found:
            found[name] = load(name).main(folder, small=True)
            assert (folder / f"{name}.png").stat().st_size > 10_000
        return found[name]

    return result


def test_blocks_are_ordered_as_theory_says_and_the_errors_are_those_of_the_images(results):
    errors, images = (results("fisher_blocks")[key] for key in ("errors", "images"))
    best = errors["Deflation"]
    assert best <= min(errors["KPSVD"], errors["K-FAC corrected"]) + 1e-9
    assert max(errors["E-KFAC"], errors["KPSVD"], errors["K-FAC corrected"]) <= errors["K-FAC"] + 1e-9
    assert abs(errors["Lanczos"] - best) < 1e-6  # the same two terms, found in another way
    F = images["sampled Fisher"]
    for name, error in errors.items():
        assert abs((images[name] - F).norm() / F.norm() - error) < 1e-8, name


def test_spectra_have_the_sums_and_norms_that_they_must(results):
    truth, spectra, errors = (results("spectra")[key] for key in ("truth", "spectra", "errors"))
    torch.testing.assert_close(spectra["E-KFAC"].sum(), truth.sum(), rtol=1e-8, atol=0)  # the diagonal in another basis
    # the nearest product is a projection: what is left is orthogonal to it
    projected = truth.square().sum() * (1 - errors["KPSVD"] ** 2)
    torch.testing.assert_close(spectra["KPSVD"].square().sum(), projected, rtol=1e-6, atol=0)
    for name in ("K-FAC", "E-KFAC", "KPSVD"):
        assert spectra[name].min() > -1e-9 * truth.max(), name


def test_training_curves_give_every_optimizer_the_same_budget_and_start(results):
    runs = results("training_curves")
    assert {len(each) for each in runs.values()} == {4}
    starts = torch.stack([curve[0] for each in runs.values() for _, curve in each])
    torch.testing.assert_close(starts, starts[:1].expand_as(starts), rtol=1e-5, atol=0)
    for name, each in runs.items():
        assert each[0][1][-1] < each[0][1][0], name
        assert each[0][1].min() > 0, "below the entropy of the images"


def test_a_member_of_the_sweep_is_the_single_run(results):
    found = results("ensemble_sweep")
    assert found["losses"].shape == (4,) and found["losses"].unique().numel() == 4
    torch.testing.assert_close(found["losses"][found["best"]], found["alone"], rtol=1e-9, atol=1e-12)


def test_every_sparse_autoencoder_is_trained_as_if_it_were_alone(results):
    found = results("sparse_autoencoders")
    model, batch, coefficients = found["model"], found["batch"], found["coefficients"]
    start, orders = found["start"], found["orders"]
    example = load("sparse_autoencoders")
    params = {name: leaf[1] for name, leaf in start.items()}
    ng = ff.natural_gradient(
        model, params, batch(coefficients[1], orders[0])[0], likelihood=example.Sparse(), fisher="type2"
    )
    opt, due = ff.adaptive(ng), ff.Cadence()
    state = opt.init(params)
    for step in range(10):
        given = batch(coefficients[1], orders[step])
        params, state, _ = opt.step(params, state, given, **due(step)._asdict())
        params = example.with_unit_columns(params)
    for name, leaf in found["runs"]["K-FAC"]["params"].items():
        assert (leaf[1] - start[name][1]).norm() > 0.01 * start[name][1].norm(), name
        torch.testing.assert_close(leaf[1], params[name], rtol=1e-3, atol=1e-4)
    active = found["runs"]["K-FAC"]["active"]
    assert active[0] > active[-1], "a larger coefficient gives fewer features"


def test_the_posterior_is_that_of_dense_matrices_and_knows_where_there_are_no_data(results):
    laplace = results("laplace")
    examples, params, J = laplace["examples"], laplace["params"], laplace["jacobian"]
    flat = torch.cat([J[name].flatten(1) for name in params], 1)
    size = torch.tensor(float(flat.shape[1]), dtype=torch.float64)
    square = sum(leaf.square().sum() for leaf in params.values())
    priors = load("laplace").PRIORS
    for name, found in laplace["found"].items():
        dense, prior = found["curvature"].dense(), found["prior"]
        precision = examples * dense + prior * torch.eye(len(dense), dtype=torch.float64)
        variance = (flat * torch.linalg.solve(precision, flat.T).T).sum(1)
        torch.testing.assert_close(found["deviation"], variance.sqrt(), rtol=1e-7, atol=0)
        evidence = -examples * laplace["loss"] - prior / 2 * square + size / 2 * prior.log() - precision.logdet() / 2
        torch.testing.assert_close(found["evidence"].max(), evidence, rtol=1e-8, atol=0)
        assert priors[0] < prior < priors[-1], name
        known, unknown = (laplace["grid"].abs() - 2.5).abs() < 1, laplace["grid"].abs() < 0.3
        assert found["deviation"][unknown[:, 0]].min() > 2 * found["deviation"][known[:, 0]].max(), name


def test_every_method_finds_a_prior_and_one_per_block_is_no_worse(results):
    laplace = results("laplace")
    for name, one in laplace["posteriors"].items():
        shared, per_block = one["evidence"]
        assert shared <= per_block + 1e-2 and one["deviation"] > 0, name
        assert all(value > 0 for value in one["prior"].values()), name
    grid = laplace["found"]["K-FAC"]["evidence"].max()
    assert laplace["posteriors"]["kfac"]["evidence"][0] >= grid - 1e-6, "the fixed point is at least as good as a grid"


def test_penalties_are_quadratic_forms_of_the_fisher_and_none_is_the_same_for_all_strengths(results):
    accuracy, continual = results("continual")["accuracy"], load("continual")
    assert (accuracy["no penalty"] == accuracy["no penalty"][:1]).all()
    assert not (accuracy["K-FAC"] == accuracy["no penalty"]).all()
    rng = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(2, 3, generator=rng).double()}
    batch = torch.randn(20, 3, generator=rng).double(), torch.arange(20) % 2
    model = lambda params, x: x @ params["w"].T  # noqa: E731
    ng = ff.natural_gradient(model, params, batch[0], likelihood=ff.Categorical(), fisher="type2")
    F, v = ng.fisher(ng.stats(params, batch)).dense(), {"w": torch.randn(2, 3, generator=rng).double()}
    wanted = {"diagonal": F.diag().diag(), "full Fisher": F}
    for name, matrix in wanted.items():
        measure, product = continual.FISHERS[name](model, params, batch[0])
        found = product(measure(params, batch), v)["w"].flatten()
        torch.testing.assert_close(found, matrix @ v["w"].flatten())


def test_influence_scores_are_those_of_dense_matrices(results):
    """The exact scores solve with the dense Fisher, and predict the retrained models better than gradients alone."""
    for name, found in results("influence").items():
        ng, params, train, queries = (found[key] for key in ("ng", "params", "train", "queries"))
        decay = {"regression on a table": 0.03, "classifier of digits": 0.01}[name]
        gradients = [
            torch.cat([leaf.flatten(1) for leaf in ff.example_gradients(ng.stats(params, data)).values()], 1)
            for data in (queries, train)
        ]
        F = ng.fisher(ng.stats(params, train)).dense()
        expected = gradients[0] @ torch.linalg.solve(F + decay * torch.eye(len(F), dtype=F.dtype), gradients[1].mT)
        torch.testing.assert_close(found["scores"]["exact Fisher (CG)"]["scores"], expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found["scores"]["gradients alone"]["scores"], gradients[0] @ gradients[1].mT)


def test_damping_moves_only_where_the_rule_may_move_it(results):
    runs = results("custom_loop")
    assert len({run["losses"][0] for run in runs.values()}) == 1
    for name, run in runs.items():
        dampings = torch.tensor(run["dampings"])
        factors = dampings[1:] / dampings[:-1]
        if name.startswith("fixed"):
            assert dampings.unique().numel() == 1, name
            continue
        assert ((factors - 1).abs()[[i for i in range(len(factors)) if i % 5 != 3]] < 1e-6).all(), name
        allowed = torch.tensor([0.75, 1.0, 1.33])
        assert ((factors.unsqueeze(1) - allowed).abs().min(1).values < 1e-5).all(), name
    assert runs["adapted, from 1"]["dampings"][-1] < 1, "far too much damping, and the rule does not see it"


def test_the_net_carries_its_derivatives(results):
    physics = load("physics")
    rng = torch.Generator().manual_seed(3)
    params = {}
    for i, (d_in, d_out) in enumerate(zip(physics.WIDTHS[:-1], physics.WIDTHS[1:], strict=True)):
        params[f"{i}.weight"] = torch.randn(d_out, d_in, generator=rng, dtype=torch.float64) / 2
        params[f"{i}.bias"] = torch.randn(d_out, generator=rng, dtype=torch.float64)
    points = torch.rand(7, 2, generator=rng, dtype=torch.float64)

    def value(point):
        h = point
        for i in range(len(physics.WIDTHS) - 1):
            h = torch.nn.functional.linear(torch.tanh(h) if i else h, params[f"{i}.weight"], params[f"{i}.bias"])
        return h.squeeze(-1)

    def solution(point):
        return physics.solution(params, point.unsqueeze(0)).squeeze(0)

    jet = physics.jet(params, points)
    first, second = vmap(jacrev(value))(points), vmap(jacrev(jacrev(value)))(points)
    by_autograd = torch.stack((vmap(value)(points), first[:, 0], first[:, 1], second[:, 1, 1]), 1)
    torch.testing.assert_close(jet, by_autograd, rtol=1e-10, atol=1e-12)

    heat = vmap(jacrev(solution))(points)[:, 0] - physics.SPEED * vmap(jacrev(jacrev(solution)))(points)[:, 1, 1]
    torch.testing.assert_close(physics.residuals(params, points)[:, 0], heat, rtol=1e-10, atol=1e-12)
    edges = torch.tensor([[0.0, 0.3], [0.6, 0.0], [0.6, 1.0]], dtype=torch.float64)
    expected = torch.sin(torch.pi * edges[:, 1])
    torch.testing.assert_close(physics.solution(params, edges), expected, rtol=1e-12, atol=1e-12)


def test_the_exact_natural_gradient_solves_the_heat_equation_in_fewer_steps(results):
    losses, errors = (results("physics")[key] for key in ("losses", "errors"))
    assert len(losses["exact NG"]) < len(losses["Adam"])
    assert losses["exact NG"][-1] < min(losses["Adam"][-1], losses["K-FAC"][-1])
    assert errors["exact NG"] < errors["Adam"]


def test_the_energy_of_the_chain_reaches_that_of_exact_diagonalisation(results):
    for (field, name), errors in results("ising")["errors"].items():
        assert min(errors) > -1e-9, (field, name)  # no state has less energy than the ground state
        assert errors[-1] < 1e-4 < errors[0], (field, name)


def test_every_example_has_its_picture_and_its_page_and_the_index_shows_them():
    index = (DOCS / "gallery" / "index.md").read_text(encoding="utf-8")
    for name in gallery.EXAMPLES:
        page = (DOCS / "gallery" / f"{name}.md").read_text(encoding="utf-8")
        assert (DOCS / "images" / "gallery" / f"{name}.png").exists(), name
        assert f"images/gallery/{name}.png" in page and f"{name}.py" in page, name
        assert f"({name}.md)" in index and f"images/gallery/{name}.png" in index, name
    pages = {page.stem for page in (DOCS / "gallery").glob("*.md")}
    assert pages >= {*gallery.EXAMPLES, "index", "gan_grids"}
    assert all(f"({page}.md)" in index for page in pages - {"index"})


def test_no_example_depends_on_the_global_generator(tmp_path):
    ends = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        ends.append(load("ensemble_sweep").main(tmp_path, small=True)["losses"])
    assert torch.equal(*ends)
