"""Demo, search and studies: what they compute beside running trainers."""

import dataclasses
import json
import math

import pytest
import torch
import yaml

import demo
import fisherfn as ff
import search
import study_plateau
import study_scale
import study_seeds
import study_two_level
from common import trainer
from common.config import ConfigError, read
from common.loop import Snapshot, Task
from common.train_config import APPS, OPTIMIZERS, CnnConfig, TrainConfig


def test_the_demo_prints_every_epoch_of_all_three_and_draws_them(own, drawn, capsys):
    demo.demo(demo.DemoConfig(data="own:load", model=None, num_epochs=2))
    printed = capsys.readouterr().out
    table = printed[printed.index("SGD   ") :].splitlines()
    assert [line.split()[0] for line in table[2:5]] == ["0", "1", "2"]
    assert all(len(line.split()) == 1 + 3 * 3 for line in table[2:5])
    assert (own / "results/demo/own-load.png").exists()


@pytest.fixture
def small_search(monkeypatch, tmp_path):
    """Few settings, and a table of tuned settings to write into."""
    tuned = tmp_path / "configs" / "tuned.yml"
    tuned.parent.mkdir()
    tuned.write_text(
        "# how\ndefault: {train_mlp: {sgd: {lr: 7}, adam: {lr: 8}}}\ntuned: {AE_CURVES: {CURVES: {sgd: {lr: 9}}}}\n"
    )
    grid = {
        "sgd": [{"lr": 1e30}, {"lr": 1e-12}, {"lr": 0.1}],
        "adam": [{"lr": 1e30}],
    }
    for module in (search, trainer):
        monkeypatch.setattr(module, "TUNED", tuned)
    monkeypatch.setattr(search, "GRIDS", dict.fromkeys(search.GRIDS, grid))
    return tuned


def test_the_search_records_every_trial_and_the_best_of_each(own, small_search):
    full, data = search.base(search.SearchConfig(data="own:load", num_epochs=3, batch_size=8, seed=2))
    assert (full.app, full.model, full.batch_size, full.seed) == ("train_mlp", "own:build", 8, 2)
    trials = search.search(full, data)
    assert [t["optim"] for t in trials] == ["sgd", "sgd", "sgd", "adam"]
    assert trials[0]["train_loss"] is None or trials[0]["train_loss"] > 1e6
    assert 0 <= trials[2]["test_accuracy"] <= 1
    search.record(full, data.name, trials)
    written = json.loads((small_search.parent / "search" / "own-build-SMALL.json").read_text())
    assert written["trials"] == trials
    budget = {"app": "train_mlp", "data": "SMALL", "model": "own:build", "num_epochs": 3, "batch_size": 8, "seed": 2}
    assert budget.items() <= written["budget"].items()
    assert small_search.read_text().startswith("# how\n")
    table = yaml.safe_load(small_search.read_text())
    assert table["tuned"]["own:build"]["SMALL"]["sgd"] == {"lr": 0.1}
    assert table["tuned"]["AE_CURVES"] == {"CURVES": {"sgd": {"lr": 9}}}
    # and this is what a run takes that leaves its settings open
    assert trainer.tuned("train_mlp", "own:build", "SMALL", "sgd") == {"lr": 0.1}
    folder = trainer.run(TrainConfig(data="own:load", optim="sgd", num_epochs=1, quiet=True))
    assert yaml.safe_load((folder / "config.yaml").read_text())["lr"] == 0.1


def test_a_search_with_unknown_data_is_a_wrong_command_line():
    with pytest.raises(ConfigError, match="data must be one of"):
        read(search.SearchConfig, ["--data", "NOPE"])


def test_an_optimizer_that_finished_nothing_has_no_best():
    diverged = {"optim": "sgd", "lr": 1.0, "train_loss": None, "stopped": "NonFiniteError"}
    assert search.best([diverged]) == {}
    assert search.best([diverged, {"optim": "sgd", "lr": 0.1, "train_loss": 2.0}]) == {"sgd": {"lr": 0.1}}


def test_other_trainers_are_searched_with_their_own_defaults(own, small_search):
    full, data = search.base(search.SearchConfig(app="train_cnn", data="own:load", model="own:convolutional"))
    assert (full.app, full.model, full.batch_size) == ("train_cnn", "own:convolutional", CnnConfig().batch_size)
    trial = search.trial(dataclasses.replace(full, optim="sgd", lr=0.1, num_epochs=1), data)
    assert math.isfinite(trial["train_loss"])


def test_no_natural_gradient_is_tuned():
    table = yaml.safe_load(trainer.TUNED.read_text())
    entries = [*table["default"].values(), *(entry for data in table["tuned"].values() for entry in data.values())]
    assert entries and all(set(entry) <= {"sgd", "adam"} for entry in entries)


def test_within_a_search_every_optimizer_has_as_many_settings():
    assert set(search.GRIDS) == set(APPS)
    for app, grid in search.GRIDS.items():
        assert {len(settings) for settings in grid.values()} == {10 if app == "train_mlp" else 8}
        assert all(len({tuple(s.items()) for s in settings}) == len(settings) for settings in grid.values())
    # the rates of the recorded searches
    rates = [0.1, 0.046416, 0.021544, 0.01, 0.004642, 0.002154, 0.001, 0.000464, 0.000215, 0.0001]
    assert [settings["lr"] for settings in search.GRIDS["train_mlp"]["sgd"]] == rates


def test_tuned_settings_belong_to_a_model_and_its_data(small_search):
    assert trainer.tuned("train_mlp", "AE_CURVES", "CURVES", "sgd") == {"lr": 9}
    for model, data in (("AE_CURVES", "DIGITS"), ("AE_MNIST", "CURVES")):
        assert trainer.tuned("train_mlp", model, data, "sgd") == {"lr": 7}
    assert trainer.tuned("train_mlp", "AE_CURVES", "CURVES", "adam") == {"lr": 8}
    assert trainer.tuned("train_mlp", "AE_CURVES", "CURVES", "kfac") == {}, "a natural gradient finds its own"


@pytest.mark.parametrize("app", APPS)
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_trainer_has_settings_for_every_optimizer(app, optim):
    assert (
        trainer.tuned(app, "some:net", "elsewhere", optim).keys()
        == trainer.tuned("train_mlp", "AE_CURVES", "CURVES", optim).keys()
    )


def test_the_study_of_seeds_reports_means_and_deviations(own, drawn, capsys):
    config = study_seeds.StudyConfig(data="own:load", optims="sgd,kfac", seeds=2, num_epochs=2, quiet=True)
    study_seeds.study(config)
    folder = own / "results/study_seeds"
    runs = json.loads((folder / "own-load-own-build.json").read_text())
    assert (folder / "own-load-own-build.png").exists()
    ends = [runs["kfac"][seed][-1] for seed in ("0", "1")]
    assert all(end["epoch"] == 2 for end in ends)
    assert ends[0]["train_loss"] != ends[1]["train_loss"]
    losses, accuracies = ([end[key] for end in ends] for key in ("train_loss", "test_accuracy"))
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("K-FAC  ")]
    for values in (losses, accuracies):
        mean, deviation = sum(values) / 2, abs(values[0] - values[1]) / math.sqrt(2)
        assert f" {mean:.5f} ± {deviation:.5f}" in line
    assert line.endswith("2/2")


def test_a_study_goes_on_where_it_stopped(own, monkeypatch):
    config = study_seeds.StudyConfig(data="own:load", optims="sgd", seeds=1, num_epochs=1, quiet=True)
    study_seeds.study(config)
    metrics = own / "results/study_seeds/own-load-own-build-sgd-0/metrics.jsonl"
    before = metrics.read_text()
    study_seeds.study(dataclasses.replace(config, seeds=2, num_epochs=2, resume=True))
    assert metrics.read_text().startswith(before) and metrics.read_text().count("\n") == 3
    assert metrics.parent.with_name("own-load-own-build-sgd-1").is_dir()


def test_runs_that_did_not_finish_are_left_out_of_the_means():
    def ended(epoch, loss):
        return [{"epoch": epoch, "train_loss": loss, "test_loss": loss, "seconds": 2.0}]

    runs = {"sgd": {0: ended(2, 1.0), 1: ended(1, 5.0), 2: ended(2, math.nan)}, "adam": {0: ended(0, 3.0)}}
    head, sgd, adam = study_seeds.table(runs, num_epochs=2).splitlines()
    assert head.split() == ["train", "loss", "test", "loss", "s", "per", "epoch", "seeds"]
    assert sgd.split() == ["SGD", "1.00000", "1.00000", "1.0", "1/3"]
    assert adam.split() == ["Adam", "–", "–", "–", "0/1"]


def test_a_diverged_run_is_reported_and_the_study_goes_on(own, small_search, capsys):
    table = yaml.safe_load(small_search.read_text())
    table["default"]["train_mlp"]["sgd"]["lr"] = 1e30
    small_search.write_text(yaml.safe_dump(table))
    config = study_seeds.StudyConfig(
        data="own:load", model="own:autoencoder", optims="sgd", seeds=1, num_epochs=4, quiet=True
    )
    study_seeds.study(config)
    printed = capsys.readouterr().out
    assert "stopped: " in printed and "0/1" in printed


def test_an_optimizer_of_a_study_has_to_exist(own):
    with pytest.raises(ff.FisherfnError, match="optims must be among sgd, adam, .* got 'sdg'"):
        study_seeds.study(study_seeds.StudyConfig(data="own:load", optims="adam, sdg"))
    assert not (own / "results").exists()


@pytest.mark.parametrize("dead", [0, 1, 3])
def test_code_units_are_dead_when_no_image_activates_them(dead):
    generator = torch.Generator().manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3), torch.nn.ReLU())
    net.append(torch.nn.Linear(3, 4))
    with torch.no_grad():
        net[2].bias.fill_(50.0)
        net[2].bias[:dead] = -50.0
    model, params, context = ff.functional(net)
    x = torch.rand(20, 4, generator=generator)
    task = Task(model, model, params, context, ff.Bernoulli(), (x, x), (x, x), 4)
    assert study_plateau.dead_code_units(task, Snapshot(params, context, (), 0, 0, 0.0)) == dead


def test_the_study_of_two_levels_measures_every_method(own, drawn, capsys):
    config = study_two_level.StudyConfig(
        data="own:load", model="own:autoencoder", batch_size=16, damping=0.1, kl_bound=0.1, steps=3, seeds=2, points=2,
        quiet=True,
    )  # fmt: skip
    folder = study_two_level.study(config)
    printed = capsys.readouterr().out
    assert all(name in printed for name in study_two_level.METHODS)
    found = json.loads((folder / "result.json").read_text())
    assert [point["step"] for point in found["distances"]] == [1, 2]
    for point in found["distances"]:
        energies = {name: one["energy"] for name, one in point["methods"].items()}
        fine, nearest = energies["K-FAC"], energies["nicolaides, multiplicative"]
        assert 0 < nearest <= fine * (1 + 1e-4), "a correction in the space is never farther than none"
        assert all(point["methods"][name]["steps"] >= 1 for name in study_two_level.LINEAR)
    assert all(len(one["losses"]) == 3 for runs in found["runs"].values() for one in runs)
    assert (folder / "losses.png").exists()


def test_conjugate_gradients_end_where_the_energy_is_reached():
    """Two eigenvalues are two steps; with the inverse as preconditioner one."""
    scale = torch.tensor([1.0, 1.0, 5.0, 5.0], dtype=torch.float64)
    grads = {"w": torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)}
    whole = float((grads["w"] ** 2 / scale).sum())

    def steps(precondition):
        return study_two_level.conjugate(lambda z: {"w": scale * z["w"]}, precondition, grads, whole)

    assert steps(lambda r: r) == 2 and steps(lambda r: {"w": r["w"] / scale}) == 1


def test_scale_measures_every_kind_of_step_and_names_unknown_nets(monkeypatch):
    monkeypatch.setattr(study_scale, "VOCABULARY", 11)
    config = study_scale.ScaleConfig(layers=1, positions=3, threads=torch.get_num_threads())
    line = study_scale.measured("gpt2", "kfac", config)
    parts = ("gpt2 (7 million parameters) kfac", "build", "statistics and inverses", "step", "GiB")
    assert all(part in line for part in parts), line
    with pytest.raises(ConfigError, match="nets must be among gpt2, resnet50, got 'gpt3'"):
        study_scale.main(study_scale.ScaleConfig(nets="gpt3"))
