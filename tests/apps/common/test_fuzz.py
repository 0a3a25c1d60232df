"""Files that are broken in a thousand ways: a typed error or sound data, in bounded time, and nothing is executed."""

import gzip
import json
import resource

import numpy as np
import pytest
import scipy.io
import torch
from hypothesis import settings

from common import config as c
from common.checkpoints import VERSION, DamagedError, load_checkpoint, save_checkpoint
from common.data import DataError, cifar, files, idx
from common.results import read_metrics
from common.sweep import stages
from common.train_config import TrainConfig
from fisherfn.errors import FisherfnError
from tests.apps.common.data_files import idx_bytes

ROUNDS = 8 * settings.default.max_examples
"""A kind of file: 200 in the quick profile, 4,000 in the deep one."""


def valid(kind, folder):
    """A sound file of the kind, and what reads it."""
    rng = np.random.default_rng(0)
    if kind.startswith("idx"):
        content = idx_bytes(rng.integers(0, 256, (5, 4, 3)))
        path = folder / ("x-idx3-ubyte" + (".gz" if kind == "idx.gz" else ""))
        path.write_bytes(gzip.compress(content) if kind == "idx.gz" else content)
        return path, lambda: idx.read(path, 3)
    if kind == "cifar":
        records = np.concatenate([rng.integers(0, 10, (6, 1)), rng.integers(0, 256, (6, 3072))], 1).astype(np.uint8)
        for name in ("data_batch_1.bin", "test_batch.bin"):
            (folder / name).write_bytes(records.tobytes())
        return folder / "data_batch_1.bin", lambda: cifar.cifar10(str(folder), 0)
    if kind == "mat":
        path = folder / "x.mat"
        scipy.io.savemat(path, {"X": rng.integers(0, 256, (4, 3, 2), dtype=np.uint8), "y": np.array([[1], [2]])})
        return path, lambda: files.read_mat(path, (4, 3, None), ["X"])
    if kind == "yaml":
        path = folder / "config.yaml"
        c.dump(TrainConfig(), path)
        return path, lambda: c.read(TrainConfig, ["--config", str(path)])
    if kind in ("metrics", "sweep metrics"):
        path = folder / "metrics.jsonl"
        lines = [{"run": k % 2, "epoch": k, "train_loss": 0.5 / (k + 1)} for k in range(4)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path, lambda: stages.read(path) if kind == "sweep metrics" else read_metrics(folder)
    if kind == "sweep.json":
        path = folder / kind
        stages.write_json(path, {"settings": {"lr": [0.1, 1], "optim": "kfac"}, "models_at_once": 2})
        return path, lambda: stages.read_settings(path)
    path = folder / "checkpoint.pt"
    save_checkpoint(path, {"w": torch.arange(6.0), "b": torch.ones(2, dtype=torch.int64)}, {"epoch": 1})
    return path, lambda: load_checkpoint(path)


def broken(content, rng):
    """Some of: bytes changed, a piece cut out, a piece doubled, a piece of nonsense, cut short, blown up."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        at, size = int(rng.integers(0, len(data) + 1)), int(rng.integers(1, 40))
        match rng.integers(0, 6):
            case 0:
                for place in rng.integers(0, max(1, len(data)), size):
                    data[place : place + 1] = bytes([int(rng.choice([0, 1, 127, 128, 255, rng.integers(256)]))])
            case 1:
                del data[at : at + size]
            case 2:
                data[at:at] = data[at : at + size]
            case 3:
                data[at:at] = rng.bytes(size)
            case 4:
                del data[at:]
            case 5:
                data[min(at, 64) : min(at, 64) + 4] = b"\x7f\xff\xff\xff"
    return bytes(data)


KINDS = ["idx", "idx.gz", "cifar", "mat", "yaml", "checkpoint", "metrics", "sweep metrics", "sweep.json"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_file_is_a_typed_error(kind, tmp_path):
    path, read = valid(kind, tmp_path)
    read()
    sound, refused = path.read_bytes(), 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rounds = ROUNDS // 10 if kind == "mat" else ROUNDS  # each in a process of its own
    for seed in range(rounds):
        path.write_bytes(broken(sound, np.random.default_rng(seed)))
        try:
            read()
        except FisherfnError:
            refused += 1
        except BaseException as error:
            raise AssertionError(f"{type(error).__name__} for seed {seed}: {error}") from error
    # a sweep's line that is no JSON is taken for one that a kill cut off
    few = rounds / 50 if kind == "sweep metrics" else rounds / 20
    assert refused > few, "hardly anything is refused: the files are not broken enough"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 2**20, "more than a gigabyte for a small file"


def test_a_reader_that_crashes_does_not_take_the_program_along(tmp_path, monkeypatch):
    """About one in six hundred of these MATLAB files ends scipy's reader with SIGSEGV or SIGBUS."""
    _, read = valid("mat", tmp_path)
    monkeypatch.setattr(files, "READER", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(DataError, match="the reader ended with -11"):
        read()


def test_a_checkpoint_whose_unpickling_ends_in_a_key_error(tmp_path):
    """Found by drawing: the unpickler looks up what was never memorised."""
    path, read = valid("checkpoint", tmp_path)
    content = {"version": VERSION, "meta": "{}", "tensors": {"w": torch.ones(1)}}
    for broken_content in ({**content, "meta": "{"}, {**content, "tensors": {"w": 1}}, {"version": VERSION}):
        torch.save(broken_content, path)
        with pytest.raises(DamagedError):
            read()
    path.write_bytes(broken(sound_checkpoint(tmp_path), np.random.default_rng(1044)))
    with pytest.raises(DamagedError):
        read()


def sound_checkpoint(folder):
    return valid("checkpoint", folder)[0].read_bytes()
