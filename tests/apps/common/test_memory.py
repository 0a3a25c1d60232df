"""Freed memory stays with the process where the allocator is glibc's; elsewhere nothing is changed."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from common.memory import M_MMAP_MAX, M_TRIM_THRESHOLD, keep_freed_memory

APPS = Path(__file__).parents[3] / "apps"


class Library:
    """A C library that records the options it is given."""

    def __init__(self):
        self.given = []

    def mallopt(self, option, value):
        self.given.append((option, value))
        return 1


def test_glibc_is_asked_to_trim_nothing_and_to_map_nothing(monkeypatch):
    library = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert keep_freed_memory()
    assert library.given == [(M_TRIM_THRESHOLD, -1), (M_MMAP_MAX, 0)]


def test_another_allocator_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not keep_freed_memory()


SCRIPT = """
import resource, torch
from common.memory import keep_freed_memory
print({keep})
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(16):
    x = torch.ones(1 << 24)
    y = x + 1
    z = (x * y).sum(), y - x
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of glibc")
def test_large_tensors_take_less_than_half_of_the_new_pages():
    """Small blocks split the first freed ones, so the first rounds still need new pages."""
    found = []
    for keep in ("keep_freed_memory()", "False"):
        command = [sys.executable, "-c", SCRIPT.format(keep=keep)]
        found.append(subprocess.run(command, capture_output=True, text=True, check=True, cwd=APPS).stdout.split())
    (kept, few), (_, many) = found
    if kept == "True":  # musl has no such option
        assert int(few) < int(many) / 2
