"""Contents of the pictures: every run, both losses, both axes; and the overlays of `plot.py`."""

import errno
import json
import math

import matplotlib
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

import plot
from common.atomic import WriteError
from common.plots import PALETTE, log_ticks, loss_curves, new_figure, reconstructions


def run(losses, seconds=2.0):
    return [
        {"epoch": i, "seconds": i * seconds, "train_loss": loss, "test_loss": 2 * loss} for i, loss in enumerate(losses)
    ]


RUNS = {"SGD": run([1.0, 0.5, 0.4]), "K-FAC": run([1.0, 0.1, 0.01], seconds=3.0)}


def test_every_run_is_drawn_over_epochs_and_over_seconds(tmp_path):
    figure = loss_curves(RUNS, tmp_path / "loss.png")
    for axes, x in zip(figure.axes, ([0, 1, 2], [0, 3, 6]), strict=True):
        train, test = axes.lines[2:]  # of K-FAC
        assert len(axes.lines) == 4
        assert list(train.get_xdata()) == x and list(train.get_ydata()) == [1.0, 0.1, 0.01]
        assert list(test.get_ydata()) == [2.0, 0.2, 0.02]
        assert (train.get_linestyle(), test.get_linestyle()) == ("-", "--")
        assert to_hex(train.get_color()) == to_hex(test.get_color()) == to_hex(PALETTE[1])


def test_classifiers_have_a_panel_of_accuracies(tmp_path):
    runs = {"SGD": run([1.0, 0.5]), "K-FAC": [m | {"train_accuracy": 0.1, "test_accuracy": 0.2} for m in run([1, 1])]}
    losses, _, accuracies = loss_curves(runs, tmp_path / "loss.png").axes
    assert losses.get_ylabel() == "loss" and accuracies.get_ylabel() == "accuracy"
    assert len(losses.lines) == 4
    train, test = accuracies.lines[2:]  # SGD's have no points
    assert list(train.get_xdata()) == [0, 1] and list(train.get_ydata()) == [0.1, 0.1]
    assert list(test.get_ydata()) == [0.2, 0.2] and test.get_linestyle() == "--"
    assert [len(line.get_xdata()) for line in accuracies.lines[:2]] == [0, 0]
    assert to_hex(train.get_color()) == to_hex(losses.lines[2].get_color())


def test_the_losses_share_their_axis(tmp_path):
    losses, times = loss_curves(RUNS, tmp_path / "loss.png").axes
    assert losses.get_ylim() == times.get_ylim() and times.get_yscale() == losses.get_yscale() == "log"
    assert times.get_ylabel() == ""


def test_the_picture_is_a_png_of_150_dots_an_inch(tmp_path):
    loss_curves(RUNS, tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.format == "PNG" and image.size == (1500, 690)
        assert round(image.info["dpi"][0]) == 150


def test_the_legend_names_every_run(tmp_path):
    [legend] = loss_curves(RUNS, tmp_path / "loss.png").legends
    assert [text.get_text() for text in legend.get_texts()] == ["SGD", "K-FAC", "training", "test"]


def test_two_runs_never_look_the_same(tmp_path):
    figure = loss_curves({str(i): run([1.0, 0.5]) for i in range(20)}, tmp_path / "loss.png")
    looks = {(line.get_color(), line.get_marker()) for line in figure.axes[0].lines[::2]}
    assert len(looks) == 20


@pytest.mark.parametrize(
    ("losses", "scale"),
    [
        ([1.0, 0.1], "log"),
        ([1.0, 1e-6], "log"),
        ([1.0, 0.9], "linear"),
        ([1.0, 0.0], "linear"),
        ([1.0, -3.0], "linear"),
    ],
)
def test_losses_are_on_a_logarithmic_axis_where_that_helps(tmp_path, losses, scale):
    runs = {"run": [{"epoch": i, "seconds": i, "train_loss": loss} for i, loss in enumerate(losses)]}
    assert loss_curves(runs, tmp_path / "loss.png").axes[0].get_yscale() == scale


@pytest.mark.parametrize("losses", [[1.0, math.nan, 0.1], [math.nan], [], [1.0, math.inf]])
def test_runs_that_diverged_or_did_not_start_are_drawn_too(tmp_path, losses):
    figure = loss_curves({"run": run(losses)}, tmp_path / "loss.png")
    assert len(figure.axes[0].lines) == 2 and (tmp_path / "loss.png").stat().st_size > 0


def test_epochs_without_a_test_loss_have_no_point_on_its_line(tmp_path):
    metrics = [
        {"epoch": 0, "seconds": 0.0, "train_loss": 1.0, "test_loss": 2.0},
        {"epoch": 1, "seconds": 1.0, "train_loss": 0.5},
    ]
    train, test = loss_curves({"run": metrics}, tmp_path / "loss.png").axes[0].lines
    assert (len(train.get_xdata()), len(test.get_xdata())) == (2, 1)


def test_drawing_leaves_matplotlib_as_it_was(tmp_path):
    before = dict(matplotlib.rcParams)
    loss_curves(RUNS, tmp_path / "loss.png")
    reconstructions(torch.rand(2, 1, 4, 4), torch.rand(2, 1, 4, 4), tmp_path / "images.png")
    assert dict(matplotlib.rcParams) == before


# ------------------------------------------------------------------------------------------------- reconstructions


def test_inputs_stand_above_their_reconstructions(tmp_path):
    inputs, outputs = torch.rand(7, 1, 4, 6), torch.rand(7, 1, 4, 6)
    inputs[0, 0, 0, 0], inputs[1, 0, 0, 0] = 0.0, 1.0  # so that pixels are shown as they are
    figure = reconstructions(inputs, outputs, tmp_path / "images.png", columns=5)
    shown = [
        [axes.images[0].get_array().data if axes.images else None for axes in figure.axes[i : i + 5]]
        for i in (0, 5, 10, 15)
    ]
    for n in range(7):
        top, bottom = shown[2 * (n // 5)][n % 5], shown[2 * (n // 5) + 1][n % 5]
        torch.testing.assert_close(torch.as_tensor(top), inputs[n, 0])
        torch.testing.assert_close(torch.as_tensor(bottom), outputs[n, 0])
    assert shown[2][2:] == [None] * 3


def test_outputs_are_shown_in_the_range_of_the_inputs(tmp_path):
    inputs = torch.tensor([-1.0, 3.0]).reshape(2, 1, 1, 1)
    figure = reconstructions(inputs, torch.tensor([1.0, 9.0]).reshape(2, 1, 1, 1), tmp_path / "images.png")
    assert [float(axes.images[0].get_array().item()) for axes in figure.axes] == [0.0, 1.0, 0.5, 1.0]


def test_colours_are_kept(tmp_path):
    images = torch.rand(1, 3, 4, 4)
    images[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    figure = reconstructions(images, images, tmp_path / "images.png")
    torch.testing.assert_close(torch.as_tensor(figure.axes[0].images[0].get_array().data), images[0].movedim(0, -1))


def test_shapes_that_are_no_pairs_of_images_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"got \[2, 16\] and \[2, 16\]"):
        reconstructions(torch.rand(2, 16), torch.rand(2, 16), tmp_path / "images.png")
    with pytest.raises(ValueError, match="two equal shapes"):
        reconstructions(torch.rand(2, 1, 4, 4), torch.rand(3, 1, 4, 4), tmp_path / "images.png")


# --------------------------------------------------------------------------------------------------------- plot.py


def write(folder, losses):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in run(losses)))
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The names of the runs that plot.py draws."""
    names = []
    monkeypatch.setattr(plot, "loss_curves", lambda runs, path: (names.extend(runs), loss_curves(runs, path)))
    return names


def test_runs_are_overlaid_from_their_folders_or_their_parent(tmp_path, drawn, capsys):
    a, b = write(tmp_path / "app" / "a", [1.0, 0.5]), write(tmp_path / "app" / "b", [1.0, 0.1])
    plot.main([str(a), str(b), "--out", str(tmp_path / "out.png")])
    assert drawn == ["a", "b"] and (tmp_path / "out.png").exists()
    plot.main([str(tmp_path / "app")])
    assert drawn == ["a", "b"] * 2 and (tmp_path / "app" / "comparison.png").exists()
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "app" / "comparison.png")


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path, drawn):
    write(tmp_path / "first" / "a", [1.0]), write(tmp_path / "second" / "a", [1.0])
    plot.main([str(tmp_path / "first"), str(tmp_path / "second"), "--out", str(tmp_path / "out.png")])
    assert drawn == ["first/a", "second/a"]


def test_runs_whose_parents_have_one_name_are_told_apart_by_theirs(tmp_path, drawn):
    places = [tmp_path / machine / "train_mlp" for machine in ("one", "two")]
    write(places[0] / "a", [1.0]), write(places[1] / "a", [1.0]), write(places[1] / "b", [1.0])
    plot.main([*map(str, places), "--out", str(tmp_path / "out.png")])
    assert drawn == ["one/train_mlp/a", "two/train_mlp/a", "two/train_mlp/b"]


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "loss.png"
    loss_curves({"a": run([1.0, 0.5])}, path)
    before = path.read_bytes()

    def full(figure, file, **how):
        file.write(b"a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(WriteError, match=f"cannot write {path}: No space left on device"):
        loss_curves({"a": run([1.0, 0.2])}, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["{}/nowhere"], "there is no folder {}/nowhere: name result folders"),
        (["{}/empty"], "no results in {}/empty: name folders with a metrics.jsonl"),
        (["{}/a", "--out", "{}/nowhere/out.png"], "there is no folder {}/nowhere to put the picture in"),
        (["{}/a", "--out", "{}/a/metrics.jsonl"], "give --out a name that ends in .png, not {}/a/metrics.jsonl"),
        (["{}/a", "{}/none"], "{}/none has no epoch with a training loss: leave it out"),
        (["{}/sweep"], "{}/sweep has the many runs of a sweep: see its sweep.png, or name single runs"),
    ],
)
def test_errors_are_one_line_and_exit_with_2(tmp_path, capsys, argv, expected):
    write(tmp_path / "a", [1.0])
    (tmp_path / "empty").mkdir()
    for name, line in {"none": '{"epoch": 1, "loss": 0.1}', "sweep": '{"run": 0, "epoch": 1, "train_loss": 1}'}.items():
        write(tmp_path / name, [])
        (tmp_path / name / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(SystemExit) as caught:
        plot.main([argument.format(tmp_path) for argument in argv])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and expected.format(tmp_path) in err and err.count("\n") == 1


def test_a_logarithmic_axis_over_decades_has_few_labels():
    """Axes such as that of the colours of a sweep: a label for each of the 2, 3, … 9 would cover the next."""
    axes = new_figure(4, 4).subplots()
    axes.set_yscale("log")
    axes.set_ylim(0.03, 70)
    log_ticks(axes.yaxis, 0.03, 70)
    axes.figure.canvas.draw()
    assert not any(label.get_text() for label in axes.get_yticklabels(minor=True))
    assert {"0.1", "1", "10"} <= {label.get_text() for label in axes.get_yticklabels()}
