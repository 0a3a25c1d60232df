"""Names to data: the registry, one's own loaders, downloads; and what is checked of each."""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import fisherfn as ff
from common.config import read
from common.data import DATA, Data, DataError, Split, download, load
from common.models import MODELS
from common.train_config import APPS
from tests.apps.common.data_files import digits, idx_bytes, write
from tests.apps.common.test_data_cifar import archive, is_the_small_ten, write_ten

NAMES = ["CURVES", "DIGITS", "MNIST", "FACES", "F_MNIST", "D_MNIST", "MNIST_RESTRICTED"]
NAMES += ["CIFAR10", "CIFAR100", "CIFAR10_RESTRICTED", "SVHN"]
OWN = """
import torch
import fisherfn as ff
from common.data import Data, Split

def load(data_path, seed):
    images = torch.full((4, 1, 2, 2), float(seed))
    return Data(f"own {data_path}", Split(images, None), Split(images, None), "MLP", ff.Gaussian(), None)

def nothing(data_path, seed):
    return None

number = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, which Python forgets again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_the_registry() -> None:
    assert list(DATA) == NAMES
    assert set(download.SOURCES) == set(NAMES)


@pytest.mark.parametrize(
    ("name", "near"), [("MNITS", "MNIST"), ("curves", "CURVES"), ("FMNIST", "F_MNIST"), ("FACE", "FACES")]
)
def test_an_unknown_name_lists_the_most_similar_one_and_all(name: str, near: str) -> None:
    with pytest.raises(DataError) as caught:
        load(name)
    assert f"did you mean {near}?" in str(caught.value)
    assert all(known in str(caught.value) for known in NAMES)
    assert isinstance(caught.value, ff.FisherfnError) and isinstance(caught.value, ValueError)


def test_a_name_like_no_other_gets_no_guess() -> None:
    with pytest.raises(DataError) as caught:
        load("qqqq")
    assert "did you mean" not in str(caught.value)


def test_one_s_own_loader_from_the_current_folder(here: Path) -> None:
    write(here / "mine_one" / "images.py", OWN.encode())
    data = load("mine_one.images:load", data_path="some/where", seed=7)
    assert data.name == "own some/where" and data.train.inputs.unique().tolist() == [7.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine_two:absent", "'absent' is no such function in module 'mine_two' .*mine_two.py"),
        ("mine_two:number", "'number' is no function but int"),
        ("mine_two:nothing", "the loader returned NoneType"),
        ("mine_absent.deep:load", "no module 'mine_absent' in the current folder"),
        ("mine_two:", "write it as"),
        (":load", "write it as"),
    ],
)
def test_errors_of_a_custom_loader_are_named(here: Path, name: str, message: str) -> None:
    write(here / "mine_two.py", OWN.encode())
    with pytest.raises(DataError, match=message):
        load(name)


def test_errors_inside_one_s_own_module_stay_theirs(here: Path) -> None:
    write(here / "mine_three.py", b"import a_module_that_is_not_there")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        load("mine_three:load")


IMAGES = torch.zeros(4, 1, 2, 2)
LABELS = torch.tensor([0, 1, 0, 1])
GOOD = Split(IMAGES, LABELS)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (Split(IMAGES.flatten(1), LABELS), GOOD, r"train part: inputs .* \[N, C, H, W\], got torch.float32 \[4, 4\]"),
        (Split(IMAGES[:0], LABELS[:0]), GOOD, "non-empty"),
        (GOOD, Split(IMAGES.double(), LABELS), "test part: .* float32 numbers, got torch.float64"),
        (Split(IMAGES / 0, LABELS), GOOD, "finite"),
        (Split(IMAGES, LABELS[:3]), GOOD, r"labels should be int64 \[4\], .* got torch.int64 \[3\]"),
        (Split(IMAGES, LABELS.float()), GOOD, "int64"),
        (Split(IMAGES, LABELS - 1), GOOD, "class indices from 0, got -1"),
        (GOOD, Split(torch.zeros(4, 1, 3, 2), LABELS), "make them equal"),
        (GOOD, Split(IMAGES, None), "only one of the train and test parts has labels"),
    ],
)
def test_promises_of_a_loader_are_checked(
    monkeypatch: pytest.MonkeyPatch, train: Split, test: Split, message: str
) -> None:
    data = Data("X", train, test, "MLP", ff.Bernoulli(), ff.Categorical())
    monkeypatch.setitem(DATA, "X", lambda data_path, seed: data)
    with pytest.raises(DataError, match=message):
        load("X")


def test_sources_without_files_load_from_any_path() -> None:
    """Those are DIGITS, and CURVES, whose test draws it once for everything."""
    state = torch.get_rng_state()
    data = load("DIGITS", data_path="nowhere")
    assert data.name == "DIGITS" and data.model in MODELS
    assert data.prediction is not None and data.train.labels is not None and data.reconstruction == ff.Bernoulli()
    assert torch.equal(torch.get_rng_state(), state)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        del args


@pytest.fixture
def host(tmp_path: Path) -> Iterator[str]:
    """A server of the four files of a tiny MNIST, below `tmp_path / "host"`."""
    images, labels = digits(10)
    for part in ("train", "t10k"):
        write(tmp_path / "host" / f"{part}-images-idx3-ubyte.gz", idx_bytes(images))
        write(tmp_path / "host" / f"{part}-labels-idx1-ubyte.gz", idx_bytes(labels))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "host")))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def serve(monkeypatch: pytest.MonkeyPatch, host: str, folder: Path, **wrong: str) -> None:
    """Point MNIST's source at `host`, with the right checksums but for the `wrong` ones."""
    files = []
    for file in download.MNIST.files:
        right = "md5:" + hashlib.md5((folder / "host" / file.name).read_bytes()).hexdigest()
        files.append(file._replace(url=host + file.name, checksum=wrong.get(file.name.split("-")[0], right)))
    monkeypatch.setitem(download.SOURCES, "MNIST", download.MNIST._replace(files=tuple(files)))


def test_download_fetches_what_is_missing(tmp_path: Path, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, host, tmp_path)
    path = str(tmp_path / "data")
    assert load("MNIST", data_path=path, download=True).train.inputs.shape == (10, 1, 4, 3)
    assert len(list((tmp_path / "data" / "mnist").iterdir())) == 4


def test_download_completes_a_folder_and_overwrites_nothing(
    tmp_path: Path, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, host, tmp_path)
    mine = write(tmp_path / "data" / "t10k-images-idx3-ubyte", idx_bytes(255 - digits(10)[0]))
    kept = mine.read_bytes()
    data = load("MNIST", data_path=str(tmp_path / "data"), download=True)
    assert mine.read_bytes() == kept and torch.allclose(data.test.inputs, 1 - data.train.inputs)
    names = {path.name for path in (tmp_path / "data").iterdir()}
    assert names == {mine.name} | {file.name for file in download.MNIST.files if "t10k-images" not in file.name}


def test_a_wrong_checksum_is_an_error_and_leaves_nothing(
    tmp_path: Path, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, host, tmp_path, train="md5:" + "0" * 32)
    with pytest.raises(DataError, match="train-images-idx3-ubyte.gz: not fetched from"):
        load("MNIST", data_path=str(tmp_path / "data"), download=True)
    assert not list(tmp_path.glob("data/**/*ubyte*"))


def test_download_fetches_an_archive_that_is_read_where_it_lies(
    tmp_path: Path, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = download.CIFAR10.files[0].name
    files = write_ten(tmp_path / "files")
    path = archive(tmp_path / "host" / name, {f"cifar-10-batches-bin/{file}": files[file] for file in files})
    checksum = "md5:" + hashlib.md5(path.read_bytes()).hexdigest()
    file = download.CIFAR10.files[0]._replace(url=host + name, checksum=checksum)
    monkeypatch.setitem(download.SOURCES, "CIFAR10", download.CIFAR10._replace(files=(file,)))
    is_the_small_ten(load("CIFAR10", data_path=str(tmp_path / "data"), download=True))
    # and where a part lies there already, nothing is fetched
    write_ten(tmp_path / "mine", parts=1)
    is_the_small_ten(load("CIFAR10", data_path=str(tmp_path / "mine"), download=True), parts=1)
    assert not list((tmp_path / "mine").rglob("*.gz"))


def test_no_server_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    serve(monkeypatch, host, tmp_path)
    gone = [file._replace(url=file.url.replace("-ubyte", "-gone")) for file in download.SOURCES["MNIST"].files]
    monkeypatch.setitem(download.SOURCES, "MNIST", download.MNIST._replace(files=tuple(gone)))
    with pytest.raises(DataError, match="404"):
        load("MNIST", data_path=str(tmp_path / "data"), download=True)


@pytest.mark.parametrize("name", [name for name, source in download.SOURCES.items() if source.files])
def test_a_missing_file_names_a_command_that_fetches_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--download") as caught:
        load(name, data_path=str(tmp_path))
    program, *arguments = str(caught.value).split("`python apps/")[1].split("`")[0].split()
    config = read(APPS[program.removesuffix(".py")], arguments)
    assert (config.data, config.data_path, config.download) == (name, str(tmp_path), True)


def test_sources_without_a_download(here: Path) -> None:
    assert load("DIGITS", download=True).name == "DIGITS"
    write(here / "mine_four.py", OWN.encode())
    with pytest.raises(DataError, match="mine_four:load: knows no files to download"):
        load("mine_four:load", download=True)
    with pytest.raises(DataError, match="did you mean"):
        load("MNITS", download=True)
