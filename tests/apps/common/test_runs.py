"""Errors that the apps report in one line: those raised on purpose, those of files, and devices that do not exist."""

import errno
import os
import signal
import time

import pytest

import benchmark
import benchmark_sweep
import scaling
import search
import soak
import study_growth
import sweep
from common.config import ConfigError, read
from common.runs import check_device, reported
from fisherfn.errors import ShapeError

LACKING = ("read", "write", "make", "below", "replace")


def fail(how, folder):
    """Fail to read or write a file, in one of the ways of `LACKING`."""
    (folder / "file").touch()
    if how == "read":
        (folder / "missing").read_text()
    elif how == "write":
        folder.write_text("a folder cannot be written")
    elif how == "make":
        (folder / "file").mkdir(parents=True)
    elif how == "below":
        (folder / "file" / "folder").mkdir(parents=True)
    else:
        os.replace(folder / "missing", folder / "file")


@pytest.mark.parametrize("how", LACKING)
def test_an_error_of_a_file_is_one_line_with_its_name(how, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught, reported():
        fail(how, tmp_path)
    out, err = capsys.readouterr()
    assert caught.value.code == 1 and not out and err.count("\n") == 1
    assert str(tmp_path) in err and err.endswith("give another folder or file\n")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
def test_a_full_disk_is_one_line_although_it_names_no_file(number, capsys):
    with pytest.raises(SystemExit), reported():
        raise OSError(number, os.strerror(number))
    assert (
        capsys.readouterr().err
        == f"WriteError: {os.strerror(number)}; free some space, or give another folder or file\n"
    )


@pytest.mark.parametrize(
    "error", [ConnectionResetError(errno.ECONNRESET, "reset"), OSError("no number"), ValueError("x")]
)
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)) as caught, reported():
        raise error
    assert caught.value is error


def test_ctrl_c_before_training_is_one_line(capsys):
    with pytest.raises(SystemExit) as caught, reported():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)  # the signal is delivered to Python within it
    assert caught.value.code == 130 and capsys.readouterr().err == "\nSIGINT: stopped\n"


def test_an_error_on_purpose_is_one_line_and_success_is_silent(capsys):
    with reported():
        pass
    with pytest.raises(SystemExit), reported():
        raise ShapeError("too long")
    assert capsys.readouterr().err == "ShapeError: too long\n"


@pytest.mark.parametrize("name", ["gpu", "cuda:99"])
def test_a_device_that_cannot_be_used_is_named_with_what_can(name):
    with pytest.raises(ConfigError, match=f"^device {name} cannot be used here: use cpu or cuda") as caught:
        check_device(name)
    assert "xpu" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "start",
    [
        lambda: benchmark.main(benchmark.BenchmarkConfig(device="gpu")),
        lambda: study_growth.main(study_growth.GrowthConfig(device="gpu")),
        lambda: search.base(search.SearchConfig(device="gpu")),
        lambda: sweep.main(["--lr", "1,0.1", "--device", "gpu"]),
    ],
    ids=["benchmark", "growth", "search", "sweep"],
)
def test_every_app_checks_its_device_first(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="device gpu"):
        start()


@pytest.mark.parametrize("case", [-1, len(benchmark_sweep.CASES)])
def test_a_case_of_the_sweep_benchmark_that_does_not_exist_is_named(case):
    with pytest.raises(ConfigError, match=f"case must be from 0 to {len(benchmark_sweep.CASES) - 1}, got {case}"):
        read(benchmark_sweep.Config, ["--case", str(case)])


def test_an_optimizer_that_the_soak_does_not_have_is_named():
    with pytest.raises(ConfigError, match="optims must be among sgd, .*, gan:adam, .* got 'foo'"):
        soak.soak(soak.SoakConfig(optims="kfac,foo"))


@pytest.mark.parametrize(
    "start",
    [
        lambda: sweep.main(["--data", "own:load", "--lr", "1,0.1", "--result_dir", "file"]),
        lambda: scaling.main(scaling.ScalingConfig(page="file/page.md")),
    ],
    ids=["sweep", "scaling"],
)
def test_a_folder_that_cannot_be_written_is_named(own, start, capsys):
    (own / "file").touch()
    with pytest.raises(SystemExit) as caught, reported():
        start()
    assert caught.value.code == 1 and "file" in capsys.readouterr().err
