"""The comparison with tuned baselines: its runs, its records, and what its tables say."""

import dataclasses
import json
import math

import pytest
import torch

import compare
import fisherfn as ff
import fisherfn.compiled as compiled
from common import study, study_report
from common.baselines import BASELINES, baseline
from common.config import ConfigError
from common.data import load
from common.loop import Settings, start, train
from common.optimizers import adam, sgd
from common.study import TITLES, Net, Run
from common.train_config import TrainConfig
from common.trainer import make_optimizer, make_task

RATES = {"sgd": -3, "adam": -6, "adamw": -6, "soap": -6}


@pytest.fixture
def tiny(monkeypatch):
    """One net that trains in a second, two rates per baseline."""
    monkeypatch.setitem(study.NETS, "TINY", Net("train_mlp", "DIGITS", "ToyNet", 1, RATES, 256, title="tiny net"))
    monkeypatch.setattr(compare, "RATES", 2)


def config(tmp_path, **more):
    return compare.CompareConfig(nets="TINY", folder=str(tmp_path / "records"), threads=1, seeds=2, **more)


def test_search_repeat_race_and_report(tmp_path, tiny, capsys, monkeypatch):
    page = tmp_path / "page.md"
    tables = [f"<!-- table: {name} -->\nold\n<!-- end of table -->\n" for name in ("compare", "endure")]
    page.write_text("Before.\n" + "".join(tables) + "After.\n")
    asked = config(tmp_path, optims="adam,kfac", phases="search,repeat,race,report", page=str(page))
    compare.main(asked)
    runs = study.read(tmp_path / "records" / "TINY.jsonl")
    kinds = [(run.optim, run.lr, run.schedule, run.seed, run.kind) for run in runs]
    chosen = study.best([run for run in runs if run.optim == "adam" and run.seed == 0 and not run.kind])
    assert kinds[:4] == [("adam", lr, kind, 0, "") for lr in (0.01, 0.004642) for kind in ("constant", "cosine")]
    settings = (chosen.lr, chosen.schedule)
    assert kinds[4:7] == [("kfac", None, None, 0, ""), ("adam", *settings, 1, ""), ("kfac", None, None, 1, "")]
    assert [kind[-2:] for kind in kinds[7:]] == [(0, "plain"), (0, "plain"), (1, "plain"), (1, "plain")]
    text = page.read_text()
    assert text.startswith("Before.\n") and text.endswith("After.\n") and "old" not in text
    assert "**tiny net**" in text and "| Adam " in text and "| K-FAC     | none " in text
    assert (tmp_path / "images" / "compare.png").exists()
    assert not (tmp_path / "images" / "compare_methods.png").exists()
    assert "TINY adam lr 0.01 constant seed 0" in capsys.readouterr().out

    def again(*_):
        raise AssertionError("what is recorded is not run again")

    monkeypatch.setattr(compare, "execute", again)
    compare.main(asked)


def test_a_run_of_twice_the_length_is_the_repeat_too_and_short_runs_end_where_they_should(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(compare, "SHORT", 5)
    for module in (study_report, compare):
        monkeypatch.setattr(module, "BATCHES", (300, 1000))
    asked = config(tmp_path, optims="adam,kfac", phases="endure")
    compare.main(asked)
    repeated = config(tmp_path / "other", optims="kfac", phases="repeat")
    compare.main(repeated)
    runs = {run.key[1:]: run for run in study.read(tmp_path / "records" / "TINY.jsonl")}
    again = {run.key[1:]: run for run in study.read(tmp_path / "other" / "records" / "TINY.jsonl")}
    kinds = [("kfac", None, None, seed, kind) for seed in (0, 1) for kind in ("twice", "")]
    assert list(runs) == [*kinds, *(("kfac", None, None, 0, f"batch {size}") for size in (300, 1000))]
    for seed in (0, 1):
        key = ("kfac", None, None, seed, "")
        losses = [[point[::2] for point in side[key].points] for side in (runs, again)]
        assert losses[0] == losses[1] and len(losses[0]) == 2
        twice = runs["kfac", None, None, seed, "twice"].points
        assert [point[::2] for point in twice[:2]] == losses[0] and twice[2][0] == 2 * twice[1][0]
    examples = len(load("DIGITS").train[0])
    for size in (300, 1000):
        run = runs["kfac", None, None, 0, f"batch {size}"]
        per_epoch = math.ceil(examples / size)
        assert [point[0] for point in run.points] == [*range(0, 5, per_epoch), 5]
        assert run.stopped == "reached" and run.points[-1][2] < run.points[0][2]
    text = study_report.endurance({"TINY": list(runs.values())})
    cells = [[cell.strip() for cell in line.split("|")[3:6]] for line in text.splitlines()[2:]]
    whole = ["of the trainer", "2"]
    assert cells == [[*whole, "6"], [*whole, "12"], ["300", "1", "5"], ["1000", "1", "5"]]


def test_methods_are_drawn_where_a_net_has_several_of_them(tmp_path):
    def run(optim, kind=""):
        return Run("MNIST", optim, None, None, 0, kind=kind, points=[(0, 0.0, 1.0, 1.0), (2, 1.0, 0.5, 0.5)])

    one = {"MNIST": [run("kfac"), run("adam"), run("lanczos", "batch 32")]}
    study_report.methods(one, tmp_path / "methods.png")
    assert not list(tmp_path.iterdir())
    two = {"MNIST": [*one["MNIST"], run("exactNG")], "FACES": one["MNIST"]}
    assert study_report.drawn(["lanczos", "exactNG", "kfac", "sgd"], two) == ["exactNG", "kfac"]
    study_report.methods(two, tmp_path / "methods.png")
    assert (tmp_path / "methods.png").exists()


def test_methods_are_compared_on_one_seed_and_the_other_seeds_of_a_study_are_fainter(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(study_report, "save_figure", lambda figure, path: figures.append(figure))
    seeds = [Run("MNIST", "kfac", None, None, s, points=[(0, 0.0, 1.0, 1.0), (2, 1.0, 0.5, 0.5)]) for s in (1, 0, 2)]
    other = seeds[1]._replace(optim="exactNG")
    study_report.methods({"MNIST": [*seeds, other]}, tmp_path / "methods.png")
    study_report.picture({"CURVES": seeds}, tmp_path / "compare.png")  # no baseline: nothing to compare with
    adam = seeds[1]._replace(optim="adam", lr=0.1, schedule="cosine")
    study_report.picture({"CURVES": seeds, "MNIST": [*seeds, adam]}, tmp_path / "compare.png")
    methods, study = (figure.axes[0].lines for figure in figures)
    assert len(methods) == 2
    assert sorted(line.get_alpha() for line in study) == [0.3, 0.3, 1.0, 1.0] and len(figures[1].axes) == 2


def test_the_table_begins_with_the_baselines():
    assert list(TITLES)[: len(BASELINES)] == list(BASELINES)
    assert TITLES.keys() == {*BASELINES, *ff.METHODS}


def test_endings_name_what_failed_and_who_still_learns():
    def run(losses, **more):
        return Run(
            "MNIST", "kfac", None, None, 0, points=[(2 * i, 0.0, loss, 0) for i, loss in enumerate(losses)], **more
        )

    ends = study_report.ending(
        [run([1, 0.5, 0.4, 0.3, 0.2]), run([1, 0.5, 0.1, 0.1, 0.15]), run([1, 2], stopped="diverged")]
    )
    assert ends == ["of the trainer", "3", "8", "1.000", "0.1500 to 0.2000, 1 failed", "1 of 3"]
    assert study_report.ending([run([1, 0.5], kind="batch 32")])[:1] == ["32"]


def test_a_race_does_not_count_its_evaluations_and_ends_at_the_target(monkeypatch):
    clock, losses = [0.0], iter([0.9, 0.55, 0.45, 0.3])

    def evaluated(task, snapshot, data):
        clock[0] += 10.0
        return next(losses), None

    monkeypatch.setattr(compare, "evaluate", evaluated)
    monkeypatch.setattr(compare.time, "perf_counter", lambda: clock[0])
    data = load("DIGITS")
    task, _ = make_task(TrainConfig(data="DIGITS", model="ToyNet"), data)
    begin = start(task, sgd(task.model, task.likelihood, lr=0.1))
    race = compare.Race(task, [], target=0.4, steps=8)

    def step(number):
        clock[0] += 1.0
        race.watch(number, lambda: begin._replace(step=number, seconds=clock[0]))

    for number in range(1, 7):
        step(number)
    with pytest.raises(compare.Reached):
        step(7)  # close to the target after every step
    assert [point[:3] for point in race.points] == [(2, 2.0, 0.9), (4, 4.0, 0.55), (6, 6.0, 0.45), (7, 7.0, 0.3)]


def test_the_best_trial_is_the_lowest_that_ended():
    trials = [Run("MNIST", "adam", lr, "cosine", 0, points=[(1, 1.0, loss, loss)]) for lr, loss in ((1, 0.3), (2, 0.2))]
    diverged = Run("MNIST", "adam", 3, "cosine", 0, points=[(1, 1.0, 0.1, 0.1)], stopped="diverged")
    assert study.best([*trials, diverged]).lr == 2
    assert compare.winner("MNIST", "adam", [*trials, diverged]).key == ("MNIST", "adam", 2, "cosine", 0, "")


def test_a_truncated_record_is_ignored(tmp_path):
    path = tmp_path / "NET.jsonl"
    whole = Run("MNIST", "adam", 0.1, "cosine", 0, points=[(1, 0.5, math.nan, 2.0)])
    study.write(path, whole)
    with path.open("a") as file:
        file.write('{"net": "MNIST", "op')
    study.write(path, whole._replace(seed=1))
    found, other = study.read(path)
    assert found.key == whole.key and other.seed == 1 and found.loss == math.inf
    assert found.points[0][::3] == (1.0, 2.0) and math.isnan(found.points[0][2])


@pytest.mark.parametrize("optim", ["sgd", "adam"])
def test_a_baseline_is_the_pure_optimizer_and_its_schedule_ends_at_zero(optim):
    data = load("DIGITS")
    full = TrainConfig(data="DIGITS", model="ToyNet", batch_size=512, optim=optim)
    pure = {"sgd": sgd, "adam": adam}[optim]
    task, net = make_task(full, data)
    own = pure(task.model, task.likelihood, lr=0.01)
    plain = list(train(task, own, start(task, own), Settings(2, 512)))
    given = {"lr": 0.01, "steps": 2 * math.ceil(len(task.train[0]) / 512)}
    for schedule in ("constant", "cosine"):
        task, net = make_task(full, data)
        own = baseline(net, task.likelihood, optim, schedule=schedule, **given)
        last = [epoch.metrics["train_loss"] for epoch in train(task, own, start(task, own), Settings(2, 512))]
        if schedule == "constant":
            assert last == pytest.approx([epoch.metrics["train_loss"] for epoch in plain], rel=1e-5)
        else:
            assert last[-1] > plain[-1].metrics["train_loss"], "smaller steps get less far in two epochs"
            before = {name: leaf.detach().clone() for name, leaf in net.named_parameters()}
            own.step(before, (), task.train, {}, (), given["steps"])
            for name, leaf in net.named_parameters():
                torch.testing.assert_close(leaf.detach(), before[name], rtol=0, atol=1e-9)


def test_ratios_compare_seeds_with_the_same_seed_of_adam():
    def run(optim, seed, losses, **more):
        points = [(step, 2.0 * step, loss, loss) for step, loss in enumerate(losses)]
        lr, schedule = (None, None) if optim == "kfac" else (0.1, "cosine")
        return Run("MNIST", optim, lr, schedule, seed, points=points, **more)

    runs = [run("adam", 0, [1, 0.9, 0.8, 0.7, 0.5]), run("adam", 1, [1, 0.9, 0.8, 0.7, 0.3])]
    kfac = [run("kfac", 0, [1, 0.5, 0.4]), run("kfac", 1, [1, 0.5, 0.4])]
    assert study_report.in_steps(runs + kfac, kfac) == "not reached (0.25 to –)"
    assert study_report.ratio([math.inf, math.inf]) == "not reached"
    assert study_report.in_steps(runs + kfac, kfac[:1]) == "0.25"
    race = [run("adam", 0, [1, 0.5], kind="plain"), run("kfac", 0, [1, 0.8, 0.5], kind="plain", stopped="reached")]
    assert study_report.in_time(race, "kfac", "plain") == [2.0]
    assert study_report.in_time(race, "kfac", "compiled") == []


def test_the_ratio_with_compiling_counts_only_races_that_began_by_compiling():
    def race(optim, seed, seconds, warm, stopped):
        points = [(0, 0.0, 1.0, 1.0), (8, seconds, 0.5, 0.5)]
        return Run("MNIST", optim, None, None, seed, "compiled", points, stopped, warm=warm)

    runs = [race("adam", 0, 10.0, 2.0, ""), race("adam", 1, 10.0, 0.03, "")]
    runs += [race("kfac", 0, 4.0, 20.0, "reached"), race("kfac", 1, 5.0, 0.0, "reached")]
    assert study_report.in_time(runs, "kfac", "compiled") == [0.4, 0.5]
    assert study_report.with_compiling(runs, "kfac") == "2.00; 20 s"
    assert study_report.with_compiling(runs[1:2], "adam") == ""


def test_a_whole_run_of_each_seed_counts_once_and_only_a_baselines_race_is_whole():
    def run(optim, seed, kind, loss):
        lr, schedule = (None, None) if optim == "kfac" else (0.1, "cosine")
        return Run("MNIST", optim, lr, schedule, seed, kind=kind, points=[(1, 1.0, loss, loss)])

    adam = [
        run("adam", 0, "plain", 1),
        run("adam", 0, "", 2),
        run("adam", 1, "plain", 3),
        run("adam", 2, "compiled", 4),
    ]
    kfac = [run("kfac", 0, "", 5), run("kfac", 1, "plain", 6), run("kfac", 2, "twice", 7)]
    assert [each.loss for each in study_report.repeats(adam, adam[1].fresh())] == [2, 3]
    soap = [run("soap", 0, "", 8), run("soap", 1, "plain", 9)]  # a race that ends at Adam's loss
    assert [each.loss for each in study_report.repeats(kfac, kfac[0].fresh())] == [5]
    assert [each.loss for each in study_report.repeats(soap, soap[0].fresh())] == [8]


def test_adam_races_first_and_all_others_to_its_loss(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(compare, "target_of", lambda run, config: math.inf)
    compare.main(config(tmp_path, optims="sgd,adam,kfac", phases="search,race"))
    runs = study.read(tmp_path / "records" / "TINY.jsonl")
    raced = [(run.seed, run.optim, run.stopped) for run in runs if run.kind == "plain"]
    order = (("adam", ""), ("sgd", "reached"), ("kfac", "reached"))
    assert raced == [(seed, *ended) for seed in (0, 1) for ended in order]


def test_a_search_in_which_nothing_ended_has_no_winner(tmp_path, capsys):
    nothing = Run("TINY", "adam", 0.1, "cosine", 0, points=[(0, 0.0, 1.0, 1.0)], stopped="diverged")
    assert study.best([nothing]) is None and compare.winner("TINY", "adam", [nothing]) is None
    assert "no run ended" in study_report.of_net([nothing])
    json.dumps(nothing._asdict())


def test_a_compiled_race_compiles_a_natural_gradient_once_for_all_seeds(tmp_path, tiny, monkeypatch):
    built, make = [], compare.make_optimizer

    def uncompiled(full, task):
        built.append(full.seed)
        return make(dataclasses.replace(full, compile=False), task)

    monkeypatch.setattr(compare, "make_optimizer", uncompiled)
    monkeypatch.setattr(compare, "warmed", lambda *_: 5.0)
    monkeypatch.setattr(compare, "target_of", lambda run, config: 0.0)
    asked = config(tmp_path, optims="kfac", phases="race", compile=True)
    compare.main(asked)
    first, second = study.read(tmp_path / "records" / "TINY.jsonl")
    assert built == [0] and (first.warm, second.warm) == (5, 0)
    assert first.points[-1][2] != second.points[-1][2]
    again = compare.execute(second.fresh(), study.NETS["TINY"], asked, ready={})
    own, shared = ([point[2] for point in run.points] for run in (again, second))
    assert own == pytest.approx(shared, rel=1e-6) and built == [0, 1]


@pytest.mark.parametrize("wrong", [{"nets": "MNISTT"}, {"optims": "adm"}, {"phases": "serch"}])
def test_unknown_names_are_refused(wrong):
    with pytest.raises(ConfigError, match="must be among"):
        compare.main(compare.CompareConfig(**wrong))


def test_a_warm_optimizer_has_nothing_left_to_compile(monkeypatch):
    graphs, traced = [], compiled._traced

    def counted(fn, given, tensors, options):
        graphs.append(fn)
        return traced(fn, given, tensors, {**options, "backend": "eager"})

    monkeypatch.setattr(compiled, "_traced", counted)
    data = load("DIGITS")
    full = TrainConfig(data="DIGITS", model="ToyNet", optim="sgd", lr=0.1, compile=True, batch_size=400)
    task, _ = make_task(full, data)
    optimizer = make_optimizer(full, task)
    compare.warmed(optimizer, task, full)
    before = len(graphs)
    assert before == 1  # for whole batches; the last one runs uncompiled
    for _ in train(task, optimizer, start(task, optimizer), Settings(2, full.batch_size, 0, progress=False)):
        pass
    assert len(graphs) == before
