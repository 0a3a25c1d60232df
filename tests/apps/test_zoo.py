"""The zoo tries nets in processes of their own, goes on where it stopped, and writes its tables into a page."""

import json
import os
from dataclasses import asdict

import pytest
import torch

import fisherfn as ff
import zoo
from common.config import ConfigError, read
from common.zoo import nets, plain, table, trial

FEW = ("torch/mlp-batch-norm", "torch/mlp-bilinear")


def config(tmp_path, *more):
    argv = ["--quick", "--seconds", "0.01", "--result", str(tmp_path / "zoo.jsonl"), *more]
    return read(zoo.ZooConfig, argv)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(zoo, "QUICK", FEW)
    monkeypatch.setattr(nets, "preload", lambda: None)


def test_a_quick_run_tries_a_few_nets_and_a_rerun_none(tmp_path, quick, monkeypatch, capfd):
    results = zoo.run(config(tmp_path))
    assert {(r["name"], r["mode"]) for r in results} == {(name, mode) for name in FEW for mode in trial.MODES}
    for r in results:
        assert r["built"] and not r["error"] and r["sound"] and r["gradient_error"] < 1e-3 and r["cost"] > 1, r
        assert 0 < r["in_layers"] <= r["entries"] and sum(r["causes"].values()) == r["entries"] - r["in_layers"]
    monkeypatch.setattr(zoo, "alone", None)  # nothing is left to try
    assert zoo.run(config(tmp_path)) == results


def test_a_rerun_does_what_is_missing(tmp_path, quick, monkeypatch):
    path = tmp_path / "zoo.jsonl"
    line = json.dumps(asdict(trial.Result(FEW[0], "eval")))
    path.write_text(line + "\n" + json.dumps(asdict(trial.Result(FEW[0], "train"))) + "\n" + line[:20])
    tried = []

    def alone(name, timeout, seconds):
        tried.append(name)
        return [asdict(trial.Result(name, mode)) for mode in trial.MODES]

    monkeypatch.setattr(zoo, "alone", alone)
    assert len(zoo.run(config(tmp_path))) == 2 * len(FEW)
    assert tried == [name for name in nets.names() if name in FEW[1:]]


def test_again_tries_what_was_not_whole_and_the_newest_result_counts(tmp_path, quick, monkeypatch):
    def results(name, entries):
        return [asdict(trial.Result(name, mode, True, entries=entries, in_layers=5)) for mode in trial.MODES]

    path = tmp_path / "zoo.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [*results(FEW[0], 5), *results(FEW[1], 9)]))
    tried = []
    monkeypatch.setattr(zoo, "alone", lambda name, *_: tried.append(name) or results(name, 5))
    found = zoo.run(config(tmp_path, "--again"))
    assert tried == [FEW[1]] and len(found) == 2 * len(FEW) and all(zoo.whole(r) for r in found)


def _ends(name, seconds):
    os._exit(3)


def _hangs(name, seconds):
    while True:
        pass


@pytest.mark.parametrize(("child", "error"), [(_ends, "Crash"), (_hangs, "Timeout")])
def test_a_process_that_ends_or_hangs_is_a_result(child, error, monkeypatch):
    monkeypatch.setattr(trial, "try_net", child)
    results = zoo.alone("torch/mlp", 1, 0.01)
    assert [(r["mode"], r["error"], r["typed"], r["built"]) for r in results] == [
        (mode, error, False, False) for mode in trial.MODES
    ]


def test_an_error_of_a_net_is_a_result(monkeypatch):
    class Broken(torch.nn.Linear):
        def forward(self, x):
            raise ZeroDivisionError("broken")

    monkeypatch.setitem(plain.NETS, "broken", lambda: (Broken(2, 2), torch.randn(8, 2), 2))
    monkeypatch.setitem(plain.NETS, "noisy", lambda: (plain.Apply(torch.rand_like), torch.randn(8, 2), 2))
    broken, noisy = (trial.try_mode(f"torch/{name}", "eval", 0.01) for name in ("broken", "noisy"))
    assert (broken.error, broken.typed, broken.built) == ("ZeroDivisionError", False, False)
    assert noisy.typed and not noisy.built and noisy.cause


def results():
    first = trial.Result("torch/a", "eval", True, entries=200, in_layers=200, tensors=4, tensors_in_layers=4)
    first.sound, first.cost, first.memory, first.gradient_error = True, 2.0, 3.0, 1e-6
    second = trial.Result("torch/a", "train", True, entries=200, in_layers=100, tensors=4, tensors_in_layers=3)
    second.sound, second.cost, second.memory, second.gradient_error = True, 4.0, 5.0, 2e-4
    second.causes = {"matmul": 90, "reused": 10}
    refused = trial.Result("timm/b", "train", error="NoiseError", cause="random")
    crashed = trial.Result("timm/b", "eval", error="Crash", typed=False, cause="crash")
    return [asdict(result) for result in (first, second, refused, crashed)]


def cells(line):
    return [cell.strip(" *") for cell in line.strip("|").split("|")]


def test_the_summary_pools_entries_and_takes_medians():
    lines = table.summary(results()).splitlines()
    head, rows = cells(lines[0]), [cells(line) for line in lines[2:]]
    assert all(len(row) == len(head) for row in rows)
    by_source = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert by_source["torch"]["entries in layers"] == "75.00 %"
    assert by_source["torch"]["median cost"] == "3.0" and by_source["torch"]["median memory"] == "4.0"
    assert by_source["torch"]["largest gradient error"] == "2e-04"
    assert by_source["timm"]["built, train"] == "0.0 %" and by_source["timm"]["untyped errors"] == "1"
    assert by_source["all"]["built, eval"] == "50.0 %" and by_source["all"]["sound steps"] == "2 of 2"


def test_a_net_has_one_line_with_both_modes():
    lines = table.by_net(results()).splitlines()
    head, first, second = (cells(line) for line in (lines[0], *lines[2:]))
    first, second = (dict(zip(head, row, strict=True)) for row in (first, second))
    assert first["in layers, %"] == "100 / 50.00" and first["why not"] == "/ matmul, reused"
    assert second["why not"] == "not built: random / not built: crash" and second["cost"] == "–"


def test_the_tables_go_between_the_markers_of_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    for _ in range(2):
        zoo.write(page, results())
        text = page.read_text()
        assert text.startswith(f"before\n{table.BEGIN}\n") and text.endswith(f"\n{table.END}\nafter\n")
        assert "old" not in text and text.count("| torch |") == 1
    page.write_text("no markers")
    with pytest.raises(ConfigError, match="must hold"):
        zoo.write(page, results())


def test_names_are_known_and_quick_ones_exist():
    assert len(nets.names()) == len(set(nets.names())) >= 150
    assert set(zoo.QUICK) <= set(nets.names())
    with pytest.raises(ConfigError, match="no name"):
        zoo.chosen(zoo.ZooConfig(nets="nothing"))
    assert zoo.chosen(zoo.ZooConfig(nets="torch/cnn-, torch/mlp-b"))[0].startswith("torch/mlp-b")


def test_a_wrong_gradient_would_show():
    truth = {"w": torch.ones(3), "b": torch.tensor([1e-6])}
    assert trial.relative_error(truth, truth) == 0
    assert trial.relative_error({**truth, "w": 1.1 * torch.ones(3)}, truth) == pytest.approx(0.1)
    assert trial.relative_error({**truth, "b": torch.zeros(1)}, truth) < 1e-2  # numerical noise beside the others
    net = torch.nn.Linear(3, 2)
    model, params, context = ff.functional(net)
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    torch.nn.functional.cross_entropy(net(x), y).backward()
    found = trial.gradients(model, params, (x, y), context, ff.Categorical())
    assert trial.relative_error(found, {name: p.grad for name, p in net.named_parameters()}) < 1e-6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="reads the memory of a Linux process")
def test_peak_memory_is_that_of_the_call():
    held = []
    peak = trial.peak_bytes(lambda: held.append(torch.zeros(4_000_000)) or held.clear())
    assert peak == 0 or 14e6 < peak < 24e6
