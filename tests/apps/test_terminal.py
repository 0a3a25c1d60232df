"""Behaviour of the apps with and without a terminal: help, colours, quiet, verbose. Exit codes: test_train_mlp.py."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAINERS = ["train_mlp", "train_cnn", "train_autoencoder", "train_gan"]
RUN = ["--data", "own:load", "--num_epochs", "1", "--batch_size", "10", "--result_name", "x"]
KFAC = ["--optim", "kfac", "--lr", "0.1", "--damping", "1", "--kl_bound", "0.1"]
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def command(name, *args, cwd, **env):
    call = [sys.executable, str(ROOT / "apps" / f"{name}.py"), *args]
    return subprocess.run(call, capture_output=True, text=True, cwd=cwd, env={**os.environ, **env}, check=False)


def on_a_terminal(name, *args, cwd, **env):
    """Return the output of the app to a terminal, and its exit code."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))  # rows, columns
    call = [sys.executable, str(ROOT / "apps" / f"{name}.py"), *args]
    process = subprocess.Popen(call, stdout=its, stderr=its, stdin=its, cwd=cwd, env={**os.environ, **env})
    os.close(its)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    os.close(ours)
    return written.decode(), process.wait()


@pytest.mark.parametrize("name", TRAINERS)
def test_help_fits_the_terminal_and_says_the_exit_codes(own, name):
    done = command(name, "--help", cwd=own, COLUMNS="80")
    assert done.returncode == 0 and not done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert not COLOUR.search(done.stdout)
    said = " ".join(done.stdout.split())
    assert all(
        part in said for part in ("exit codes: 0 done", "130 for Ctrl-C", "--tensorboard", "--quiet", "--verbose")
    )


@pytest.mark.parametrize("env", [{}, {"NO_COLOR": "1"}])
def test_a_terminal_gets_a_progress_bar_and_no_colours(own, env):
    written, code = on_a_terminal("train_mlp", *RUN, *KFAC, cwd=own, **env)
    assert code == 0, written
    assert "epoch 1/1" in written, "no progress bar"
    assert not COLOUR.search(written)


def test_a_pipe_gets_lines_and_no_progress_bar(own):
    done = command("train_mlp", *RUN, *KFAC, cwd=own)
    assert done.returncode == 0 and not done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()[:-1]] == [["epoch", "0"], ["epoch", "1"]]
    assert "\r" not in done.stdout and not COLOUR.search(done.stdout)


def test_quiet_says_only_where_everything_is_and_verbose_what_is_trained(own):
    quiet = command("train_mlp", *RUN, *KFAC, "--quiet", cwd=own)
    assert len(quiet.stdout.splitlines()) == 1 and not quiet.stderr
    verbose = command("train_mlp", *RUN, *KFAC, "--verbose", "--overwrite", cwd=own)
    assert "damping: 1.0" in verbose.stdout and "linear" in verbose.stdout
    both = command("train_mlp", *RUN, *KFAC, "--verbose", "--quiet", cwd=own)
    assert both.returncode == 2 and "exclude each other" in both.stderr
