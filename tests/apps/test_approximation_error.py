"""The comparison of methods with the Fisher along a run: what is recorded, tabled and drawn, and what is refused."""

import json
import math
import re

import pytest
import torch
from PIL import Image

import approximation_error as app
import fisherfn as ff
from common import spectra
from common.config import parse
from common.loop import Task
from common.plots import curve_grid
from common.results import ResultExistsError
from common.runs import reported

# ------------------------------------------------------------------------------------------------------- whole runs


def config(**options):
    small = {"data": "own:load", "model": "own:autoencoder", "batch_size": 16, "lr": 0.01, "damping": 0.5}
    return app.ErrorConfig(**small | {"methods": "kfac", "quiet": True} | options)


def result(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures take longer than all the rest of a small run."""
    monkeypatch.setattr(app, "curve_grid", lambda groups, path, **_: path.write_text(groups[0][0]))


def test_a_run_leaves_its_numbers_two_pictures_and_tables(own, drawn, capsys):
    folder = app.run(config(steps=6, every=2, spectra_every=3, eigenvalues=4, methods="kfac, lanczos"))
    assert folder.relative_to("results/approximation_error").name == "own-load-own-autoencoder-0"
    whole = result(folder)
    assert [record["step"] for record in whole["records"]] == [0, 2, 3, 4, 6]
    assert [len(record["values"]) for record in whole["records"]] == [4, 1, 4, 1, 4]
    assert whole["layers"] == {"0": [1, 5, 13], "2": [1, 12, 6]}
    resolved = {"model": "own:autoencoder", "batch_size": 16, "lr": 0.01, "damping": 0.5, "fisher": "mc"}
    assert resolved.items() <= whole["config"].items()
    tables = capsys.readouterr().out.split("\n\n")
    for quantity, steps, text in zip(app.TITLES, ((3, 4, 6), (3, 6), (3, 6), (3, 6)), tables, strict=False):
        late = [r["values"][quantity]["2"]["lanczos"] for r in whole["records"] if r["step"] in steps]
        mean = whole["last_half"][quantity]["2"]["lanczos"]
        assert mean == {"value": pytest.approx(sum(late) / len(late)), "numbers": len(late), "of": len(late)}
        title, head, *_, line = text.strip().splitlines()
        assert title.startswith(app.TITLES[quantity].split("{")[0]) and head.split()[:2] == ["K-FAC", "Lanczos"]
        assert line.startswith("2 · 12×6") and line.split()[4] == f"{mean['value']:.3g}"
    for name in ("errors.png", "spectra.png"):
        with Image.open(folder / name) as image:
            assert image.format == "PNG"


def test_losses_are_reported_as_the_trainers_do_and_fall(own, undrawn):
    records = result(app.run(config(steps=40, every=20, spectra_every=0)))["records"]
    assert [len(record["values"]) for record in records] == [1, 1, 1]
    first, _, last = (record["loss"] for record in records)
    assert first == pytest.approx(math.log(2), abs=0.02)  # nats per output
    assert 0.5 < last < first - 0.03


def test_measurements_do_not_depend_on_earlier_measurements(own, undrawn):
    often, seldom, other = (
        result(app.run(config(steps=4, every=every, spectra_every=4, seed=seed, result_name=f"every {every} {seed}")))
        for every, seed in ((1, 0), (4, 0), (4, 1))
    )
    assert often["records"][4] == seldom["records"][1]
    assert seldom["records"][1]["values"] != other["records"][1]["values"]


@pytest.mark.parametrize(
    ("trainer", "model", "layers"),
    [
        ("train_mlp", "own:build", {"0", "1", "3"}),
        ("train_cnn", "own:convolutional", {"0", "1", "4"}),
        ("train_autoencoder", "own:transposed", {"0", "2"}),
    ],
)
def test_every_trainers_nets_are_compared(own, undrawn, trainer, model, layers):
    folder = app.run(config(app=trainer, model=model, steps=1, every=1, spectra_every=1, methods="kfac,kfac_cor"))
    values = result(folder)["records"][1]["values"]
    for quantity in app.TITLES:
        assert values[quantity].keys() == layers
        assert all(number is not None for numbers in values[quantity].values() for number in numbers.values())


def test_the_fisher_and_its_damping_are_as_asked_for(own, undrawn):
    options = ({}, {"fisher": "empirical"}, {"fisher": "type2"}, {"fisher_samples": 2}, {"damping_form": "eigen"})
    runs = [result(app.run(config(steps=0, overwrite=True, **each)))["records"][0]["values"] for each in options]
    errors, angles = ([run[quantity]["0"]["kfac"] for run in runs] for quantity in ("error", "angle"))
    assert len(set(errors[:4])) == 4 and errors[4] == errors[0]
    assert len(set(angles)) == 5


def test_a_run_that_is_cut_short_keeps_what_it_measured(own, undrawn, monkeypatch):
    def compare(nets, params, batch, damping, count, labels, context):
        if labels.initial_seed() > 6:  # step 3
            raise KeyboardInterrupt
        return spectra.compare(nets, params, batch, damping, count, labels, context)

    monkeypatch.setattr(app, "compare", compare)
    with pytest.raises(KeyboardInterrupt):
        app.run(config(steps=9, every=1, result_name="short"))
    assert [r["step"] for r in result(own / "results/approximation_error/short")["records"]] == [0, 1, 2]


def test_a_run_that_diverges_stops_with_the_reason(own, undrawn, capsys):
    with pytest.raises(SystemExit), reported():
        app.run(config(steps=50, every=50, lr=1e30, spectra_every=0))
    error = capsys.readouterr().err
    assert error.startswith("NonFiniteError: ") and error.count("\n") == 1


def test_a_result_is_not_overwritten_by_chance(own, undrawn):
    folder = app.run(config(steps=0, spectra_every=0))
    assert not (folder / "spectra.png").exists()
    with pytest.raises(ResultExistsError, match="--overwrite"):
        app.run(config(steps=0))
    app.run(config(steps=0, overwrite=True))
    assert (folder / "spectra.png").read_text().startswith("Relative ℓ2 error of the 50 leading")
    app.run(config(steps=0, spectra_every=0, overwrite=True))
    assert not (folder / "spectra.png").exists(), "of an earlier run"


def test_overwriting_spares_folders_that_are_no_results(own, undrawn):
    notes = own / "results/approximation_error/notes/result.json"
    notes.parent.mkdir(parents=True)
    for content in ('{"my": "notes"}', "[]", "{"):
        notes.write_text(content)
        with pytest.raises(ResultExistsError, match=r"has no result.json of this program in it: it is not overwritten"):
            app.run(config(steps=0, result_name="notes", overwrite=True))
        assert notes.read_text() == content and len(list(notes.parent.iterdir())) == 1


def test_an_empty_folder_of_a_killed_run_can_be_overwritten(own, undrawn):
    (own / "results/approximation_error/killed").mkdir(parents=True)
    assert result(app.run(config(steps=0, result_name="killed", overwrite=True)))["records"]


def test_a_folder_that_cannot_be_made_is_an_error_before_the_measurements(own, monkeypatch):
    (own / "results").touch()
    monkeypatch.setattr(app, "measurements", lambda *_: pytest.fail("measured in vain"))
    with pytest.raises(OSError, match="results"):
        app.run(config(steps=0))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--methods=kfac,kfax", "methods must be comma-separated names from kfac, kpsvd, .*, got kfac,kfax"),
        ("--methods=exactNG", "methods must be comma-separated names from"),
        ("--every=0", "every must be > 0, got 0"),
        ("--spectra_every=-1", "spectra_every must be >= 0"),
        ("--eigenvalues=0", "eigenvalues must be from 1 to 200, got 0"),
        ("--damping=0", "damping must be > 0"),
        ("--damping_form=both", "damping_form must be one of factored, eigen"),
        ("--fisher=true", "fisher must be one of mc, type2, empirical"),
        ("--result_name=a/b", "result_name must be a folder's name"),
        ("--result_name=..", "result_name must be a folder's name"),
        ("--app=train_gan", "app must be one of train_mlp"),
        ("--step=3", "unknown option --step; did you mean --steps"),
    ],
)
def test_a_bad_option_is_one_line(argument, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(app.ErrorConfig, [argument], description=None)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert re.search(message, error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fisher_samples": 600}, "9,600 columns"),
        ({"data": "CURVE"}, "data must be one of .*did you mean CURVES"),
        ({"model": "own:nothing"}, "own"),
    ],
)
def test_invalid_comparisons_raise_before_anything_is_written(own, options, message):
    with pytest.raises(ff.FisherfnError, match=message):
        app.run(config(**options))
    assert not (own / "results").exists()


# ------------------------------------------------------------------------------------------------- batches and means


def test_batches_are_of_one_size_and_an_epoch_repeats_nothing():
    x = torch.arange(10.0)
    task = Task(None, None, {}, {}, ff.Bernoulli(), (x, -x), (x, x), 1)
    drawn = [pair for pair, _ in zip(app.batches(task, 4, seed=0), range(4), strict=False)]
    assert all(len(x) == 4 and torch.equal(y, -x) for x, y in drawn)
    epochs = [torch.cat([drawn[i][0], drawn[i + 1][0]]).tolist() for i in (0, 2)]
    assert all(len(set(epoch)) == 8 for epoch in epochs) and epochs[0] != epochs[1]
    assert len(next(app.batches(task, 99, seed=0))[0]) == 10


def record(step, kfac, lanczos):
    return app.Record(step, 1.0, {"error": {"0": {"kfac": kfac, "lanczos": lanczos}}})


def test_means_are_of_the_last_half_and_of_the_numbers_that_there_are():
    records = [record(0, 9.0, 9.0), record(4, 9.0, 9.0), record(5, 1.0, math.nan), record(10, 3.0, 0.5)]
    records.append(app.Record(12, 1.0, {}))
    means = app.last_half(records, "error")
    assert means == {"0": {"kfac": (2.0, 2, 2), "lanczos": (0.5, 1, 2)}}
    head, line = app.table(means, {"0": "0 · 2×3"}).splitlines()
    assert head.split() == ["K-FAC", "Lanczos"]
    assert line == "0 · 2×3      2  0.5 (1 of 2)"


def test_nothing_at_all_is_a_dash_and_null():
    means = app.last_half([record(0, math.nan, 1.0)], "error")
    assert app.table(means, {"0": "0"}).splitlines()[1].split() == ["0", "–", "(0", "of", "1)", "1"]
    assert app.plain(means)["0"]["kfac"] == {"value": None, "numbers": 0, "of": 1}


# -------------------------------------------------------------------------------------------------------- the picture


def grid(path, *panels, log=True):
    named = {f"layer {i}": curves for i, curves in enumerate(panels)}
    figure = curve_grid([("Error", named)], path / "grid.png", log=[log], strokes={"Lanczos": "--"}, columns=2)
    return figure.subfigs[0].axes


def test_every_layer_has_a_panel_with_every_method(tmp_path):
    axes = grid(tmp_path, *[{"K-FAC": [(0, 0.5), (2, 1.0)], "Lanczos": [(0, 0.1), (2, 0.02)]}] * 3)
    assert [a.get_visible() for a in axes] == [True, True, True, False]
    assert [a.get_title(loc="left") for a in axes[:3]] == ["layer 0", "layer 1", "layer 2"]
    assert [a.get_xlabel() for a in axes[:3]] == ["", "step", "step"]  # below every column
    for panel in axes[:3]:
        kfac, lanczos = panel.lines
        assert list(kfac.get_xdata()) == [0, 2] and list(kfac.get_ydata()) == [0.5, 1.0]
        assert list(lanczos.get_ydata()) == [0.1, 0.02] and lanczos.get_linestyle() == "--"
    [legend] = axes[0].figure.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["K-FAC", "Lanczos"]
    colours = [[line.get_color() for line in lines] for lines in (axes[0].lines, legend.get_lines())]
    assert colours[0] == colours[1] and len(set(colours[0])) == 2


def test_axes_are_logarithmic_where_it_helps(tmp_path):
    wide, narrow = {"K-FAC": [(0, 0.5), (1, 0.001), (2, 0.0)]}, {"K-FAC": [(0, 0.5), (1, 0.4)]}
    axes = grid(tmp_path, wide, narrow, {"K-FAC": [(0, math.nan)]})
    assert [a.get_yscale() for a in axes[:3]] == ["log", "linear", "linear"]
    assert math.isnan(axes[0].lines[0].get_ydata()[2])  # a zero is rounding: a gap, not a fall


def test_points_are_marked_where_they_are_few_or_alone(tmp_path):
    few, many = [(step, 1.0) for step in range(20)], [(step, 1.0) for step in range(30)]
    for gap in (0, 2, 10, 12, 28):
        many[gap] = (gap, math.nan)
    axes = grid(tmp_path, {"K-FAC": few}, {"K-FAC": many})
    assert [panel.lines[0].get_markevery() for panel in axes[:2]] == [list(range(20)), [1, 11, 29]]


def test_axes_that_are_not_are_shared_and_start_at_zero(tmp_path):
    first, second, *_ = grid(tmp_path, {"K-FAC": [(0, 20.0), (1, 40.0)]}, {"K-FAC": [(0, 80.0)]}, log=False)
    assert first.get_ylim() == second.get_ylim() and first.get_ylim()[0] == 0 and first.get_ylim()[1] > 80
