"""The number of models at once: chosen by measured times, and by the memory that this process may use."""

import dataclasses

import pytest

import sweep
from common.sweep import auto, stages
from common.sweep.group import Group
from tests.apps.test_sweep import BASE, FIXED, reversed_grid


def test_auto_takes_the_fastest_group_and_stops_after_two_larger_ones_that_are_slower(own, monkeypatch):
    config, problem = sweep.make_problem(*reversed_grid("--lr", ",".join(map(str, range(1, 40)))), shared=False)
    per_model = {1: 8.0, 2: 9.0, 4: 3.0, 8: 4.0, 16: 5.0, 32: 1.0}
    monkeypatch.setattr(auto, "cost", lambda group, at, steps: len(group.members) * per_model[len(group.members)])
    size, found = auto.choose(problem, range(39), 10)
    assert size == 4 and [each.members for each in found] == [1, 2, 4, 8, 16]
    problem.config = dataclasses.replace(config, compile=True)
    assert auto.choose(problem, range(39), 10)[0] == 4
    per_model |= {4: 5.5, 8: 6.0, 16: 7.0}  # a loop of compiled steps is at least as fast
    assert auto.choose(problem, range(39), 10)[0] == 1
    monkeypatch.setattr(auto, "free_memory", lambda at: 2.5 * auto.WORKING / auto.SHARE * found[0].bytes)
    assert auto.choose(problem, range(39), 10)[0] == 1
    assert auto.free_memory is not None and config.optim == "kfac"


def test_auto_measures(own):
    folder = sweep.main([*BASE, *FIXED])
    content = stages.read_settings(folder / "sweep.json")
    assert content["models_at_once"] in (1, 2)
    assert [each["members"] for each in content["measured"]] == [1, 2]
    assert all(each["seconds"] > 0 and each["bytes"] > 0 for each in content["measured"])


VERSIONS = {
    "0::/job/step": ("", "memory.max", "memory.current", "inactive_file"),
    "4:cpu,memory:/job/step": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


@pytest.mark.parametrize("line", VERSIONS)
def test_auto_knows_limits_of_jobs_and_other_processes(own, monkeypatch, tmp_path, line):
    _, problem = sweep.make_problem(*reversed_grid("--lr", "1,2"), shared=False)
    at = Group(problem, [0]).start()
    root, limit, used, cached = VERSIONS[line]
    job = tmp_path / root / "job"
    (job / "step").mkdir(parents=True)
    (tmp_path / "cgroup").write_text(f"3:cpuset:/\n{line}\n")
    monkeypatch.setattr(auto, "CGROUP", tmp_path), monkeypatch.setattr(auto, "OWN", tmp_path / "cgroup")
    everything = auto.free_memory(at)
    for name, text in ((limit, "1000"), (used, "600"), ("memory.stat", f"anon 400\n{cached} 200")):
        (job / name).write_text(f"{text}\n")
    assert auto.free_memory(at) == 600 < everything
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert auto.free_memory(at) == 150
    (job / limit).write_text("max\n")
    assert auto.free_memory(at) == pytest.approx(everything / 4, rel=0.1)
