"""The trainer of convolutional classifiers: two optimizers, images of the right size, accuracy beside loss."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fisherfn as ff
from common.checkpoints import load_checkpoint
from common.config import ConfigError, read
from common.data import Data, Split, load
from common.models import CNNS
from common.results import read_metrics
from common.train_config import CNN_DATA, CnnConfig
from common.trainer import make_task, run
from tests.apps.options import cadence, safe

ROOT = Path(__file__).parents[2]


def configured(*more: str) -> CnnConfig:
    common = ["--data", "own:load", "--batch_size", "10", "--num_epochs", "3", "--quiet"]
    lr = ["--lr", "0.01" if "adam" in more else "0.1"]
    return read(CnnConfig, [*common, *lr, *cadence(more), *more])


@pytest.mark.parametrize("optim", ["adam", "kfac"])  # every one: test_train_mlp.py
def test_optimizers_train_resume_and_leave_a_whole_result(own, drawn, optim):
    common = ("--model", "own:convolutional", "--optim", optim, *safe(optim))
    straight = run(configured(*common, "--result_name", "straight"))
    assert straight == Path("results/train_cnn/straight")
    metrics = read_metrics(straight)
    assert [m["epoch"] for m in metrics] == [0, 1, 2, 3] and metrics[-1]["step"] == 3 * 4
    assert metrics[-1]["train_loss"] < metrics[0]["train_loss"]
    assert all(0 <= m[name] <= 1 for m in metrics for name in ("train_accuracy", "test_accuracy"))
    assert {path.name for path in straight.glob("*.png")} == {"loss.png"}
    run(configured(*common, "--result_name", "parts", "--num_epochs", "1"))
    parts = run(configured(*common, "--result_name", "parts", "--num_epochs", "3", "--resume"))
    one, two = (load_checkpoint(folder / "checkpoint.pt")[0] for folder in (straight, parts))
    assert one.keys() == two.keys() and all(torch.equal(one[path], two[path]) for path in one)


@pytest.mark.parametrize("model", ["cuda_convnet", "toyCNN"])
def test_the_published_nets_train_on_small_images_too(own, model):
    more = ("--model", model, "--optim", "adam", "--lr", "0.001", "--num_epochs", "1", "--batch_size", "32")
    first, last = read_metrics(run(configured(*more)))
    assert last["train_loss"] != first["train_loss"]


def test_losses_and_accuracies_are_those_of_the_net_in_evaluation_mode(own):
    config = configured("--model", "own:convolutional", "--optim", "sgd")
    folder = run(config)
    data = load("own:load", seed=0)
    task, net = make_task(config, data)
    tensors, _ = load_checkpoint(folder / "checkpoint.pt")
    trained = {path.partition("/")[2]: tensor for path, tensor in tensors.items() if not path.startswith("state")}
    net.load_state_dict(trained)
    with torch.no_grad():
        outputs = net.eval()(data.test.inputs)
    last = read_metrics(folder)[-1]
    assert last["test_loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(outputs, data.test.labels)))
    assert last["test_accuracy"] == pytest.approx(float((outputs.argmax(1) == data.test.labels).float().mean()))


def labelled(name: str, shape: tuple[int, ...], model: str = "AE_MNIST") -> Data:
    split = Split(torch.rand(4, *shape), torch.arange(4))
    return Data(name, split, split, model, ff.Bernoulli(), ff.Categorical())


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_images_stay_images_and_are_brought_to_the_size_of_the_net(shape):
    task, _ = make_task(CnnConfig(model="toyCNN"), labelled("X", shape))
    assert task.train[0].shape == (4, shape[0], 32, 32) and task.per_output == 1
    assert task.params["0.weight"].shape[1] == shape[0]
    assert task.train[1].tolist() == [0, 1, 2, 3]


def test_the_net_that_suits_the_data():
    names = {model: CnnConfig.model_for(labelled("X", (1, 2, 2), model)) for model in ("AE_MNIST", "toyCNN", "a.b:c")}
    assert names == {"AE_MNIST": "cuda_convnet", "toyCNN": "toyCNN", "a.b:c": "a.b:c"}


def test_choices_and_defaults():
    assert CnnConfig().data == "DIGITS" and CnnConfig().data in CNN_DATA
    for model in CNNS:
        assert CnnConfig(model=model).model == model
    with pytest.raises(ConfigError, match="model must be one of cuda_convnet, .*got resnet19; did you mean resnet18"):
        CnnConfig(model="resnet19")
    with pytest.raises(ConfigError, match="data must be one of DIGITS, .*got CURVES"):
        CnnConfig(data="CURVES")


def command(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "apps" / "train_cnn.py")
    return subprocess.run([sys.executable, script, *args], capture_output=True, text=True, cwd=cwd, check=False)


def test_the_command_line(own):
    args = ("--data", "own:load", "--model", "own:convolutional", "--num_epochs", "1", "--optim", "sgd", "--lr", "0.1")
    done = command(*args, cwd=own)
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout and "results/train_cnn/" in done.stdout.splitlines()[-1]
    [folder] = (own / "results/train_cnn").iterdir()
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["epoch"] == 1
    wrong = command("--data", "CIFAR10", "--data_path", "nowhere", cwd=own)
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr
    assert all(part in wrong.stderr for part in ("data_batch_1.bin", "cifar-10-binary.tar.gz", "nowhere", "--download"))
