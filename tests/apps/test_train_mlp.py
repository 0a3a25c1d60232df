"""The trainer as a person runs it: results, resume, one's own model and data, and errors that leave nothing behind."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fisherfn as ff
from common import runs
from common.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from common.config import ConfigError, read
from common.data import load
from common.results import read_metrics
from common.runs import save, watched
from common.train_config import TrainConfig
from common.trainer import make_task, natural_gradient, run
from tests.apps.options import cadence, safe
from tests.methods.protocol import TRAINED

ROOT = Path(__file__).parents[2]


def configured(*more: str) -> TrainConfig:
    common = ["--data", "own:load", "--batch_size", "10", "--num_epochs", "3", "--quiet"]
    lr = ["--lr", "0.01" if "adam" in more else "0.1"]
    return read(TrainConfig, [*common, *lr, *cadence(more), *more])


def quiet_run(*more: str) -> Path:
    return run(configured(*more))


@pytest.mark.parametrize("optim", ["sgd", "adam", *TRAINED])
def test_every_optimizer_trains_leaves_a_whole_result_and_resumes_exactly(own, optim):
    straight = quiet_run("--optim", optim, *safe(optim), "--result_name", "straight")
    assert straight == Path("results/train_mlp/straight")
    metrics = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert [m["epoch"] for m in metrics] == [0, 1, 2, 3]
    assert all({"epoch", "train_loss", "test_loss", "seconds"} <= set(m) for m in metrics)
    assert metrics[-1]["train_loss"] < metrics[0]["train_loss"]
    assert metrics[-1]["step"] == 3 * 4  # 32 examples, batches of 10: the short last one counts
    assert {path.name for path in straight.glob("*.png")} == {"loss.png"}
    quiet_run("--optim", optim, *safe(optim), "--result_name", "parts", "--num_epochs", "1")
    parts = quiet_run("--optim", optim, *safe(optim), "--result_name", "parts", "--num_epochs", "3", "--resume")
    one, two = (load_checkpoint(folder / "checkpoint.pt")[0] for folder in (straight, parts))
    assert one.keys() == two.keys() and all(torch.equal(one[path], two[path]) for path in one)
    assert [m["train_loss"] for m in read_metrics(parts)] == [m["train_loss"] for m in metrics]


@pytest.mark.parametrize("model", ["own:build", "own:autoencoder"])
def test_the_configuration_of_a_result_gives_the_same_run(own, drawn, model):
    folder = quiet_run("--model", model, "--optim", "kfac", *safe("kfac"), "--result_name", "x")
    losses = [m["train_loss"] for m in read_metrics(folder)]
    assert losses[-1] < losses[0]
    assert (folder / "reconstructions.png").exists() == ("autoencoder" in model)
    again = read(TrainConfig, ["--config", str(folder / "config.yaml"), "--result_name", "again", "--quiet", "true"])
    assert [m["train_loss"] for m in read_metrics(run(again))] == losses


@pytest.mark.parametrize("optim", ["kfac", "twolevel_kfac"])
def test_a_run_that_ended_in_the_middle_of_an_epoch_goes_on_as_the_straight_one(own, optim, monkeypatch):
    """Killed after the seventh step, of which the sixth is on the disk."""
    common = ("--optim", optim, "--damping", "1", "--kl_bound", "0.1", "--save_every", "3")
    straight = quiet_run(*common, "--result_name", "straight")

    def killed(results, save_every, signals, step, at):
        watched(results, save_every, signals, step, at)
        if step == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "watched", killed)
        with pytest.raises(KeyboardInterrupt):
            quiet_run(*common, "--result_name", "parts")
    assert load_checkpoint(own / "results/train_mlp/parts/checkpoint.pt")[1]["step"] == 6
    parts = quiet_run(*common, "--result_name", "parts", "--resume")
    one, two = (load_checkpoint(folder / "checkpoint.pt")[0] for folder in (straight, parts))
    assert all(torch.equal(one[path], two[path]) for path in one)
    lines = [[(m["epoch"], m["step"], m["train_loss"]) for m in read_metrics(folder)] for folder in (straight, parts)]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("last", [1, 2])
def test_a_run_that_ended_between_the_metrics_and_the_checkpoint_has_each_line_once(own, monkeypatch, last):
    """After epoch 1 the checkpoint is the starting point, whose line is in the file already."""
    common = ("--optim", "sgd", "--result_name", "one")
    saved = []

    def killed(results, snapshot):
        if snapshot.epoch == last:
            raise KeyboardInterrupt
        saved.append(snapshot.epoch) or save(results, snapshot)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            quiet_run(*common)
    folder = own / "results/train_mlp/one"
    assert saved == [*range(last)] and [m["epoch"] for m in read_metrics(folder)] == [*range(last + 1)]
    quiet_run(*common, "--resume")
    assert [m["epoch"] for m in read_metrics(folder)] == [0, 1, 2, 3]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_with_its_code(own, number):
    args = ("--data", "own:load", "--num_epochs", "100000", "--optim", "kfac", "--damping", "1", "--kl_bound", "0.1")
    script = str(ROOT / "apps" / "train_mlp.py")
    process = subprocess.Popen(
        [sys.executable, script, *args, "--result_name", "one", "--quiet", "true"], cwd=own, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    path = own / "results/train_mlp/one/checkpoint.pt"
    while not path.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 128 + number, printed
    assert number.name in printed and "--resume" in printed
    epochs = load_checkpoint(path)[1]["epoch"] + 1
    done = command(*args[:2], "--num_epochs", str(epochs), *args[4:], "--result_name", "one", "--resume", cwd=own)
    assert done.returncode == 0, done.stderr


def test_the_same_seed_is_the_same_run_whoever_loads_the_data(own):
    folders = [
        quiet_run("--optim", "lanczos", "--damping", "1", "--kl_bound", "0.1", "--num_workers", workers,
                  "--result_name", f"run{index}")
        for index, workers in enumerate(("0", "0", "2"))
    ]  # fmt: skip
    first, *others = (load_checkpoint(folder / "checkpoint.pt")[0] for folder in folders)
    for other in others:
        assert all(torch.equal(first[path], other[path]) for path in first)


def test_a_diverged_run_stops_with_the_reason(own):
    with pytest.raises(ff.errors.NonFiniteError, match="diverged"):
        quiet_run("--model", "own:autoencoder", "--optim", "sgd", "--lr", "1e30", "--num_epochs", "9")


def command(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "apps" / "train_mlp.py")
    return subprocess.run([sys.executable, script, *args], capture_output=True, text=True, cwd=cwd, check=False)


def test_the_command_line_says_where_everything_is(own):
    done = command("--data", "own:load", "--num_epochs", "1", "--optim", "sgd", "--lr", "0.1", cwd=own)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert "results/train_mlp/" in last and "metrics.jsonl" in last


@pytest.mark.parametrize(
    ("args", "code", "parts"),
    [
        (["--optim", "kfca"], 2, ["kfca", "kfac"]),
        (["--data", "MNITS"], 2, ["MNITS", "MNIST"]),
        (["--bach_size", "3"], 2, ["bach_size", "batch_size"]),
        (["--damping", "-1"], 2, ["damping", ">= 0", "-1"]),
        (["--data", "MNIST", "--data_path", "nowhere"], 1, ["train-images", "nowhere"]),
        (["--data", "own:load", "--model", "own:missing"], 1, ["missing"]),
        (["--data", "own:load", "--device", "nonsense"], 1, ["nonsense", "--device cpu"]),
    ],
)
def test_bad_input_is_one_readable_error_and_no_result(own, args, code, parts):
    done = command(*args, cwd=own)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert all(part in done.stderr for part in parts), done.stderr
    assert not (own / "results").exists()


def test_an_existing_name_is_refused_unless_overwritten(own):
    args = ("--data", "own:load", "--num_epochs", "1", "--optim", "sgd", "--lr", "0.1", "--result_name", "one")
    assert command(*args, cwd=own).returncode == 0
    before = (own / "results/train_mlp/one/metrics.jsonl").read_text()
    refused = command(*args, cwd=own)
    assert refused.returncode == 1 and "--overwrite" in refused.stderr
    assert (own / "results/train_mlp/one/metrics.jsonl").read_text() == before
    assert command(*args, "--overwrite", cwd=own).returncode == 0


@pytest.mark.parametrize(
    ("args", "method"),
    [
        ("--optim exactNG --structure block", lambda: ff.exact("block")),
        ("--optim ekfac --damping_form eigen", lambda: ff.ekfac("eigen")),
        (
            "--optim twolevel_kfac --coarse_space residual --krylov 1",
            lambda: ff.two_level(coarse="residual", krylov=True, form="balanced"),
        ),
        ("--optim twolevel_kfac --coarse_space tpselepedis", lambda: ff.two_level(coarse="tselepidis")),
    ],
)
def test_a_methods_options_reach_it(own, args, method):
    config = configured(*args.split(), "--damping", "1", "--kl_bound", "0.1")
    task, _ = make_task(dataclasses.replace(config, model="own:build"), load("own:load"))
    x, y = task.train[0][:10], task.train[1][:10]
    steps = []
    for chosen in (natural_gradient(config, task).method, method()):
        ng = ff.natural_gradient(
            task.model, task.params, x, likelihood=task.likelihood, method=chosen, fisher="type2", context=task.context
        )
        state = ng.init(task.params, damping=0.1)
        steps.append(ng.step(task.params, state, (x, y), context=task.context)[0])
    assert all(torch.equal(a, b) for a, b in zip(steps[0].values(), steps[1].values(), strict=True))


def test_exact_type_2_through_the_model_is_the_factorised_run(own):
    """With enough conjugate-gradient steps."""
    common = ("--model", "own:autoencoder", "--optim", "exactNG", "--fisher", "type2", "--damping", "1", "--kl_bound",
              "0.1", "--update_every", "1", "--invert_every", "1")  # fmt: skip
    direct = quiet_run(*common, "--result_name", "direct")
    implicit = quiet_run(*common, "--cg_steps", "60", "--result_name", "implicit")
    losses = [[m["train_loss"] for m in read_metrics(folder)] for folder in (direct, implicit)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0][-1] < losses[0][0]
    assert losses[1] != losses[0]


@pytest.mark.parametrize("args", ["--structure block", "--fisher mc", "--optim kfac", "--optim sgd"])
def test_conjugate_gradients_where_there_are_none_are_refused(own, args):
    common = ("--optim", "exactNG", "--fisher", "type2", "--damping", "1", "--kl_bound", "0.1", "--cg_steps", "5")
    with pytest.raises(ConfigError, match="no option of sgd" if args == "--optim sgd" else "cg_steps"):
        quiet_run(*common, *args.split(), "--result_name", "refused")
    assert not (own / "results").exists()


def test_an_option_of_another_method_is_refused(own):
    done = command("--data", "own:load", "--optim", "kfac", "--structure", "block", cwd=own)
    assert done.returncode == 1 and "structure is no option of kfac" in done.stderr
    assert not (own / "results").exists()


def test_a_checkpoint_from_before_examples_were_counted_is_refused_with_a_remedy(own):
    arguments = ["--model", "own:build", "--optim", "kfac", "--result_name", "x", "--damping", "1"]
    path = quiet_run(*arguments) / "checkpoint.pt"
    tensors, meta = load_checkpoint(path)
    older = {name: tensor for name, tensor in tensors.items() if not name.endswith("/examples")}
    assert len(older) == len(tensors) - 1
    save_checkpoint(path, older, meta)
    with pytest.raises(CheckpointError, match=r"start again with --overwrite.*missing .*examples"):
        quiet_run(*arguments, "--num_epochs", "4", "--resume")
    assert quiet_run(*arguments, "--overwrite") == path.parent


def test_a_run_whose_steps_are_all_rejected_ends_with_an_error(own):
    given = ("--optim", "kfac", "--lr", "1e6", "--damping", "0", "--model", "own:autoencoder")
    with pytest.raises(ff.errors.HyperparameterError, match="all 12 steps were rejected.*smaller learning rate"):
        run(configured(*given))
