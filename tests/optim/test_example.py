"""The example's converted loop is the plain one but for what its page shows."""

import difflib
import inspect

from tests.examples import DOCS, load


def test_it_runs_and_draws(tmp_path):
    losses = load("drop_in").main(tmp_path, small=True)
    assert (tmp_path / "drop_in.png").stat().st_size > 10_000
    adam, natural = losses.values()
    assert adam[0][0][1] == natural[0][0][1], "both begin with the same parameters"
    assert natural[0][-1][1] < natural[0][0][1]


def test_two_lines_of_the_loop_changed_and_one_imports():
    plain, converted = (
        inspect.getsource(getattr(load("drop_in"), name)).splitlines()[2:] for name in ("plain", "converted")
    )
    changes = [line for line in difflib.ndiff(plain, converted) if line[0] in "+-"]
    added = [line[2:].strip() for line in changes if line[0] == "+"]
    assert added == [
        "optimizer = ff.optim.NaturalGradient(net, likelihood=ff.Bernoulli())",
        "loss = optimizer.step((x, y))",
    ]
    page = (DOCS / "drop_in.md").read_text().split("```diff\n")[1].split("```")[0]
    shown = [line[1:].strip() for line in page.splitlines() if line.startswith("+")]
    assert shown == ["import fisherfn as ff", added[0], added[1]]
    gone = [line[2:].strip().replace("lr=lr", "lr=1e-3") for line in changes if line[0] == "-"]
    assert [line[1:].strip() for line in page.splitlines() if line.startswith("-")] == gone
