"""The quick run of the zoo: nets of every source build in both modes, with right gradients and sound steps."""

import time

import pytest

import zoo
from common.config import read
from common.zoo import table
from tests.optional.installed import need

need("timm"), need("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_quick_run(tmp_path):
    began = time.thread_time()
    results = zoo.run(read(zoo.ZooConfig, ["--quick", "--result", str(tmp_path / "zoo.jsonl")]))
    assert {r["name"] for r in results} == set(zoo.QUICK) and len(results) == 2 * len(zoo.QUICK)
    assert all(r["typed"] for r in results), [r["message"] for r in results]
    refused = [r["name"] for r in results if not r["built"] and r["name"] != "torch/lstm"]
    assert not refused
    for r in (r for r in results if r["built"]):
        assert not r["error"] and r["sound"] and r["gradient_error"] < 1e-3, r
    assert time.thread_time() - began < 600
    assert table.tables(results).count("\n| `") == len(zoo.QUICK)
