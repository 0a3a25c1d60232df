"""Freed memory stays with the process: a large tensor is soon allocated where an earlier one was."""

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
    torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(kept, min(faults() for _ in range(8)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of glibc")
def test_large_tensors_need_no_new_pages_after_some_time():
    counts = []
    for call in ("keep_freed_memory()", "False"):
        command = [sys.executable, "-c", SCRIPT.format(kept=call)]
        found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=APPS).stdout.split()
        counts.append((found[0] == "True", int(found[1])))
    (kept, few), (_, many) = counts
    if kept:  # musl has no such option
        assert few < 100 < many
