"""Physics-informed nets: derivatives by autograd, equations by their solutions, runs and resumed runs."""

import dataclasses

import pytest
import torch
from torch.func import hessian, jacrev, vmap

import fisherfn as ff
import study_pinn
import train_pinn
from common.checkpoints import load_checkpoint
from common.config import ConfigError, read
from common.pinn import nets, optimizers, problems
from common.results import read_metrics


def points(n, d, seed=0):
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_net_carries_its_derivatives():
    params, x = nets.initial([3, 6, 5, 2], 0), points(7, 3)
    coefficients = [1.0, 0.0, 0.5]

    def at(point):
        return nets.value(params, point.unsqueeze(0)).squeeze(0)

    found = nets.derivatives(params, x, coefficients)
    torch.testing.assert_close(found.value, nets.value(params, x))
    torch.testing.assert_close(found.first, vmap(jacrev(at))(x).transpose(1, 2))
    second = vmap(hessian(at))(x).diagonal(dim1=-2, dim2=-1) @ torch.tensor(coefficients, dtype=x.dtype)
    torch.testing.assert_close(found.second, second, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", problems.PROBLEMS)
def test_the_solution_solves_the_equation_and_the_boundary_points_are_on_its_faces(name):
    problem = problems.PROBLEMS[name]
    x = points(5, problem.dimensions)

    def solution(point):
        return problem.solution(point.unsqueeze(0)).squeeze()

    first, second = vmap(jacrev(solution))(x), vmap(hessian(solution))(x).diagonal(dim1=-2, dim2=-1)
    left = first[:, 0] - second[:, 1] / 4 if name == "HEAT" else -second.sum(1)
    torch.testing.assert_close(left, problem.right(x).squeeze(1), rtol=1e-9, atol=1e-9)
    (inside, right), (edge, values) = problems.Posed(problem, 0).batch.values()
    assert (len(inside), len(edge)) == (problem.interior, problem.boundary)
    torch.testing.assert_close(right, problem.right(inside))
    torch.testing.assert_close(values, problem.solution(edge))
    on = torch.stack([edge[:, axis] == side for axis, side in problem.faces])
    assert (on.sum(0) == 1).all() and (on.sum(1) == problem.boundary // len(problem.faces)).all()
    if name == "HEAT":
        assert (edge[:, 0] < 1).all()


@pytest.mark.parametrize("name", problems.PROBLEMS)
def test_every_residual_is_that_of_its_equation(name):
    problem = problems.PROBLEMS[name]
    params, x = nets.initial([problem.dimensions, 5, 1], 1), points(4, problem.dimensions)

    def u(point):
        return nets.value(params, point.unsqueeze(0)).squeeze()

    first, second = vmap(jacrev(u))(x), vmap(hessian(u))(x).diagonal(dim1=-2, dim2=-1)
    left = first[:, 0] - second[:, 1] / 4 if name == "HEAT" else -second.sum(1)
    torch.testing.assert_close(problem.residual(params, x).squeeze(1), left, rtol=1e-9, atol=1e-12)


def drawn_twice(seed=0, redraw=2):
    return problems.Posed(problems.PROBLEMS["HEAT"], seed, redraw=redraw)


def equal(one, two):
    """Return whether two batches have equal points and right sides."""
    return all(torch.equal(one[term][at], two[term][at]) for term in one for at in (0, 1))


def test_points_are_redrawn_every_k_steps_and_only_then():
    posed = drawn_twice()
    first, second, third = (posed.at(step) for step in (1, 3, 5))
    assert equal(first, posed.batch) and equal(posed.at(2), first) and equal(posed.at(4), second)
    for one, two in ((first, second), (second, third)):
        for term in one:
            assert not torch.isin(one[term][0], two[term][0]).all(1).any(), term
    assert equal(drawn_twice().at(3), second)
    assert not equal(drawn_twice(seed=1).at(3), second)


def test_redrawn_points_pose_the_same_problem():
    posed, problem = drawn_twice(), problems.PROBLEMS["HEAT"]
    (inside, right), (edge, values) = posed.at(3).values()
    assert (inside.shape, edge.shape) == ((900, 2), (120, 2))
    torch.testing.assert_close(right, problem.right(inside))
    torch.testing.assert_close(values, problem.solution(edge))
    on = torch.stack([edge[:, axis] == side for axis, side in problem.faces])
    assert (on.sum(1) == 40).all() and (on.sum(0) == 1).all()


def test_without_redrawing_the_points_are_those_of_the_first_step_and_the_test_points_stay():
    fixed, redrawn = problems.Posed(problems.PROBLEMS["HEAT"], 3), drawn_twice(seed=3)
    assert fixed.at(1000) is fixed.batch and equal(fixed.batch, redrawn.batch)
    redrawn.at(7)
    assert torch.equal(fixed.tests, redrawn.tests)


@pytest.mark.parametrize("name", problems.PROBLEMS)
def test_published_errors_are_divided_by_the_size_of_the_solution(name):
    problem = problems.PROBLEMS[name]
    size = problem.solution(points(200_000, problem.dimensions)).square().mean().sqrt()
    assert study_pinn.SIZES[name] == pytest.approx(float(size), rel=0.01)
    for method, errors in study_pinn.relative(name).items():
        for step, error in errors.items():
            assert error * study_pinn.SIZES[name] == pytest.approx(study_pinn.PUBLISHED[name][method][step])


@pytest.fixture
def small(monkeypatch):
    """The first problem with few points."""
    few = dataclasses.replace(problems.PROBLEMS["POISSON_2D"], interior=40, boundary=12)
    monkeypatch.setitem(problems.PROBLEMS, "POISSON_2D", few)


def trained(tmp_path, name, *more, steps=6, optim="exact"):
    options = ["--model", "2-8-1", "--optim", optim, "--num_steps", str(steps), "--record_every", "1", "--quiet"]
    grid = ["--grid", "12"] if "grid" in optimizers.OPTIONS[optim] else []
    argv = [*options, *grid, "--result_dir", str(tmp_path), "--result_name", name, *more]
    return train_pinn.run(read(train_pinn.PinnConfig, argv))


def damped(optim):
    """The option of a damping, for the optimizers that have one."""
    return ["--damping", "1e-3"] if "damping" in optimizers.OPTIONS[optim] else []


@pytest.mark.parametrize("optim", optimizers.DEFAULTS)
def test_every_optimizer_lowers_the_loss_and_a_resumed_run_is_the_straight_one(small, tmp_path, optim):
    λ = damped(optim)
    straight = trained(tmp_path, "straight", *λ, optim=optim)
    losses = [each["loss"] for each in read_metrics(straight)]
    assert len(losses) == 6 and losses[-1] < losses[0]
    trained(tmp_path, "parts", *λ, steps=3, optim=optim)
    parts = trained(tmp_path, "parts", "--resume", *λ, optim=optim)
    one, two = (load_checkpoint(folder / "checkpoint.pt")[0] for folder in (straight, parts))
    assert one.keys() == two.keys()
    for path in one:
        torch.testing.assert_close(two[path], one[path], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("optim", optimizers.DEFAULTS)
def test_a_step_and_its_line_search_see_the_points_of_the_step_alone(small, optim):
    problem = problems.PROBLEMS["POISSON_2D"]
    params = nets.initial([2, 5, 1], 0)
    settings = dataclasses.replace(optimizers.DEFAULTS[optim], damping=1e-3)
    posed, elsewhere = problems.Posed(problem, 0, redraw=1), problems.Posed(problem, 0, redraw=1)
    batch = {term: (x, 10 * y) for term, (x, y) in posed.at(2).items()}  # of another problem, with other step sizes
    elsewhere.batch = batch

    def stepped(posed):
        optimizer = optimizers.optimizer_of(optim, posed, params, settings)
        return optimizer.step(params, optimizer.init(params), batch)

    (found, _, loss), (expected, _, same) = stepped(posed), stepped(elsewhere)
    assert torch.equal(loss, same)
    assert all(torch.equal(found[name], expected[name]) for name in params)
    before = optimizers.optimizer_of(optim, posed, params, settings).ng.loss(params, batch)
    torch.testing.assert_close(loss, before)


def stepped_with_spring(lr):
    """Return the step taken from a random net, and the direction that SPRING keeps."""
    params = nets.initial([2, 5, 1], 0)
    settings = dataclasses.replace(optimizers.DEFAULTS["spring"], damping=1e-6, lr=lr)
    posed = problems.Posed(problems.PROBLEMS["POISSON_2D"], 0)
    optimizer = optimizers.optimizer_of("spring", posed, params, settings)
    new, state, _ = optimizer.step(params, optimizer.init(params), posed.batch)
    return ff.tree.add(params, new, scale=-1.0), state["direction"]


def test_spring_keeps_the_step_of_its_line_search_and_the_whole_direction_without_one(small):
    taken, kept = stepped_with_spring(None)
    whole, direction = stepped_with_spring(0.01)
    assert ff.tree.norm(taken) < 0.9 * ff.tree.norm(direction)  # the line search took a shorter step
    for name, step in taken.items():
        torch.testing.assert_close(kept[name], step, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(0.01 * direction[name], whole[name], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("optim", ["exact", "spring", "dense", "adam"])
def test_a_resumed_run_with_redrawn_points_is_the_straight_one_bit_for_bit(small, tmp_path, optim):
    options = (*damped(optim), "--redraw", "2")
    straight = trained(tmp_path, "straight", *options, optim=optim)
    trained(tmp_path, "parts", *options, steps=3, optim=optim)
    parts = trained(tmp_path, "parts", "--resume", *options, optim=optim)
    fixed = trained(tmp_path, "fixed", *damped(optim), "--redraw", "0", optim=optim)
    one, two, other = (load_checkpoint(folder / "checkpoint.pt")[0] for folder in (straight, parts, fixed))
    assert one.keys() == two.keys() and all(torch.equal(one[path], two[path]) for path in one)
    assert not torch.equal(one["params/0.weight"], other["params/0.weight"])
    losses, same, fixed_losses = ([each["loss"] for each in read_metrics(each)] for each in (straight, parts, fixed))
    assert losses == same and losses[:2] == fixed_losses[:2] and losses[2] != fixed_losses[2]


@pytest.mark.parametrize("optim", ["exact", "adam"])
def test_the_recorded_loss_is_that_of_the_points_of_the_step(small, tmp_path, optim):
    folder = trained(tmp_path, "run", *damped(optim), "--redraw", "1", optim=optim, steps=2)
    params = {
        path.removeprefix("params/"): leaf
        for path, leaf in load_checkpoint(folder / "checkpoint.pt")[0].items()
        if path.startswith("params/")
    }
    posed = problems.Posed(problems.PROBLEMS["POISSON_2D"], 0, redraw=1)
    optimizer = optimizers.optimizer_of("exact", posed, params, optimizers.DEFAULTS["exact"])
    assert read_metrics(folder)[-1]["loss"] == float(optimizer.ng.loss(params, posed.at(2)))


def test_points_are_redrawn_as_published():
    found = {name: train_pinn.completed(train_pinn.PinnConfig(data=name)).redraw for name in problems.PROBLEMS}
    assert found == {"POISSON_2D": 0, "HEAT": 0, "POISSON_5D": 1}
    assert train_pinn.completed(train_pinn.PinnConfig(data="POISSON_5D", redraw=0)).redraw == 0


def test_a_fixed_learning_rate_replaces_the_line_search(small, tmp_path):
    folder = trained(tmp_path, "spring", "--lr", "0.05", "--damping", "1e-4", optim="spring", steps=3)
    assert [each["epoch"] for each in read_metrics(folder)] == [1, 2, 3]


def test_the_results_are_printed_as_a_table(small, tmp_path, capsys):
    argv = ["--model", "2-4-1", "--num_steps", "2", "--result_dir", str(tmp_path)]
    train_pinn.run(read(train_pinn.PinnConfig, argv))
    printed = capsys.readouterr().out
    assert "17 parameters; exact" in printed and "rel. error" in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "3-8-1"], "must have 2 inputs and 1 output"),
        (["--model", "two"], "widths such as 2-64-1"),
        (["--momentum", "1"], "momentum must be"),
        (["--redraw", "-1"], "redraw must be >= 0"),
        (["--resume", "--overwrite"], "exclude each other"),
        (["--optim", "exat"], "did you mean exact"),
        (["--optim", "adam", "--damping", "0.5"], "damping is no option of adam"),
        (["--optim", "kfac", "--lr", "0.5"], "lr is no option of kfac"),
        (["--momentum", "0.5"], "momentum is no option of exact"),
    ],
)
def test_wrong_options_are_errors_in_one_line(tmp_path, argv, message):
    with pytest.raises(ConfigError, match=message):
        train_pinn.run(read(train_pinn.PinnConfig, [*argv, "--result_dir", str(tmp_path)]))


@pytest.mark.parametrize("every", ["1", "3"])
def test_a_run_that_diverges_stops_with_the_step(tmp_path, every):
    argv = ["--model", "2-4-1", "--num_steps", "4", "--optim", "adam", "--lr", "1e300", "--record_every", every]
    with pytest.raises(ff.errors.NonFiniteError, match=r"the loss is nan after step [12]: give a smaller --lr"):
        train_pinn.run(read(train_pinn.PinnConfig, [*argv, "--quiet", "--result_dir", str(tmp_path)]))


def test_several_processes_are_refused_because_each_would_train_alone(small, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with pytest.raises(ConfigError, match="train_pinn trains in a single process: start it without torchrun"):
        train_pinn.run(train_pinn.PinnConfig(result_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_the_study_runs_what_is_missing_and_its_table_has_the_published_rows(small, tmp_path, capsys, monkeypatch):
    def config(steps):
        argv = ["--problems", "POISSON_2D", "--optims", "exact,adam", "--steps", str(steps)]
        return read(study_pinn.StudyConfig, [*argv, "--result_dir", str(tmp_path)])

    first = study_pinn.main(config(1))["POISSON_2D"]
    assert [list(steps) for steps in first.values()] == [[1], [1]]
    again = study_pinn.main(config(10))["POISSON_2D"]
    assert list(again["exact"]) == [1, 10] and again["adam"][1] == first["adam"][1]
    monkeypatch.setattr(study_pinn, "run", None)  # nothing is missing
    study_pinn.main(config(10))
    printed = capsys.readouterr().out
    assert "| POISSON_2D | *published: ENGD per layer* |  | 1.1e-02 | 5.4e-05 | 4.2e-07 | |" in printed
    assert (tmp_path / "train_pinn" / "pinn.png").exists()
    missing = study_pinn.main(dataclasses.replace(config(0), result_dir=str(tmp_path / "none")))
    assert missing == {"POISSON_2D": {"exact": {}, "adam": {}}}


def test_the_study_passes_its_settings_on_and_keeps_such_runs_apart(small, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(study_pinn, "run", asked.append)
    for more in ([], ["--redraw", "1"], ["--redraw", "0"], ["--damping", "1e-6"], ["--damping", "0"]):
        argv = ["--problems", "POISSON_2D", "--optims", "exact", *more, "--result_dir", str(tmp_path)]
        study_pinn.main(read(study_pinn.StudyConfig, argv))
    assert [each.redraw for each in asked] == [None, 1, 0, None, None]
    assert [each.damping for each in asked] == [None, None, None, 1e-6, 0.0]
    assert len({each.result_name for each in asked}) == 5
