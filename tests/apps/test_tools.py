"""Demo, search, study and benchmark: what they compute beside running trainers."""

import json
import math

import pytest
import torch
import yaml

import benchmark
import demo
import fisherfn as ff
import search
import study_plateau
from common import trainer
from common.loop import Snapshot, Task


def test_the_demo_prints_every_epoch_of_all_three_and_draws_them(own, capsys):
    demo.demo(demo.DemoConfig(data="own:load", num_epochs=2))
    printed = capsys.readouterr().out
    table = printed[printed.index("SGD   ") :].splitlines()
    assert [line.split()[0] for line in table[2:5]] == ["0", "1", "2"]
    assert all(len(line.split()) == 1 + 3 * 3 for line in table[2:5])
    assert (own / "results/demo/own-load.png").exists()


def test_the_search_records_every_trial_and_the_best_of_each(own, monkeypatch, tmp_path):
    tuned = tmp_path / "configs" / "tuned.yml"
    tuned.parent.mkdir()
    tuned.write_text("# how\ndefault: {}\n")
    monkeypatch.setattr(search, "TUNED", tuned)
    grids = {
        "sgd": [{"lr": 1e30}, {"lr": 1e-12}, {"lr": 0.1}],
        "kfac": [{"lr": 1.0, "damping": 1.0, "clipping": 0.01}],
    }
    monkeypatch.setattr(search, "GRIDS", grids)
    config = search.SearchConfig(data="own:load", num_epochs=3, batch_size=8)
    trials = search.search(config)
    assert [t["optim"] for t in trials] == ["sgd", "sgd", "sgd", "kfac"]
    assert trials[0]["train_loss"] is None or trials[0]["train_loss"] > 1e6
    search.record(config, trials)
    written = json.loads((tuned.parent / "search" / "own-load.json").read_text())
    assert written["trials"] == trials and written["budget"]["num_epochs"] == 3
    assert tuned.read_text().startswith("# how\n")
    assert yaml.safe_load(tuned.read_text())["own:load"] == {"sgd": {"lr": 0.1}, "kfac": grids["kfac"][0]}


def test_tuned_settings_fall_back_to_the_default_for_other_data():
    assert trainer.tuned("CURVES", "kfac").keys() == trainer.tuned("elsewhere", "kfac").keys()


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


def test_the_mean_step_of_a_cycle_counts_each_kind_as_often_as_it_happens():
    medians = {"sgd": 2.0, "plain": 4.0, "with statistics": 10.0, "with statistics and inverses": 30.0}
    # 20 steps: 1 with inverses, 3 more with statistics, 16 plain
    assert math.isclose(benchmark.cycle(medians, 5, 20), (30 + 3 * 10 + 16 * 4) / 20 / 2)
