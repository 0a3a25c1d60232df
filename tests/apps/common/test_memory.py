"""Freed memory stays with the process: a large tensor is allocated where the last one was."""

import subprocess
import sys
from pathlib import Path

import pytest

APPS = Path(__file__).parents[3] / "apps"
SCRIPT = """
import resource, torch
from common.memory import keep_freed_memory
kept = {kept}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
torch.ones(1 << 26)
print(kept, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of glibc")
def test_a_second_large_tensor_needs_no_new_pages():
    counts = []
    for call in ("keep_freed_memory()", "False"):
        command = [sys.executable, "-c", SCRIPT.format(kept=call)]
        found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=APPS).stdout.split()
        counts.append((found[0] == "True", int(found[1])))
    (kept, few), (_, many) = counts
    if kept:  # musl has no such option
        assert few < 100 < many
