"""Results whose files were damaged: a resumed run and the table of a sweep say so in a typed error that names the file.

test_fuzz.py changes bytes at random; here whole parts are missing, in files that are otherwise valid.
"""

import json
import shutil

import pytest

import sweep
import train_pinn
from common import trainer
from common.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from common.config import ConfigError, read
from common.results import MetricsError
from common.train_config import TrainConfig

DAMAGED = "is damaged, or another version wrote it: start again with --overwrite"


def text(content):
    return lambda path: path.write_text(content)


def line(content):
    """Add a line to a file."""
    return lambda path: path.write_text(path.read_text() + content + "\n")


def without(*names, meta=None):
    """Take entries out of a checkpoint, or replace its metadata."""

    def change(path):
        tensors, before = load_checkpoint(path)
        left = {name: tensor for name, tensor in tensors.items() if not name.startswith(names)}
        save_checkpoint(path, left if names else tensors, before if meta is None else meta)

    return change


def assert_refused(folder, damages, resume):
    """Damage a copy of the result in each of the ways, and try to resume it; the result itself can be resumed."""
    kept = folder.with_name("kept")
    shutil.copytree(folder, kept)
    for name, change, error, message in damages:
        change(folder / name)
        with pytest.raises(error) as caught:
            resume()
        said = str(caught.value)
        assert message in said and name in said, said
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
    resume()


def test_a_run(own):
    config = {"data": "own:load", "optim": "adam", "lr": 0.01, "batch_size": 16, "quiet": True, "result_name": "a"}
    folder = trainer.run(TrainConfig(**config, num_epochs=1))
    damages = [
        ("config.yaml", text("{"), ConfigError, DAMAGED),
        ("config.yaml", text(""), ConfigError, DAMAGED),
        ("config.yaml", text("- 1"), ConfigError, DAMAGED),
        ("checkpoint.pt", without("state.draws"), CheckpointError, DAMAGED),
        ("checkpoint.pt", without(meta={}), CheckpointError, DAMAGED),
        ("checkpoint.pt", without(meta={"epoch": 1}), CheckpointError, DAMAGED),
        ("metrics.jsonl", line("{}"), MetricsError, "not a JSON object of numbers with an epoch"),
        ("metrics.jsonl", line('{"epoch": 2, "train_loss": "low"}'), MetricsError, "not a JSON object of numbers"),
        ("metrics.jsonl", line("[" * 3000), MetricsError, "not a JSON object of numbers"),
    ]
    assert_refused(folder, damages, lambda: trainer.run(TrainConfig(**config, num_epochs=2, resume=True)))


def test_a_physics_informed_net(own):
    config = ["--model", "2-4-1", "--optim", "adam", "--quiet", "--result_name", "p", "--num_steps"]
    folder = train_pinn.run(read(train_pinn.PinnConfig, [*config, "2"]))
    damages = [("checkpoint.pt", without("params/"), CheckpointError, DAMAGED)]
    assert_refused(folder, damages, lambda: train_pinn.run(read(train_pinn.PinnConfig, [*config, "3", "--resume"])))


def test_a_sweep(own):
    grid = ["--data", "own:load", "--optim", "adam", "--lr", "0.1,0.01", "--batch_size", "16", "--quiet"]
    words = [*grid, "--models_at_once", "2", "--num_epochs"]
    folder = sweep.main([*words, "1"])
    damages = [
        ("sweep.json", text("{"), ConfigError, DAMAGED),
        ("sweep.json", text("{}"), ConfigError, DAMAGED),
        ("checkpoints/stage-0-group-0.pt", without(meta={}), CheckpointError, DAMAGED),
        ("checkpoints/stage-0-group-0.pt", without("draws"), CheckpointError, DAMAGED),
        ("metrics.jsonl", line("{}"), MetricsError, DAMAGED),
    ]
    assert_refused(folder, damages, lambda: sweep.main([*words, "2", "--resume"]))
    with pytest.raises(ConfigError, match="was started with models_at_once 2, not 1: leave it out"):
        sweep.main([*grid, "--models_at_once", "1", "--num_epochs", "2", "--resume"])
    assert len({json.loads(each)["run"] for each in (folder / "metrics.jsonl").read_text().splitlines()}) == 2
